"""Compiles the source of a grammar with llguidance, which is imported for the first grammar.

Every cost of a source is bounded. Its bytes are limited when it is received. Limits of llguidance bound the terminals that it
compiles (0.2 s at worst), the items of a step (50 ms at worst) and the states that it keeps. A grammar that exceeds a limit is
refused. An answer fails if its grammar exceeds a limit during the generation.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final

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
    "verbose_errors": False,  # keeps generated text out of logs
}


class GrammarCompiler:
    """Compiles grammars for one tokenizer. Not thread-safe.

    The first grammar is slow: the import takes 0.1 s, and a vocabulary of 49k tokens 0.3 s.
    """

    def __init__(self, tokenizer_json: Callable[[], str]) -> None:
        """`tokenizer_json` returns the text of the published tokenizer.json. It is called once, for the first grammar."""
        self._read = tokenizer_json
        self._json: str | None = None
        self._tokenizers: dict[tuple[int, ...], LLTokenizer] = {}

    def compile(self, source: str, end_ids: Sequence[int]) -> "Matcher":
        """Compiles a grammar and returns a Matcher at the beginning of an answer. The grammar allows at least one token there.

        `end_ids` are the tokens that end the answer. Raises UnusableGrammar if the source does not compile, and the errors of
        reading the tokenizer.
        """
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
