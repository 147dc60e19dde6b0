"""A grammar's source → what it allows, by llguidance, whose only owner this file is. It is imported when a grammar comes.

All that a source can cost is bounded here: its bytes where it is taken in, and by llguidance's own fuel the terminals that it
compiles (about 0.2 s at worst), the items of a step (some 50 ms at worst) and the states that it keeps. What passes a limit is
refused, and an answer whose grammar does so half-way fails.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

Allowed = npt.NDArray[np.bool_]
"""[vocab] of the tokenizer; what a model has beyond it is padding."""

_LIMITS: Final[dict[str, Any]] = {
    "initial_lexer_fuel": 200_000,
    "step_lexer_fuel": 100_000,
    "step_max_items": 10_000,
    "max_items_in_row": 2_000,
    "max_grammar_size": 50_000,
    "max_lexer_states": 10_000,
    "verbose_errors": False,  # what was generated so far belongs into no log
}


class UnusableGrammar(Exception):
    """It does not compile, is too large, or allows nothing. The message says where, without what was generated so far."""


def from_regex(regex: str) -> str:
    """The source; whether it compiles is seen when it is compiled."""
    from llguidance import LLMatcher

    return LLMatcher.grammar_from_regex(regex)


def from_ebnf(grammar: str) -> str:
    """Of a grammar in llguidance's Lark, or in llama.cpp's GBNF. Raises UnusableGrammar."""
    from llguidance import grammar_from

    try:
        return grammar_from("grammar", grammar)
    except ValueError as error:
        raise UnusableGrammar(str(error)) from error


class GrammarCompiler:
    """For one tokenizer. Not thread-safe, and slow the first time: importing takes 0.1 s, a vocabulary of 49k tokens 0.3 s."""

    def __init__(self, tokenizer_json: Callable[[], str]) -> None:
        """tokenizer_json: reads the file as published; called once, when the first grammar comes."""
        self._read = tokenizer_json
        self._json: str | None = None
        self._tokenizers: dict[tuple[int, ...], LLTokenizer] = {}

    def compile(self, source: str, end_ids: Sequence[int]) -> "Matcher":
        """At its beginning, where it is known to allow something. Raises UnusableGrammar, and whatever reading raises."""
        from llguidance import LLMatcher, LLParserLimits

        tokenizer = self._tokenizer(tuple(sorted(end_ids)))
        matcher = Matcher(LLMatcher(tokenizer, source, log_level=0, limits=LLParserLimits(**_LIMITS)), tokenizer.vocab_size)
        matcher.copy().allowed(())
        return matcher

    def _tokenizer(self, end_ids: tuple[int, ...]) -> "LLTokenizer":
        from llguidance import LLTokenizer

        if end_ids not in self._tokenizers:
            if self._json is None:
                self._json = self._read()
            self._tokenizers[end_ids] = LLTokenizer(self._json, eos_token=list(end_ids))
        return self._tokenizers[end_ids]


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

    def allowed(self, tokens: Sequence[int], guesses: Sequence[int] = ()) -> list[Allowed]:
        """What may come behind `tokens`, and behind each of the guesses as long as all before it are allowed, too.

        tokens: of the answer so far, whatever was asked before. Raises UnusableGrammar.
        """
        self._go_to(list(tokens))
        masks = [self._next()]
        for guess in guesses:
            if not (guess < self._vocab_size and masks[-1][guess]) or self._matcher.is_stopped():
                break
            self._take([guess])
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
