"""The tokens that a grammar allows next, as numpy has them. A gateway loads it when its first grammar comes."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from functions.grammars.unusable import UnusableGrammar

if TYPE_CHECKING:
    from llguidance import LLMatcher

Allowed = npt.NDArray[np.bool_]
"""[vocab] of the tokenizer; what a model has beyond it is padding."""


class Matcher:
    """How far an answer is in its grammar."""

    def __init__(self, matcher: "LLMatcher", vocab_size: int) -> None:
        self._matcher = matcher
        self._mask = np.zeros((1, (vocab_size + 31) // 32), np.int32)
        self._vocab_size = vocab_size
        self._taken: list[int] = []
        """Tokens that it has gone through."""
        self._check()

    def copy(self) -> "Matcher":
        """Of one that has gone through nothing."""
        return Matcher(self._matcher.deep_copy(), self._vocab_size)

    def allowed(self, tokens: Sequence[int], draft_tokens: Sequence[int] = ()) -> list[Allowed]:
        """What may come behind `tokens`, and behind each of the draft tokens as long as all before it are allowed, too.

        tokens: of the answer so far, whatever was asked before. Raises UnusableGrammar.
        """
        self._go_to(list(tokens))
        masks = [self._next()]
        for draft in draft_tokens:
            if not (draft < self._vocab_size and masks[-1][draft]) or self._matcher.is_stopped():
                break
            self._take([draft])
            masks.append(self._next())
        return masks

    def _go_to(self, tokens: list[int]) -> None:
        pairs = enumerate(zip(self._taken, tokens, strict=False))
        known = next((place for place, (one, other) in pairs if one != other), min(len(self._taken), len(tokens)))
        if known < len(self._taken):
            self._matcher.rollback(len(self._taken) - known)
            del self._taken[known:]
            self._check()
        self._take(tokens[known:])

    def _take(self, tokens: list[int]) -> None:
        taken = self._matcher.try_consume_tokens(tokens)
        self._taken += tokens[:taken]
        self._check()
        if taken < len(tokens):
            raise UnusableGrammar(
                f"token {tokens[taken]}, which is number {len(self._taken)} of the answer, is not allowed there"
            )

    def _next(self) -> Allowed:
        self._matcher.unsafe_compute_mask_ptr(self._mask.ctypes.data, self._mask.nbytes)
        self._check()
        mask = np.unpackbits(self._mask[0].view(np.uint8), count=self._vocab_size, bitorder="little").view(np.bool_)
        if not mask.any():
            raise UnusableGrammar(f"no token is allowed behind {len(self._taken)} tokens of the answer")
        return mask

    def _check(self) -> None:
        if self._matcher.is_error():
            raise UnusableGrammar(self._matcher.get_error().replace("<non-verbose/>", "").strip())
