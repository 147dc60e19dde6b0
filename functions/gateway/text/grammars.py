"""Grammars of answers, refused here where they do not compile: before anything is queued, in a sentence that says where."""

import re
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Final

from eventing.problems import MalformedEvent
from eventing.wire.events import MAX_GRAMMAR_BYTES, Grammar, grammar_digest
from eventing.wire.structured_outputs import StructuredOutputs
from functions.grammars.compiler import GrammarCompiler
from functions.grammars.sources import UnusableGrammar, place_of, source_of

_MOST_KNOWN: Final = 1024
"""Digests of those that compile."""
_SHOWN_CHARACTERS: Final = 400


class Grammars:
    """Thread-safe. One is compiled at a time: cores are for the others, too. Nothing is imported before the first."""

    def __init__(self, tokenizer_json: Callable[[], str], end_ids: frozenset[int]) -> None:
        self._compiler = GrammarCompiler(tokenizer_json)
        self._end_ids = tuple(sorted(end_ids))
        self._compiling = threading.Lock()
        self._known: OrderedDict[str, None] = OrderedDict()

    def of(self, asked: StructuredOutputs) -> Grammar:
        """Raises MalformedEvent."""
        try:
            return self.of_source(source_of(asked))
        except (UnusableGrammar, RecursionError, UnicodeError) as error:
            raise MalformedEvent(_sentence(asked, str(error))) from error

    def of_tools(self, source: str) -> Grammar:
        """Of calls that are forced. Raises MalformedEvent."""
        try:
            return self.of_source(source)
        except (UnusableGrammar, RecursionError, UnicodeError) as error:
            raise MalformedEvent(f"`tools` cannot be forced: {_short(str(error))}") from error

    def of_source(self, source: str) -> Grammar:
        """Raises UnusableGrammar."""
        size = len(source.encode())
        if size > MAX_GRAMMAR_BYTES:
            raise UnusableGrammar(f"it has {size} bytes, the most is {MAX_GRAMMAR_BYTES}")
        if not self._end_ids:
            raise UnusableGrammar("the model names no end-of-text token, so that nothing could end the answer")
        grammar = Grammar(grammar_digest(source), self._end_ids, source)
        with self._compiling:
            if grammar.digest not in self._known:
                self._compiler.compile(source, self._end_ids)
            self._known[grammar.digest] = None
            self._known.move_to_end(grammar.digest)
            if len(self._known) > _MOST_KNOWN:
                self._known.popitem(last=False)
        return grammar


def _short(error: str) -> str:
    return " ".join(error.split())[:_SHOWN_CHARACTERS]


def _sentence(asked: StructuredOutputs, error: str) -> str:
    kind = next(name for name in asked.__struct_fields__ if getattr(asked, name) is not None)
    what = _short(error)
    place = None
    if kind == "json" and isinstance(asked.json, dict):
        place = place_of(asked.json, re.findall(r"[\w$/:.#-]+", what))
    where = "" if place is None else f" at {place}"
    return f"structured output, `{kind}`{where}: {what}"
