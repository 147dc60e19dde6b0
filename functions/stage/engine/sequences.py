"""The sequences of a stage: admits rows, expires sequences, and holds requests that wait for memory.

KV beyond a row's position is dropped before the row is computed. If the KV ends before the position, the row is a miss. A newer
attempt of a sequence begins with the KV that the chains of both attempts have in common. Rows of older attempts are stale.
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
    # Ids of the sequence's tokens, for penalties and grammars. Only the last stage keeps them. The reservation brings the ids
    # of tokens that the stage did not compute.
    token_ids: "array[int]" = field(default_factory=lambda: array("i"))
    matcher: Matcher | None = None  # of its grammar; used by the grammar thread only
    grammar: str = ""  # digest of the matcher's grammar
    lineage: str | None = None  # of its KV; None: unknown
    lineage_tokens: float = math.inf  # KV from this token on was computed under another lineage
    is_long: bool = False  # whether it began with more known tokens than the group's `short_context`
    restore: Restore | None = None  # its last one
    adapter: bytes = b""  # digest of its adapter's version; empty: none


class Refusal(Exception):
    """A row is refused: it is not computed, and its answer has this status.

    held: how many tokens of the sequence the stage holds; set for a miss. reason: for the log and the client.
    """

    def __init__(self, status: Status, *, held: int | None = None, reason: str | None = None) -> None:
        super().__init__(reason or status)
        self.status = status
        self.held = held
        self.reason = reason


class SequenceTable:
    """All sequences of a stage, with their memory. Only the thread that holds the engine's lock may call methods."""

    def __init__(self, kv: KVBudget, idle_seconds: float, clock: Callable[[], float], short_context: int | None = None) -> None:
        """Creates a table without sequences, whose memory is counted in `kv`.

        idle_seconds: `expire` releases a sequence after this time without an event that names it.

        clock: returns seconds since the epoch. short_context: see `LayerGroup.short_context`.
        """
        self._short_context = short_context
        self._kv = kv
        self.cache = PrefixCache(kv)
        self._idle_seconds = idle_seconds
        self._clock = clock
        self.by_id: dict[str, SequenceState] = {}

    def admit(self, row: Row, source: str, lineage: str | None) -> SequenceState:
        """Prepares a sequence for a row and returns it: its KV ends at the row's position and has memory for the row.

        Begins the sequence if the row asks for memory and is at position 0. source: names the gateway that sent the row.
        lineage: of the KV that the row will have. Raises Refusal.
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
        """Reserves memory for a sequence, and fills the memory from the prefix cache.

        A refusal is a status in the reply, not an exception. A request of the same attempt may be repeated: the reply then says
        how many tokens are held by that time. lineage: of the KV that the sequence will have. If None, the lineage is unknown
        and nothing is found.
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
        """Returns the sequence with this id, or None if this source has no such sequence."""
        sequence = self.by_id.get(id_)
        return None if sequence is None or sequence.source != source else sequence

    def holder(self, id_: str, attempt: int, source: str, lineage: str) -> tuple[int, int] | None:
        """Returns the KV handle of a sequence, and how many tokens of this lineage it holds.

        None if there is no sequence with exactly this id, attempt, source and lineage.
        """
        sequence = self.get(id_, source)
        if sequence is None or (sequence.attempt, sequence.lineage) != (attempt, lineage):
            return None
        return sequence.handle, int(min(self._kv.length(sequence.handle), sequence.lineage_tokens))

    def release(self, release: ReleaseRow, source: str) -> bool:
        """Releases a sequence, and caches its KV for later sequences.

        Returns False if the sequence is unknown, in a newer attempt, or of another source.
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
        """Releases sequences that have been idle too long, and all sequences of `lost_sources`. Returns how many."""
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
        """Begins a newer attempt of a known sequence. Raises Refusal if `attempt` is older than the present one.

        Also raises Refusal if the sequence is of another source. chain: of the new attempt. The KV of the common prefix of both
        attempts' chains is kept.
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
    """The leases of gateways. A lease that expires tells the stage that its gateway has died.

    Every event renews the lease of its source. A source names one process of a gateway, so a restarted gateway is a new source.
    The engine's thread calls `expired` at intervals of at least `check_seconds`. A lease expires after CHECKS such calls
    without a renewal. So time in which the stage itself makes no progress, in a long pass or in a paused process, does not
    count. Any thread may call `renew`.
    """

    CHECKS = 10  # calls of `expired` without a renewal until a lease expires

    def __init__(self, lease_seconds: float = LEASE_SECONDS) -> None:
        self.check_seconds = lease_seconds / self.CHECKS  # least time between two calls of `expired`
        self._checks = 0
        self._renewed: dict[str, int] = {}

    def renew(self, source: str) -> None:
        self._renewed[source] = self._checks

    def expired(self, holders: Collection[str]) -> set[str]:
        """Counts one check, and returns those of `holders` whose leases have expired.

        holders: the sources that have sequences at this stage.
        """
        self._checks += 1
        expired = {source for source, renewed in list(self._renewed.items()) if self._checks - renewed > self.CHECKS}
        for source in expired:
            self._renewed.pop(source, None)
        for source in holders:  # a renewal during this check may have been removed: begin a new lease
            self._renewed.setdefault(source, self._checks)
        return expired.intersection(holders)


class MemoryWaiters:
    """Holds requests open while the stage lacks memory, so that the autoscaler counts them as in flight. Thread-safe."""

    def __init__(self, free_tokens: Callable[[], int], most: int = MAX_MEMORY_WAITERS) -> None:
        """Prepares to hold at most `most` requests at once, of all gateways together.

        free_tokens: returns how many tokens of KV can be reserved.
        """
        self._free_tokens = free_tokens
        self._most = most
        self._changed = threading.Condition()
        self._closed = False
        self.waiting = 0

    def wait(self, tokens: int, seconds: float) -> None:
        """Blocks until `tokens` can be reserved or `seconds` have passed. The caller is not told which.

        Returns at once after `close`, or if the greatest number of requests is already waiting.
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
        """Makes waiting requests check again whether there is memory. Cheap if no request waits."""
        if self.waiting:
            with self._changed:
                self._changed.notify_all()

    def close(self) -> None:
        """Makes all present and later calls of `wait` return at once."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
