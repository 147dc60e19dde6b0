"""Makes the grammars that answers must follow. A grammar that does not compile is refused before its request is queued."""

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

_MAX_KNOWN: Final = 1024
_SHOWN_CHARACTERS: Final = 400


class Grammars:
    """Makes grammars for one model, and checks that they compile. Remembers those that do. Thread-safe.

    It compiles one grammar at a time, to leave cores to other requests, and imports llguidance for the first.
    """

    def __init__(self, tokenizer_json: Callable[[], str], end_ids: frozenset[int]) -> None:
        self._compiler = GrammarCompiler(tokenizer_json)
        self._end_ids = tuple(sorted(end_ids))
        self._compiling = threading.Lock()
        self._known: OrderedDict[str, None] = OrderedDict()  # digests of grammars that compile, least recently used first

    def of(self, asked: StructuredOutputs | str) -> Grammar:
        """Makes the grammar of answers with this structure, or of forced tool calls.

        If `asked` is a string, it is a grammar's source that ToolFormat.grammar wrote. Raises MalformedEvent if no grammar can
        be made or it does not compile.
        """
        try:
            return self._of_source(asked if isinstance(asked, str) else source_of(asked))
        except (UnusableGrammar, RecursionError, UnicodeError) as error:
            seen = " ".join(str(error).split())[:_SHOWN_CHARACTERS]
            why = f"`tools` cannot be forced: {seen}" if isinstance(asked, str) else _sentence(asked, seen)
            raise MalformedEvent(why) from error

    def _of_source(self, source: str) -> Grammar:
        """Makes the grammar with this source, in llguidance's notation.

        Raises UnusableGrammar if the source is too large or does not compile, or if the model has no token that ends an answer.
        """
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
            if len(self._known) > _MAX_KNOWN:
                self._known.popitem(last=False)
        return grammar


def _sentence(structure: StructuredOutputs, error: str) -> str:
    """Returns the error with the name of its option.

    If one of the keys of a JSON schema occurs in the error, adds the key's place in the schema.
    """
    kind = next(name for name in structure.__struct_fields__ if getattr(structure, name) is not None)
    place = None
    if kind == "json" and isinstance(structure.json, dict):
        place = place_of(structure.json, re.findall(r"[\w$/:.#-]+", error))
    where = "" if place is None else f" at {place}"
    return f"structured output, `{kind}`{where}: {error}"
