"""The sequences that a stage holds: which rows are admitted, when sequences expire, and requests that wait for memory.

Within an attempt a row's position decides: KV beyond it is dropped before computing, and a row is a miss if KV ends before it.
A newer attempt begins with nothing held, and rows of an older one are stale.
"""

import math
import threading
from array import array
from collections.abc import Callable, Collection, Container
from dataclasses import dataclass, field
from typing import Final

from eventing.wire.control import LEASE_SECONDS, ReleaseRow, ReservedRow, ReserveRow
from eventing.wire.events import Row, Status
from eventing.wire.prefix_chain import BLOCK_TOKENS, Chain, under, unpacked
from functions.grammars.matcher import Matcher
from functions.stage.engine.kv_tiers import Restore
from functions.stage.engine.prefix_cache import PrefixCache
from functions.stage.models.kv_cache import KVBudget, KVCacheFull

# More than the autoscaler's target, so that it adds pods, and far below the usual containerConcurrency.
MAX_MEMORY_WAITERS: Final = 2


@dataclass(slots=True)
class SequenceState:
    source: str  # the gateway that sent its first row
    attempt: int
    handle: int  # of its memory in the KV cache
    last_seen: float  # when an event last named it, seconds since the epoch
    # Ids of the tokens held, for penalties and grammars. Only the last stage keeps them. Ids of tokens that it did not compute
    # came with the reservation.
    token_ids: "array[int]" = field(default_factory=lambda: array("i"))
    matcher: Matcher | None = None  # of its grammar; used by the grammar thread only
    grammar: str = ""  # digest of the matcher's grammar
    lineage: str | None = None  # of its KV; None: unknown
    lineage_tokens: float = math.inf  # KV from this token on was computed under another lineage
    is_long: bool = False  # it was begun with more known tokens than the group's `short_context`
    restore: Restore | None = None  # its last one
    adapter: bytes = b""  # digest of its adapter's version; empty: none


class Refusal(Exception):
    """A row is not computed. Its answer has this status.

    held: tokens of the sequence that the stage holds, for a miss. reason: for the log and the client.
    """

    def __init__(self, status: Status, *, held: int | None = None, reason: str | None = None) -> None:
        super().__init__(reason or status)
        self.status = status
        self.held = held
        self.reason = reason


class SequenceTable:
    """All sequences of a stage, with their memory. Only the thread that holds the engine's lock may call it."""

    def __init__(self, kv: KVBudget, idle_seconds: float, clock: Callable[[], float], short_context: int | None = None) -> None:
        """idle_seconds: `expire` releases a sequence if no event named it for so long. clock: seconds since the epoch.

        short_context: of the layer group.
        """
        self._short_context = short_context
        self._kv = kv
        self.cache = PrefixCache(kv)
        self._idle_seconds = idle_seconds
        self._clock = clock
        self.by_id: dict[str, SequenceState] = {}

    def admit(self, row: Row, source: str, lineage: str | None) -> SequenceState:
        """Returns the row's sequence, ready to compute the row: its KV ends at the row's position and has memory for the row.

        Begins the sequence if the row reserves memory for it. source: names the gateway that sent the row. lineage: of the KV
        that the row gets. Raises Refusal.
        """
        if row.reserve_tokens is not None and row.position == 0:
            sequence = self._reserve(row.id, row.attempt, row.reserve_tokens, source, (), row.adapter)
        else:
            found = self.by_id.get(row.id)
            if found is None:
                raise Refusal(Status.MISS, held=0)
            sequence = found
            self._begin_attempt(row.id, sequence, row.attempt, source)
        if row.adapter != sequence.adapter:
            seen, begun = row.adapter.hex() or "none", sequence.adapter.hex() or "none"
            raise Refusal(Status.INVALID, reason=f"the row names adapter {seen}, and its sequence began with {begun}")
        held = self._kv.length(sequence.handle)
        if held < row.position:
            raise Refusal(Status.MISS, held=held)
        end, reserved = row.position + row.length, self._kv.reserved(sequence.handle)
        if end > reserved:
            raise Refusal(Status.INVALID, reason=f"the row ends at position {end}, {reserved} tokens are reserved")
        if self._short_context is not None:
            known = row.position + row.length - row.draft_tokens + row.following
            if row.position == 0:
                sequence.is_long = known > self._short_context
            elif known > self._short_context and not sequence.is_long:
                self._kv.truncate(sequence.handle, 0)
                raise Refusal(Status.MISS, held=0)  # its tokens have other rotations from now on
        self._kv.truncate(sequence.handle, row.position)
        if (held := self._kv.length(sequence.handle)) < row.position:
            # Layers with windows had dropped what comes before the row, or recurrent layers went back to a checkpoint.
            raise Refusal(Status.MISS, held=held)
        if lineage != sequence.lineage:
            self.cache.unfindable_from(sequence.handle, row.position)
            sequence.lineage_tokens = min(sequence.lineage_tokens, row.position)
        if row.position == 0:
            sequence.lineage = lineage
        if row.position <= sequence.lineage_tokens and lineage == sequence.lineage:
            sequence.lineage_tokens = math.inf
        return sequence

    def reserve(self, wanted: ReserveRow, source: str, lineage: str | None) -> ReservedRow:
        """Reserves memory for a sequence and fills it from the prefix cache. A refusal is a status, not an exception.

        Idempotent: a repeated request of the same attempt is answered with the tokens that are held by then. lineage: of the KV
        that the sequence shall have; None: unknown, and nothing is found.
        """
        chain = under(wanted.digests, lineage)
        try:
            sequence = self._reserve(wanted.id, wanted.attempt, wanted.reserve_tokens, source, chain, wanted.adapter)
        except Refusal as refusal:
            return ReservedRow(wanted.id, wanted.attempt, refusal.status)
        if wanted.token_ids:
            sequence.token_ids = array("i", wanted.token_ids)
        held = self.cache.fill(sequence.handle, chain)
        sequence.lineage, sequence.lineage_tokens = lineage, math.inf
        return ReservedRow(wanted.id, wanted.attempt, Status.OK, held)

    def get(self, id_: str, source: str) -> SequenceState | None:
        """The sequence of this id and source; None if there is none."""
        sequence = self.by_id.get(id_)
        return None if sequence is None or sequence.source != source else sequence

    def holder(self, id_: str, attempt: int, source: str, lineage: str) -> tuple[int, int] | None:
        """The KV handle of a sequence in exactly this attempt, and how many tokens of the lineage it holds.

        None if there is no such sequence of the source and the lineage.
        """
        sequence = self.get(id_, source)
        if sequence is None or (sequence.attempt, sequence.lineage) != (attempt, lineage):
            return None
        return sequence.handle, int(min(self._kv.length(sequence.handle), sequence.lineage_tokens))

    def release(self, release: ReleaseRow, source: str) -> bool:
        """Releases a sequence, and caches its KV for later ones.

        False if it is unknown, in a newer attempt or of another source.
        """
        sequence = self.by_id.get(release.id)
        if sequence is None or sequence.source != source or sequence.attempt > release.attempt:
            return False
        del self.by_id[release.id]
        chain = under(unpacked(release.chain), sequence.lineage)
        if sequence.lineage_tokens < math.inf:
            chain = chain[: int(sequence.lineage_tokens) // BLOCK_TOKENS]
        self.cache.end(sequence.handle, chain)
        return True

    def expire(self, lost_sources: Container[str] = ()) -> int:
        """Releases sequences that have been idle too long, and all of the gateways `lost_sources`. Returns how many."""
        oldest = self._clock() - self._idle_seconds
        expired = [
            id_ for id_, sequence in self.by_id.items() if sequence.last_seen < oldest or sequence.source in lost_sources
        ]
        for id_ in expired:
            self.cache.end(self.by_id.pop(id_).handle)
        return len(expired)

    def _reserve(self, id_: str, attempt: int, tokens: int, source: str, chain: Chain, adapter: bytes) -> SequenceState:
        sequence = self.by_id.get(id_)
        if sequence is not None:
            self._begin_attempt(id_, sequence, attempt, source, chain)
            if tokens <= self._kv.reserved(sequence.handle):
                return sequence
            # More is wanted than it has reserved: release its memory, and so all KV that it holds.
            self.cache.drop(self.by_id.pop(id_).handle)
        if tokens > self._kv.capacity_tokens:
            reason = f"{tokens} tokens to reserve will never fit: this stage's KV cache has {self._kv.capacity_tokens}"
            raise Refusal(Status.INVALID, reason=reason)
        try:
            handle = self.cache.reserve(tokens, chain)
        except KVCacheFull as full:
            raise Refusal(Status.FULL, held=0, reason=str(full)) from full
        self.by_id[id_] = SequenceState(source, attempt, handle, self._clock(), adapter=adapter)
        return self.by_id[id_]

    def _begin_attempt(self, id_: str, sequence: SequenceState, attempt: int, source: str, chain: Chain = ()) -> None:
        """Begins a newer attempt of a known sequence, or checks that `attempt` is the current one. Raises Refusal.

        chain: the new attempt's. KV of the older attempt is kept as far as both chains are equal.
        """
        if sequence.source != source:
            raise Refusal(Status.INVALID, reason=f"the id {id_!r} is in use by another source")
        if attempt < sequence.attempt:
            raise Refusal(Status.STALE)
        if attempt > sequence.attempt:
            sequence.attempt = attempt
            self.cache.keep(sequence.handle, chain)
        sequence.last_seen = self._clock()


class GatewayLeases:
    """The leases of gateways, by which a stage finds out that a gateway has died. Every event renews the lease of its source.

    A source names one process of a gateway: after a restart it has another. The engine's thread calls `expired` at intervals of
    at least `check_seconds`; a lease expires after CHECKS such calls without a renewal. So time in which this stage receives no
    event, in a long pass or while the process is paused, does not count. Any thread may call `renew`.
    """

    CHECKS = 10  # calls of `expired` without a renewal until a lease expires

    def __init__(self, lease_seconds: float = LEASE_SECONDS) -> None:
        self.check_seconds = lease_seconds / self.CHECKS  # least time between two calls of `expired`
        self._checks = 0
        self._renewed: dict[str, int] = {}

    def renew(self, source: str) -> None:
        self._renewed[source] = self._checks

    def expired(self, holders: Collection[str]) -> set[str]:
        """Counts one check, and returns the sources whose leases have expired.

        holders: sources that have sequences at this stage; only these are returned.
        """
        self._checks += 1
        expired = {source for source, renewed in list(self._renewed.items()) if self._checks - renewed > self.CHECKS}
        for source in expired:
            self._renewed.pop(source, None)
        for source in holders:  # a renewal during this check may have been removed: begin a new lease
            self._renewed.setdefault(source, self._checks)
        return expired.intersection(holders)


class MemoryWaiters:
    """Requests held open at a stage that lacks memory, so that its autoscaler counts them as in flight. Thread-safe."""

    def __init__(self, free_tokens: Callable[[], int], most: int = MAX_MEMORY_WAITERS) -> None:
        """free_tokens: returns the KV tokens that can be reserved. most: requests held at a time, of all gateways together."""
        self._free_tokens = free_tokens
        self._most = most
        self._changed = threading.Condition()
        self._closed = False
        self.waiting = 0

    def wait(self, tokens: int, seconds: float) -> None:
        """Blocks until `tokens` can be reserved or `seconds` have passed; the caller is not told which.

        Returns at once after `close`, and if as many requests wait already as the constructor allows.
        """
        with self._changed:
            if self.waiting >= self._most:
                return
            self.waiting += 1
            try:
                self._changed.wait_for(lambda: self._closed or self._free_tokens() >= tokens, max(0.0, seconds))
            finally:
                self.waiting -= 1

    def notify(self) -> None:
        """Lets waiting requests check again whether there is memory. Cheap if none waits."""
        if self.waiting:
            with self._changed:
                self._changed.notify_all()

    def close(self) -> None:
        """Makes all calls of `wait` return, now and later."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
