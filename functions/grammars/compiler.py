"""A grammar's source → what it allows, by llguidance, which is imported when a grammar comes.

All that a source can cost is bounded here: its bytes where it is taken in, and by llguidance's own fuel the terminals that it
compiles (about 0.2 s at worst), the items of a step (some 50 ms at worst) and the states that it keeps. What passes a limit is
refused, and an answer whose grammar does so half-way fails.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final

from functions.grammars.unusable import UnusableGrammar

if TYPE_CHECKING:
    from llguidance import LLTokenizer

    from functions.grammars.matcher import Matcher

_LIMITS: Final[dict[str, Any]] = {
    "initial_lexer_fuel": 200_000,
    "step_lexer_fuel": 100_000,
    "step_max_items": 10_000,
    "max_items_in_row": 2_000,
    "max_grammar_size": 50_000,
    "max_lexer_states": 10_000,
    "verbose_errors": False,  # what was generated so far belongs into no log
}


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

        from functions.grammars.matcher import Matcher

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
