"""Restricts the tokens that rows may draw to those that their grammars allow.

Remembers the grammars that the stage was sent. A separate thread computes the masks of allowed tokens while the layers run.
"""

from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final

from eventing.wire.events import Grammar, Row, Status, grammar_digest
from functions.grammars.compiler import GrammarCompiler
from functions.grammars.matcher import Allowed, Matcher
from functions.grammars.sources import UnusableGrammar
from functions.stage.engine.sequences import Refusal, SequenceState

MOST_GRAMMARS: Final = 64  # kept, the most recently used ones; a running sequence keeps its own in addition


@dataclass(frozen=True, slots=True)
class ConstrainedRow:
    """A row whose next tokens a grammar restricts.

    The token ids are copies, because the next pass changes the arrays of the sequence.
    """

    grammar: Grammar
    sequence: SequenceState
    tokens: Sequence[int]  # the answer so far
    draft_tokens: Sequence[int]


Masks = Sequence[Allowed] | UnusableGrammar
"""The masks of one row, or the reason why its grammar failed.

The first mask says which tokens may follow the last known token. Each further mask does so for an allowed draft token.
"""


class Constraints:
    """Keeps the grammars of a pipeline's last stage and computes masks.

    Only the thread that holds the engine's lock may call the public methods.
    """

    def __init__(self, compiler: GrammarCompiler | None) -> None:
        """If `compiler` is None, the stage has no tokenizer, and every row with a grammar is refused."""
        self._compiler = compiler
        self._sources: OrderedDict[str, str] = OrderedDict()  # by digest, most recently used last
        self._compiled: dict[str, Matcher] = {}  # in their initial state; used by the grammar thread only
        self._thread: ThreadPoolExecutor | None = None

    def admit(self, row: Row, grammar: Grammar, sequence: SequenceState) -> None:
        """Checks that the row's grammar can be applied, and remembers the grammar's source.

        Later rows name only the digest of the grammar. Raises Refusal if the stage has no tokenizer, if the grammar is unknown
        or does not match its digest, or if the stage does not know the earlier tokens of the sequence.
        """
        if len(sequence.token_ids) < row.position:
            raise Refusal(Status.MISS, held=0)  # computed by another instance, and nothing told this one the tokens
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

    def begin(self, rows: Sequence[ConstrainedRow]) -> "Future[list[Masks]]":
        """Starts to compute the masks of all rows on the grammar thread. Returns a future list with one entry for each row.

        If reading the tokenizer fails, the future raises that error.
        """
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "grammars")
        masks = self._thread.submit(self._masks, rows, dict(self._sources))
        while len(self._sources) > MOST_GRAMMARS:  # only now: this pass may need all of them
            self._sources.popitem(last=False)
        return masks

    def _masks(self, rows: Sequence[ConstrainedRow], sources: dict[str, str]) -> list[Masks]:
        """Computes the rows' masks on the grammar thread. Drops compiled grammars that are not in `sources`."""
        masks = [self._masks_of(row, sources) for row in rows]
        for digest in self._compiled.keys() - sources.keys():
            del self._compiled[digest]
        return masks

    def _masks_of(self, row: ConstrainedRow, sources: dict[str, str]) -> Masks:
        sequence, digest = row.sequence, row.grammar.digest
        try:
            if sequence.matcher is None or sequence.grammar != digest:
                if digest not in self._compiled:
                    assert self._compiler is not None
                    self._compiled[digest] = self._compiler.compile(sources[digest], row.grammar.end_ids)
                sequence.matcher, sequence.grammar = self._compiled[digest].copy(), digest
            return sequence.matcher.allowed(row.tokens, row.draft_tokens)
        except UnusableGrammar as error:
            sequence.matcher, sequence.grammar = None, ""  # the matcher may be stuck
            return error
