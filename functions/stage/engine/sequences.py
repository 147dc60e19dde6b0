"""The sequences that a stage holds, and the row contract: what a row may do to them.

Position is the truth within an attempt: KV beyond a row's position is dropped before computing, KV short of it is a miss.
A newer attempt begins with nothing held; an older one is stale. Only the engine's thread comes here.
"""

from array import array
from collections.abc import Callable, Container
from dataclasses import dataclass, field

from eventing.wire.control import ReleaseRow, ReservedRow, ReserveRow
from eventing.wire.events import Row, Status
from eventing.wire.prefix_chain import Chain, unpacked
from functions.grammars.matcher import Matcher
from functions.stage.engine.remembered import Remembered
from functions.stage.models.layer_group import KVCache, KVCacheFull


@dataclass(slots=True)
class SequenceState:
    source: str
    """Whose it is: the gateway that sent its first row."""
    attempt: int
    handle: int
    last_seen: float
    token_ids: "array[int]" = field(default_factory=lambda: array("i"))
    """The tokens held, for penalties and grammars; kept by the last stage only. Of what was not computed here it knows what it
    was told."""
    matcher: Matcher | None = None
    """Of its grammar. Only the thread of `constraints` comes here."""
    grammar: str = ""
    """The digest of what the matcher is of."""


class Refusal(Exception):
    """A row that is not computed, and the status it is answered with."""

    def __init__(self, status: Status, *, held: int | None = None, reason: str | None = None) -> None:
        super().__init__(reason or status)
        self.status = status
        self.held = held
        self.reason = reason


class SequenceTable:
    """All sequences of one stage. `idle_seconds`: one not heard of for so long is released."""

    def __init__(self, kv: KVCache, idle_seconds: float, clock: Callable[[], float]) -> None:
        self._kv = kv
        self.memory = Remembered(kv)
        self._idle_seconds = idle_seconds
        self._clock = clock
        self._sequences: dict[str, SequenceState] = {}

    def __len__(self) -> int:
        return len(self._sequences)

    def admit(self, row: Row, source: str) -> SequenceState:
        """The sequence, its KV cut to the row's position, with room for the row. Raises Refusal."""
        if row.reserve_tokens is not None and row.position == 0:
            sequence = self._reserve(row.id, row.attempt, row.reserve_tokens, source, ())
        else:
            sequence = self._known(row)
            self._begin_attempt(row.id, sequence, row.attempt, source)
        held = self._kv.length(sequence.handle)
        if held < row.position:
            raise Refusal(Status.MISS, held=held)
        end, room = row.position + row.length, self._kv.reserved(sequence.handle)
        if end > room:
            raise Refusal(Status.INVALID, reason=f"the row ends at position {end}, {room} tokens are reserved")
        self._kv.truncate(sequence.handle, row.position)
        return sequence

    def reserve(self, wanted: ReserveRow, source: str) -> ReservedRow:
        """Idempotent: the same sequence and attempt may ask again, and is told what is held by then."""
        chain = wanted.digests
        try:
            sequence = self._reserve(wanted.id, wanted.attempt, wanted.reserve_tokens, source, chain)
        except Refusal as refusal:
            return ReservedRow(wanted.id, wanted.attempt, refusal.status)
        if wanted.token_ids:
            sequence.token_ids = array("i", wanted.token_ids)
        return ReservedRow(wanted.id, wanted.attempt, Status.OK, self.memory.fill(sequence.handle, chain))

    def handle(self, id_: str, attempt: int, source: str) -> int | None:
        """Of a sequence that is in just that attempt."""
        sequence = self._sequences.get(id_)
        known = sequence is not None and (sequence.attempt, sequence.source) == (attempt, source)
        return sequence.handle if known and sequence is not None else None

    def release(self, release: ReleaseRow, source: str) -> bool:
        """Whether there was something to release."""
        sequence = self._sequences.get(release.id)
        if sequence is None or sequence.source != source or sequence.attempt > release.attempt:
            return False
        self._end(release.id, unpacked(release.chain))
        return True

    def sources(self) -> set[str]:
        """Whose sequences are held."""
        return {sequence.source for sequence in self._sequences.values()}

    def expire(self, gone: Container[str] = ()) -> int:
        """Releases what was not heard of for too long, and all of the sources in `gone`; how many sequences that were."""
        oldest = self._clock() - self._idle_seconds
        over = [id_ for id_, one in self._sequences.items() if one.last_seen < oldest or one.source in gone]
        for id_ in over:
            self._end(id_)
        return len(over)

    def _known(self, row: Row) -> SequenceState:
        try:
            return self._sequences[row.id]
        except KeyError:
            raise Refusal(Status.MISS, held=0) from None

    def _reserve(self, id_: str, attempt: int, tokens: int, source: str, chain: Chain) -> SequenceState:
        sequence = self._sequences.get(id_)
        if sequence is not None:
            self._begin_attempt(id_, sequence, attempt, source, chain)
            if tokens <= self._kv.reserved(sequence.handle):
                return sequence
            # It asks for more than before: what it had goes, and what it held with it.
            self.memory.drop(self._sequences.pop(id_).handle)
        if tokens > self._kv.capacity_tokens:
            reason = f"{tokens} tokens to reserve will never fit: this stage's KV cache has {self._kv.capacity_tokens}"
            raise Refusal(Status.INVALID, reason=reason)
        try:
            handle = self.memory.reserve(tokens, chain)
        except KVCacheFull as full:
            raise Refusal(Status.FULL, held=0, reason=str(full)) from full
        self._sequences[id_] = SequenceState(source, attempt, handle, self._clock())
        return self._sequences[id_]

    def _begin_attempt(self, id_: str, sequence: SequenceState, attempt: int, source: str, chain: Chain = ()) -> None:
        """chain: what a newer attempt may keep of what an older one held."""
        if sequence.source != source:
            raise Refusal(Status.INVALID, reason=f"the id {id_!r} is in use by another source")
        if attempt < sequence.attempt:
            raise Refusal(Status.STALE)
        if attempt > sequence.attempt:
            sequence.attempt = attempt
            self.memory.keep(sequence.handle, chain)
        sequence.last_seen = self._clock()

    def _end(self, id_: str, chain: Chain = ()) -> None:
        self.memory.end(self._sequences.pop(id_).handle, chain)
