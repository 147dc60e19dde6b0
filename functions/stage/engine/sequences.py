"""The sequences that a stage holds, and the row contract: what a row may do to them.

Position is the truth within an attempt: KV beyond a row's position is dropped before computing, KV short of it is a miss.
A newer attempt begins with nothing held; an older one is stale. Only the engine's thread comes here.
"""

from array import array
from collections.abc import Callable, Container
from dataclasses import dataclass, field

from eventing.wire.control import ReleaseRow, ReserveRow
from eventing.wire.events import Row, Status
from functions.stage.models.layer_group import KVCache, KVCacheFull


@dataclass(slots=True)
class SequenceState:
    source: str
    """Whose it is: the gateway that sent its first row."""
    attempt: int
    handle: int
    last_seen: float
    token_ids: "array[int]" = field(default_factory=lambda: array("i"))
    """The tokens held, for the repetition penalty; kept by the last stage only."""


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
        self._idle_seconds = idle_seconds
        self._clock = clock
        self._sequences: dict[str, SequenceState] = {}

    def __len__(self) -> int:
        return len(self._sequences)

    def admit(self, row: Row, source: str) -> SequenceState:
        """The sequence, its KV cut to the row's position, with room for the row. Raises Refusal."""
        if row.reserve_tokens is not None and row.position == 0:
            sequence = self._reserve(row.id, row.attempt, row.reserve_tokens, source)
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

    def reserve(self, wanted: ReserveRow, source: str) -> Status:
        """Idempotent: the same sequence and attempt may ask again."""
        try:
            self._reserve(wanted.id, wanted.attempt, wanted.reserve_tokens, source)
        except Refusal as refusal:
            return refusal.status
        return Status.OK

    def release(self, release: ReleaseRow, source: str) -> bool:
        """Whether there was something to release."""
        sequence = self._sequences.get(release.id)
        if sequence is None or sequence.source != source or sequence.attempt > release.attempt:
            return False
        self._drop(release.id)
        return True

    def sources(self) -> set[str]:
        """Whose sequences are held."""
        return {sequence.source for sequence in self._sequences.values()}

    def expire(self, gone: Container[str] = ()) -> int:
        """Releases what was not heard of for too long, and all of the sources in `gone`; how many sequences that were."""
        oldest = self._clock() - self._idle_seconds
        over = [id_ for id_, one in self._sequences.items() if one.last_seen < oldest or one.source in gone]
        for id_ in over:
            self._drop(id_)
        return len(over)

    def _known(self, row: Row) -> SequenceState:
        try:
            return self._sequences[row.id]
        except KeyError:
            raise Refusal(Status.MISS, held=0) from None

    def _reserve(self, id_: str, attempt: int, tokens: int, source: str) -> SequenceState:
        sequence = self._sequences.get(id_)
        if sequence is not None:
            self._begin_attempt(id_, sequence, attempt, source)
            if tokens <= self._kv.reserved(sequence.handle):
                return sequence
            # It asks for more than before: what it had goes, and what it held with it.
            self._drop(id_)
        if tokens > self._kv.capacity_tokens:
            reason = f"{tokens} tokens to reserve will never fit: this stage's KV cache has {self._kv.capacity_tokens}"
            raise Refusal(Status.INVALID, reason=reason)
        try:
            handle = self._kv.reserve(tokens)
        except KVCacheFull as full:
            raise Refusal(Status.FULL, held=0, reason=str(full)) from full
        self._sequences[id_] = SequenceState(source, attempt, handle, self._clock())
        return self._sequences[id_]

    def _begin_attempt(self, id_: str, sequence: SequenceState, attempt: int, source: str) -> None:
        if sequence.source != source:
            raise Refusal(Status.INVALID, reason=f"the id {id_!r} is in use by another source")
        if attempt < sequence.attempt:
            raise Refusal(Status.STALE)
        if attempt > sequence.attempt:
            sequence.attempt = attempt
            self._kv.truncate(sequence.handle, 0)
        sequence.last_seen = self._clock()

    def _drop(self, id_: str) -> None:
        self._kv.release(self._sequences.pop(id_).handle)
