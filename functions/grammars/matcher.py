"""Follows an answer through a grammar and returns, as bit masks, which tokens may come next."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from functions.grammars.sources import UnusableGrammar

if TYPE_CHECKING:
    from llguidance import LLMatcher

Allowed = npt.NDArray[np.uint32]
"""A bit for each token id of the tokenizer, the lowest first: whether it may come next. A model's logits may be longer than the
bits; the rest is padding."""


def is_allowed(allowed: Allowed, token: int) -> bool:
    return token // 32 < len(allowed) and bool(allowed[token // 32] >> (token % 32) & 1)


class Matcher:
    """Follows one answer through its grammar. Not thread-safe."""

    def __init__(self, matcher: "LLMatcher", vocab_size: int) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size
        self._consumed: list[int] = []
        self._check()

    def copy(self) -> "Matcher":
        """Returns a copy. Call it only on a matcher that has followed no answer yet."""
        return Matcher(self._matcher.deep_copy(), self._vocab_size)

    def allowed(self, tokens: Sequence[int], draft_tokens: Sequence[int] = ()) -> list[Allowed]:
        """Returns masks of the allowed tokens: one for the token after `tokens`, and one for the token after each draft token.

        The list ends early, after the first mask that does not allow its draft token. `tokens` are the answer so far; they need
        not continue the answer of the previous call. Raises UnusableGrammar if the grammar does not allow the answer, or if no
        token may follow.
        """
        self._go_to(list(tokens))
        masks = [self._next()]
        for draft in draft_tokens:
            if not is_allowed(masks[-1], draft) or self._matcher.is_stopped():
                break
            self._consume([draft])
            masks.append(self._next())
        return masks

    def _go_to(self, tokens: list[int]) -> None:
        pairs = enumerate(zip(self._consumed, tokens, strict=False))
        common = next((place for place, (one, other) in pairs if one != other), min(len(self._consumed), len(tokens)))
        if common < len(self._consumed):
            self._matcher.rollback(len(self._consumed) - common)
            del self._consumed[common:]
            self._check()
        self._consume(tokens[common:])

    def _consume(self, tokens: list[int]) -> None:
        consumed = self._matcher.try_consume_tokens(tokens)
        self._consumed += tokens[:consumed]
        self._check()
        if consumed < len(tokens):
            raise UnusableGrammar(
                f"token {tokens[consumed]}, which is number {len(self._consumed)} of the answer, is not allowed there"
            )

    def _next(self) -> Allowed:
        mask: Allowed = np.empty((self._vocab_size + 31) // 32, np.uint32)
        self._matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        self._check()
        if self._vocab_size % 32:
            mask[-1] &= np.uint32(2 ** (self._vocab_size % 32) - 1)
        if not mask.any():
            raise UnusableGrammar(f"no token is allowed after {len(self._consumed)} tokens of the answer")
        return mask

    def _check(self) -> None:
        if self._matcher.is_error():
            raise UnusableGrammar(self._matcher.get_error().replace("<non-verbose/>", "").strip())
