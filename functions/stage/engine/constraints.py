"""Rows whose answers have a grammar: which of them are known here, and what each may draw, found while the layers run."""

from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final

from eventing.wire.events import Grammar, Row, Status, Want, grammar_digest
from functions.grammars.compiler import GrammarCompiler
from functions.grammars.matcher import Allowed, Matcher
from functions.grammars.unusable import UnusableGrammar
from functions.stage.engine.sequences import Refusal, SequenceState

MOST_GRAMMARS: Final = 64
"""Kept, those asked for last; a sequence that is being answered keeps its own besides."""


@dataclass(frozen=True, slots=True)
class Constrained:
    """A row that may draw only what its grammar allows. Its tokens are copies: the next row may come before these are read."""

    grammar: Grammar
    sequence: SequenceState
    tokens: Sequence[int]
    """Of the answer so far."""
    draft_tokens: Sequence[int]


Found = Sequence[Allowed] | UnusableGrammar
"""What is allowed behind a row's tokens, and behind each draft token that is allowed itself."""


class Constraints:
    """Of a last stage. The engine's thread comes here; what takes time is done on a thread of its own, in order."""

    def __init__(self, compiler: GrammarCompiler | None) -> None:
        """compiler: None where no tokenizer can be read."""
        self._compiler = compiler
        self._sources: OrderedDict[str, str] = OrderedDict()
        self._compiled: dict[str, Matcher] = {}
        """At their beginning. Only the thread comes here."""
        self._thread: ThreadPoolExecutor | None = None

    def admit(self, row: Row, sequence: SequenceState) -> None:
        """Notes the row's grammar. Raises Refusal where there is one that is not known here, or not what its digest says, or
        the tokens so far are not known."""
        grammar = grammar_of(row)
        if grammar is None:
            return
        if len(sequence.token_ids) < row.position:
            raise Refusal(Status.MISS, held=0)  # computed elsewhere, and nobody told its tokens
        if self._compiler is None:
            raise Refusal(Status.INVALID, reason="this stage has no tokenizer for a grammar")
        if grammar.source:
            if grammar_digest(grammar.source) != grammar.digest:
                raise Refusal(Status.INVALID, reason="the grammar is not the one that its digest says")
            self._sources[grammar.digest] = grammar.source
        elif grammar.digest not in self._sources and sequence.grammar != grammar.digest:
            raise Refusal(Status.MISS, held=row.position)
        if grammar.digest in self._sources:
            self._sources.move_to_end(grammar.digest)

    def begin(self, rows: Sequence[Constrained]) -> "Future[list[Found]]":
        """What each may draw, in their order. The future raises what reading the tokenizer raised."""
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "grammars")
        found = self._thread.submit(self._find, rows, dict(self._sources))
        while len(self._sources) > MOST_GRAMMARS:  # not before: all that this pass takes are among them
            self._sources.popitem(last=False)
        return found

    def _find(self, rows: Sequence[Constrained], sources: dict[str, str]) -> list[Found]:
        found = [self._allowed(row, sources) for row in rows]
        for digest in self._compiled.keys() - sources.keys():
            del self._compiled[digest]
        return found

    def _allowed(self, row: Constrained, sources: dict[str, str]) -> Found:
        sequence, digest = row.sequence, row.grammar.digest
        try:
            if sequence.matcher is None or sequence.grammar != digest:
                sequence.matcher, sequence.grammar = self._fresh(sources[digest], row.grammar), digest
            return sequence.matcher.allowed(row.tokens, row.draft_tokens)
        except UnusableGrammar as error:
            sequence.matcher, sequence.grammar = None, ""  # it may be stuck where it failed
            return error

    def _fresh(self, source: str, grammar: Grammar) -> Matcher:
        assert self._compiler is not None
        if grammar.digest not in self._compiled:
            self._compiled[grammar.digest] = self._compiler.compile(source, grammar.end_ids)
        return self._compiled[grammar.digest].copy()


def grammar_of(row: Row) -> Grammar | None:
    return row.sampling.grammar if row.want is Want.TOKEN and row.sampling is not None else None
