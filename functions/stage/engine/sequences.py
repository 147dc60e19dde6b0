"""The sequences that a stage holds: what a row may do to them, when they expire, and who waits for their memory.

Position is the truth within an attempt: KV beyond a row's position is dropped before computing, KV short of it is a miss.
A newer attempt begins with nothing held; an older one is stale.
"""

import threading
from array import array
from collections.abc import Callable, Collection, Container
from dataclasses import dataclass, field
from typing import Final

from eventing.wire.control import LEASE_SECONDS, ReleaseRow, ReservedRow, ReserveRow
from eventing.wire.events import Row, Status
from eventing.wire.prefix_chain import Chain, unpacked
from functions.grammars.matcher import Matcher
from functions.stage.engine.prefix_cache import PrefixCache
from functions.stage.models.layer_group import KVCache, KVCacheFull

MAX_MEMORY_WAITERS: Final = 2  # above the autoscaler's target, and far enough below the usual containerConcurrency


@dataclass(slots=True)
class SequenceState:
    source: str  # the gateway that sent its first row
    attempt: int
    handle: int
    last_seen: float
    # The tokens held, for penalties and grammars. Only the last stage keeps them; what it did not compute it was told.
    token_ids: "array[int]" = field(default_factory=lambda: array("i"))
    matcher: Matcher | None = None  # of its grammar; used by the grammar thread only
    grammar: str = ""  # digest of the matcher's grammar


class Refusal(Exception):
    """A row is not computed. It is answered with this status."""

    def __init__(self, status: Status, *, held: int | None = None, reason: str | None = None) -> None:
        super().__init__(reason or status)
        self.status = status
        self.held = held
        self.reason = reason


class SequenceTable:
    """All sequences of a stage. Only the thread that has the engine's turn may call this."""

    def __init__(self, kv: KVCache, idle_seconds: float, clock: Callable[[], float]) -> None:
        """idle_seconds: a sequence is released if no event named it for so long."""
        self._kv = kv
        self.cache = PrefixCache(kv)
        self._idle_seconds = idle_seconds
        self._clock = clock
        self._sequences: dict[str, SequenceState] = {}

    def __len__(self) -> int:
        return len(self._sequences)

    def admit(self, row: Row, source: str) -> SequenceState:
        """The row's sequence, with its KV cut to the row's position and memory for the row. Raises Refusal."""
        if row.reserve_tokens is not None and row.position == 0:
            sequence = self._reserve(row.id, row.attempt, row.reserve_tokens, source, ())
        else:
            known = self._sequences.get(row.id)
            if known is None:
                raise Refusal(Status.MISS, held=0)
            sequence = known
            self._begin_attempt(row.id, sequence, row.attempt, source)
        held = self._kv.length(sequence.handle)
        if held < row.position:
            raise Refusal(Status.MISS, held=held)
        end, reserved = row.position + row.length, self._kv.reserved(sequence.handle)
        if end > reserved:
            raise Refusal(Status.INVALID, reason=f"the row ends at position {end}, {reserved} tokens are reserved")
        if held > row.position:
            self._kv.truncate(sequence.handle, row.position)
        return sequence

    def reserve(self, wanted: ReserveRow, source: str) -> ReservedRow:
        """Idempotent: a repeated request of the same attempt is told what is held by then."""
        chain = wanted.digests
        try:
            sequence = self._reserve(wanted.id, wanted.attempt, wanted.reserve_tokens, source, chain)
        except Refusal as refusal:
            return ReservedRow(wanted.id, wanted.attempt, refusal.status)
        if wanted.token_ids:
            sequence.token_ids = array("i", wanted.token_ids)
        return ReservedRow(wanted.id, wanted.attempt, Status.OK, self.cache.fill(sequence.handle, chain))

    def handle(self, id_: str, attempt: int, source: str) -> int | None:
        """The KV handle of a sequence that is in exactly this attempt."""
        sequence = self._sequences.get(id_)
        if sequence is None or (sequence.attempt, sequence.source) != (attempt, source):
            return None
        return sequence.handle

    def release(self, release: ReleaseRow, source: str) -> bool:
        """False if there was nothing to release."""
        sequence = self._sequences.get(release.id)
        if sequence is None or sequence.source != source or sequence.attempt > release.attempt:
            return False
        del self._sequences[release.id]
        self.cache.end(sequence.handle, unpacked(release.chain))
        return True

    def sources(self) -> set[str]:
        """The gateways that have sequences here."""
        return {sequence.source for sequence in self._sequences.values()}

    def expire(self, lost_sources: Container[str] = ()) -> int:
        """Releases idle sequences, and all of `lost_sources`. Returns how many."""
        oldest = self._clock() - self._idle_seconds
        expired = [
            id_ for id_, sequence in self._sequences.items() if sequence.last_seen < oldest or sequence.source in lost_sources
        ]
        for id_ in expired:
            self.cache.end(self._sequences.pop(id_).handle)
        return len(expired)

    def _reserve(self, id_: str, attempt: int, tokens: int, source: str, chain: Chain) -> SequenceState:
        sequence = self._sequences.get(id_)
        if sequence is not None:
            self._begin_attempt(id_, sequence, attempt, source, chain)
            if tokens <= self._kv.reserved(sequence.handle):
                return sequence
            # It wants more than it has: release its memory, and all that it holds.
            self.cache.drop(self._sequences.pop(id_).handle)
        if tokens > self._kv.capacity_tokens:
            reason = f"{tokens} tokens to reserve will never fit: this stage's KV cache has {self._kv.capacity_tokens}"
            raise Refusal(Status.INVALID, reason=reason)
        try:
            handle = self.cache.reserve(tokens, chain)
        except KVCacheFull as full:
            raise Refusal(Status.FULL, held=0, reason=str(full)) from full
        self._sequences[id_] = SequenceState(source, attempt, handle, self._clock())
        return self._sequences[id_]

    def _begin_attempt(self, id_: str, sequence: SequenceState, attempt: int, source: str, chain: Chain = ()) -> None:
        """chain: a newer attempt keeps what it has in common with this of what the older one held. Raises Refusal."""
        if sequence.source != source:
            raise Refusal(Status.INVALID, reason=f"the id {id_!r} is in use by another source")
        if attempt < sequence.attempt:
            raise Refusal(Status.STALE)
        if attempt > sequence.attempt:
            sequence.attempt = attempt
            self.cache.keep(sequence.handle, chain)
        sequence.last_seen = self._clock()


class GatewayLeases:
    """Which gateways are alive. Every event renews the lease of its source, which names one boot of a gateway.

    A lease is counted in checks, not in seconds: during a long pass, or a pause of this process, nothing listens, so that a
    gateway's silence then means nothing. Any thread may call `renew`, only the engine's own thread `expired`.
    """

    CHECKS = 10  # checks without a renewal until a lease expires

    def __init__(self, lease_seconds: float = LEASE_SECONDS) -> None:
        self.check_seconds = lease_seconds / self.CHECKS  # least time between two checks
        self._checks = 0
        self._renewed: dict[str, int] = {}

    def renew(self, source: str) -> None:
        self._renewed[source] = self._checks

    def expired(self, holders: Collection[str]) -> set[str]:
        """Makes one check. Returns the sources among `holders`, those that hold something here, whose leases have expired."""
        self._checks += 1
        expired = {source for source, renewed in list(self._renewed.items()) if self._checks - renewed > self.CHECKS}
        for source in expired:
            self._renewed.pop(source, None)
        for source in holders:  # a source that was heard of again just before its lease was taken for expired
            self._renewed.setdefault(source, self._checks)
        return expired.intersection(holders)


class MemoryWaiters:
    """Requests held open at a stage that lacks memory, so that its autoscaler counts them as in flight. Thread-safe."""

    def __init__(self, free_tokens: Callable[[], int], most: int = MAX_MEMORY_WAITERS) -> None:
        """free_tokens: KV tokens that can be reserved. most: requests held at a time, of all gateways together."""
        self._free_tokens = free_tokens
        self._most = most
        self._changed = threading.Condition()
        self._closed = False
        self.waiting = 0

    def wait(self, tokens: int, seconds: float) -> None:
        """Returns when `tokens` can be reserved or the time is over, at once if `most` requests wait or this is closed."""
        with self._changed:
            if self.waiting >= self._most:
                return
            self.waiting += 1
            try:
                self._changed.wait_for(lambda: self._closed or self._free_tokens() >= tokens, max(0.0, seconds))
            finally:
                self.waiting -= 1

    def notify(self) -> None:
        """Memory may have been freed. Takes no lock if no request waits."""
        if self.waiting:
            with self._changed:
                self._changed.notify_all()

    def close(self) -> None:
        """Ends all waiting, now and later."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
