"""The engine of a stage: takes events from many threads, computes one forward pass at a time, and answers each event.

The engine knows batches and layer groups, but not HTTP. A thread must hold the engine's lock to read or write KV. If the lock
is free, the thread that submits an event computes the event itself, which saves two switches between threads. Otherwise the
engine's own thread computes the event, and the submitting thread waits for the reply. With torch only the engine's own thread
computes, because torch starts a pool of worker threads for each thread that calls its operators.
"""

import logging
import math
import threading
import time
from array import array
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future, wait
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import numpy as np
from msgspec.structs import replace

from eventing.problems import EventExpired
from eventing.wire.control import HOLD_SECONDS, LEASE_SECONDS, RESTORE_HOLD_SECONDS, ReleaseRow, ReservedRow, ReserveRow
from eventing.wire.events import Batch, Pooling, Row, Status, Want
from eventing.wire.prefix_chain import lineage_after
from functions.grammars.compiler import GrammarCompiler
from functions.stage.engine.adapters import AdapterTable, LoadAdapter, LoadedAdapter
from functions.stage.engine.constraints import Constraints
from functions.stage.engine.event_queue import EventQueue, ForwardEvent
from functions.stage.engine.forward_pass import ForwardPass
from functions.stage.engine.kv_tiers import MEMORY, ComputeRate, Restore, Reuse, Tier
from functions.stage.engine.prefix_cache import CachedPrefix
from functions.stage.engine.restores import Restorer
from functions.stage.engine.row_checks import check_event
from functions.stage.engine.sequences import (
    MAX_MEMORY_WAITERS,
    GatewayLeases,
    MemoryWaiters,
    Refusal,
    SequenceTable,
)
from functions.stage.engine.threads import PassThreads
from functions.stage.engine.wire_tensors import wire_tensor
from functions.stage.models.floats import DTYPES
from functions.stage.models.kv_cache import KVBlocks
from functions.stage.models.layer_group import LayerGroup
from functions.stage.models.vector_head import VectorHead

_log: Final = logging.getLogger(__name__)

T = TypeVar("T")

_RESTORING_SHARE: Final = 0.7  # part of the time until a reservation expires in which its rows may ask the tiers


@dataclass(frozen=True, slots=True)
class PassStatistics:
    """Measurements of one forward pass, for metrics.

    The engine passes them to `on_pass` after the replies, while its lock is held.
    """

    queue_seconds: tuple[float, ...]  # how long each merged event waited
    compute_seconds: float
    tokens: int  # of all rows that came in
    rows: tuple[Status, ...]  # the status of each row answered


class Engine:
    """Computes the events of one stage with its layer group. All methods are thread-safe.

    Call `start` once, and `stop` at the end.
    """

    def __init__(
        self,
        group: LayerGroup,
        *,
        num_stages: int,
        max_merge: int,
        idle_sequence_seconds: float,
        lease_seconds: float = LEASE_SECONDS,
        max_memory_waiters: int = MAX_MEMORY_WAITERS,
        threads: PassThreads | None = None,
        tiers: Sequence[Tier] = (),
        rate: ComputeRate | None = None,
        grammars: GrammarCompiler | None = None,
        wire_dtype: str | None = None,
        vector_head: VectorHead | None = None,
        adapters: int = 0,
        load_adapter: LoadAdapter | None = None,
        on_adapter: Callable[[LoadedAdapter], None] = lambda loaded: None,
        on_evicted: Callable[[CachedPrefix], None] | None = None,
        clock: Callable[[], float] = time.time,
        on_pass: Callable[[PassStatistics], None] | None = None,
        on_reuse: Callable[[Reuse], None] = lambda reuse: None,
    ) -> None:
        """Creates an engine that is not running yet.

        num_stages: number of stages in the whole pipeline. max_merge: most events in one pass (see `EventQueue`).

        idle_sequence_seconds: a sequence is released after this time without an event that names it. lease_seconds: all
        sequences of a gateway are released after this time without a request from the gateway. max_memory_waiters: most
        requests that `await_memory` holds open at once. threads: chooses the number of threads for each pass; if None, the
        group keeps its default. tiers: places to fetch KV from that the prefix cache lacks, asked in this order. rate:
        measures the speed of prefill from every pass. grammars: compiles grammars; only the last stage needs it. wire_dtype:
        dtype of hidden states between stages, I8 for 8 bits; if None, the dtype of the group. vector_head: None for a model
        that generates tokens. adapters: most adapters in memory. load_adapter: reads an adapter; if None, rows with adapters
        are refused. clock: returns seconds since the epoch.

        on_adapter: called after each load of an adapter. on_evicted: called just before a cached prefix is evicted. on_pass:
        called after each pass. on_reuse: called when a reservation finds KV in the prefix cache or a tier.
        """
        self._group = group
        self._wire_dtype = wire_dtype or group.hidden_dtype
        # All that the bits of this stage depend on, besides the pipeline's fingerprint.
        self._kind = group.kv.layout.kind if isinstance(group.kv, KVBlocks) else type(group).__name__
        self._clock = clock
        self._on_pass = on_pass
        self._queue = EventQueue(num_stages, max_merge)
        self.rate = rate or ComputeRate()
        # Any thread may read how many tokens and bytes these have. All else is for the thread that holds the engine's lock.
        self.kv = group.kv
        self.sequences = SequenceTable(group.kv, idle_sequence_seconds, clock, group.short_context)
        self.cache = self.sequences.cache
        self.runs_by = group.runs_by
        self.cache.on_found = lambda tokens: on_reuse(self.rate.reuse(MEMORY, tokens))
        if on_evicted is not None:
            self.cache.on_evicted = on_evicted
        self._memory_waiters = MemoryWaiters(lambda: self.cache.free_tokens, max_memory_waiters)
        self._vector_head = vector_head or VectorHead({})
        self.adapters = AdapterTable(
            group,
            adapters,
            load_adapter,
            self._queue.call,
            lambda: {sequence.adapter for sequence in self.sequences.by_id.values()},
            on_adapter,
        )
        self._forward_pass = ForwardPass(
            group, self.sequences, Constraints(grammars), self._wire_dtype, self._vector_head, self.adapters.number
        )
        self._leases = GatewayLeases(lease_seconds)
        self._check_seconds = min(self._leases.check_seconds, idle_sequence_seconds / 10)
        self._threads = threads
        self._restorer = Restorer(tiers, self.with_sequences, self.rate, on_reuse)
        self._pass_began: float | None = None
        self._compute_lock = threading.Lock()
        self._thread = threading.Thread(target=self._serve, name="engine", daemon=True)

    def start(self) -> None:
        """Starts the engine's thread. Call it once, before any event."""
        self._thread.start()

    def drain(self) -> None:
        """Makes all present and later calls of `await_memory` return at once.

        The gateway can then try other instances of the stage.
        """
        self._memory_waiters.close()

    def stop(self, *, drain: bool = True) -> None:
        """Refuses new work, and waits until the engine's thread has ended.

        If `drain` is true, waiting events are computed first. Otherwise they fail with NotReady.
        """
        self.drain()
        if drain:
            self._queue.close()
        else:
            self._queue.abandon()
        self._thread.join()
        with self._compute_lock:  # a thread that brought an event may still compute
            pass

    def alive(self, stuck_after_seconds: float) -> bool:
        """False if the engine's thread has ended, or if the current pass has taken longer than `stuck_after_seconds`."""
        began = self._pass_began
        stuck = began is not None and time.perf_counter() - began > stuck_after_seconds
        return self._thread.is_alive() and not stuck

    def lineage(self, before: str | None) -> str | None:
        """Returns the lineage of this stage's output, given the lineage `before` of its input. None stands for unknown."""
        return None if before is None else lineage_after(before, self._kind)

    def handle(self, batch: Batch, *, source: str, expires_at: float | None = None, lineage: str | None = "") -> Batch:
        """Computes a forward event and returns the reply. Blocks until then. Parameters and errors are those of `compute`."""
        return self.compute(batch, source=source, expires_at=expires_at, lineage=lineage).result()

    def compute(self, batch: Batch, *, source: str, expires_at: float | None = None, lineage: str | None = "") -> ForwardEvent:
        """Submits a forward event. Returns an object whose `result()` blocks until the pass is done and returns the reply.

        After the pass, the object also has the duration and the number of tokens of the pass. source: names the gateway that
        sent the event; a sequence belongs to the source that began it. expires_at: seconds since the epoch; if None, the event
        never expires. lineage: of the hidden states in the event; empty at the first stage, None if unknown.

        This method or `result()` raises MalformedEvent, EventTooLarge, EventExpired, NotReady, or the error of the layer group.
        """
        self._leases.renew(source)
        check_event(batch, self._group, self._wire_dtype)
        if wanted := {row.adapter for row in batch.rows if row.adapter and not self.adapters.is_ready(row.adapter)}:
            self._await_adapters(wanted, math.inf if expires_at is None else expires_at - self._clock())
        event = ForwardEvent(batch, source, expires_at, time.perf_counter(), self.lineage(lineage))
        if self._group.shares_work and self._compute_lock.acquire(blocking=False):
            try:
                self._queue.put(event, wakes=False)
                self._work()
            finally:
                self._compute_lock.release()
                self._queue.wake()
        else:
            self._queue.put(event)
        return event

    def reserve(
        self, rows: Sequence[ReserveRow], *, source: str, expires_at: float | None = None, lineage: str | None = ""
    ) -> list[ReservedRow]:
        """Reserves memory for sequences, and fills it with KV from the prefix cache and the tiers as far as they have it.

        Returns a reply for each row: a status (ok, full, stale or invalid), and how many tokens of the row's chain are held.
        Rows are independent: one that does not fit does not undo the others. Other threads ask the tiers. If that takes longer
        than RESTORE_HOLD_SECONDS, the reply says `restoring`, and the caller repeats the reservation to get the outcome.

        source: names the gateway. expires_at: when the reply is due, seconds since the epoch; the tiers may use 70 % of the
        time until then. lineage: of the hidden states that will follow, as for `compute`. Raises NotReady.
        """
        self._leases.renew(source)
        left = math.inf if expires_at is None else expires_at - self._clock()
        deadline = time.monotonic() + _RESTORING_SHARE * left
        own = self.lineage(lineage)
        replies = self._queue.call(lambda: [self._reserve(row, own, source, deadline) for row in rows])
        awaited: list[Future[Any]] = [reply.over for reply, _ in replies if isinstance(reply, Restore)]
        awaited += [loaded for _, loaded in replies if loaded is not None]
        wait(awaited, max(0.0, min(RESTORE_HOLD_SECONDS, left)))
        return [
            self._with_adapter(row, reply.reply() if isinstance(reply, Restore) else reply)
            for row, (reply, _) in zip(rows, replies, strict=True)
        ]

    def with_sequences(self, action: Callable[[SequenceTable], T]) -> T:
        """Calls `action` with the sequence table between two passes, and returns the result of `action`.

        `action` runs under the engine's lock, so it may read KV but should be short. Raises NotReady, and what `action` raises.
        """
        return self._queue.call(lambda: action(self.sequences))

    def release(self, rows: Sequence[ReleaseRow], *, source: str) -> int:
        """Releases sequences and returns how many were known. Unknown sequences are no error. Raises NotReady.

        source: names the gateway. Every call renews the lease of the gateway, even a call without rows.
        """
        self._leases.renew(source)

        def release() -> int:
            released = 0
            for row in rows:
                self._queue.mark_released(row.id, row.attempt, source)
                released += self.sequences.release(row, source)
            return released

        return self._queue.call(release)

    def await_memory(self, tokens: int, *, source: str, expires_at: float | None = None) -> None:
        """Blocks until memory for `tokens` is free, or a time limit has passed. Does not tell which, and reserves nothing.

        source: names the gateway, whose lease the call renews. expires_at: seconds since the epoch. The time limit is at most
        half of the time until then, so that the reply is not late.
        """
        self._leases.renew(source)
        left = math.inf if expires_at is None else (expires_at - self._clock()) / 2
        self._memory_waiters.wait(tokens, min(HOLD_SECONDS, left))

    def warm_up(self) -> None:
        """Runs one token through all layers, so that the first event does not wait for one-time set-up."""
        source, row_id = "warm-up", "warm-up"
        tensor = None
        if self._group.first_layer > 0:
            dtype = self._group.hidden_dtype
            tensor = wire_tensor(np.zeros((1, self._group.hidden_size), DTYPES[dtype]), dtype, self._wire_dtype)
        row = Row(row_id, attempt=0, position=0, length=1, want=Want.TOKEN, reserve_tokens=1)
        if self._vector_head.embedder is not None:
            row = replace(row, want=Want.VECTOR, pooling=Pooling.LAST)
        self.handle(Batch((row,), memoryview(array("i", [0])), tensor), source=source)
        self.release([ReleaseRow(row_id, attempt=0)], source=source)

    def _await_adapters(self, wanted: Collection[bytes], seconds: float) -> None:
        """Waits at most `seconds` until adapters are loaded. If a load fails, the pass refuses the rows of the adapter."""

        def claim() -> list[Future[None]]:
            loads = []
            for adapter in wanted:
                with suppress(Refusal):
                    loads.append(self.adapters.claim(adapter))
            return loads

        wait(self._queue.call(claim), None if seconds == math.inf else max(0.0, seconds))

    def _with_adapter(self, row: ReserveRow, reserved: ReservedRow) -> ReservedRow:
        """Adds the state of the adapter to the reply to a reservation.

        Returns `restoring` while the adapter is being loaded, and INVALID if the load failed.
        """
        if not row.adapter or reserved.status is not Status.OK or self.adapters.is_ready(row.adapter):
            return reserved
        if (reason := self.adapters.refusal(row.adapter)) is not None:
            return ReservedRow(row.id, row.attempt, Status.INVALID, reason=reason)
        return replace(reserved, restoring=True)

    def _reserve(
        self, row: ReserveRow, lineage: str | None, source: str, deadline: float
    ) -> tuple[ReservedRow | Restore, "Future[None] | None"]:
        """Reserves memory for a sequence, and begins to load its adapter and to restore missing KV.

        Returns the reply or the restore that is under way, and a future that completes when the adapter's load has ended. A
        repeated reservation gets the restore of the first one. deadline: time limit of a new restore, in time.monotonic().
        Runs on the engine's thread.
        """
        loaded = None
        if row.adapter:
            try:
                loaded = self.adapters.claim(row.adapter)
            except Refusal as refusal:
                return ReservedRow(row.id, row.attempt, refusal.status, reason=str(refusal)), None
        known = self.sequences.get(row.id, source)
        if known is not None and known.restore is not None and known.restore.answers(row, lineage):
            return known.restore, loaded
        reserved = self.sequences.reserve(row, source, lineage)
        restore = self._restorer.begin(row, lineage, reserved, source, deadline)
        if (sequence := self.sequences.get(row.id, source)) is not None:
            sequence.restore = restore
        return restore or reserved, loaded

    def _serve(self) -> None:
        last_check = self._clock()
        try:
            while self._queue.wait(self._check_seconds):
                with self._compute_lock:
                    if self._clock() - last_check >= self._check_seconds:
                        last_check = self._clock()
                        self._expire()
                    self._work()
        finally:
            self._queue.abandon()

    def _expire(self) -> None:
        """Releases idle sequences, and all sequences of gateways whose leases have expired."""
        lost = self._leases.expired({sequence.source for sequence in self.sequences.by_id.values()})
        if released := self.sequences.expire(lost):
            _log.warning("released %d abandoned sequences; gateways with expired leases: %s", released, sorted(lost) or "none")

    def _work(self) -> None:
        """Runs all queued calls or, if there are none, one pass over the next events. The caller must hold the engine's lock.

        An error that escapes from this method is a defect. The queue then takes no more work, and all waiting work fails.
        """
        calls, events = self._queue.take()
        try:
            for call in calls:
                try:
                    call.answer(call.action())
                except Exception as error:  # noqa: BLE001 - the thread that waits for the call gets it
                    call.fail(error)
            if events:
                self._answer(events)
            self._memory_waiters.notify()
        except BaseException:
            self._queue.abandon(in_hand=[*calls, *events])
            raise

    def _answer(self, events: list[ForwardEvent]) -> None:
        """Computes the events that have not expired, and answers them. Expired events fail with EventExpired."""
        now = self._clock()
        current: list[ForwardEvent] = []
        for event in events:
            if event.expires_at is None or event.expires_at > now:
                current.append(event)
        began = self._pass_began = time.perf_counter()
        if self._threads is not None:
            self._group.use_threads(self._threads.begin(began))
        outcomes = self._run(current) if current else []
        self._pass_began = None
        if self._threads is not None:
            self._threads.end(began, time.perf_counter())
        # Before the replies: a client that has one may send the sequence's next step at once.
        self._queue.done(events)
        if len(current) < len(events):
            for event in set(events).difference(current):
                event.fail(EventExpired("the event expired before its turn came"))
        seconds = time.perf_counter() - began
        tokens = sum([len(event.batch.token_ids) for event in current])
        for event, outcome in zip(current, outcomes, strict=True):
            event.pass_seconds, event.pass_tokens = seconds, tokens
            if isinstance(outcome, Batch):
                event.answer(outcome)
            else:
                event.fail(outcome)
        if current:
            self._report(current, outcomes, began, seconds, tokens)

    def _run(self, events: list[ForwardEvent]) -> Sequence[Batch | Exception]:
        """Runs one pass over all events, and returns the reply or the error of each event.

        If the pass raises, runs a pass for each event, so that only the event that causes the error fails.
        """
        try:
            return self._forward_pass.run(events)
        except Exception as error:  # noqa: BLE001 - the sender of the event gets it; the engine goes on
            _log.exception("a pass failed: %s", ", ".join(row.id for event in events for row in event.batch.rows))
            if len(events) == 1:
                error.__traceback__ = error.__context__ = error.__cause__ = None  # their frames hold the events' bytes
                return [error]
        return [outcome for event in events for outcome in self._run([event])]

    def _report(
        self,
        events: Sequence[ForwardEvent],
        outcomes: Sequence[Batch | Exception],
        began: float,
        seconds: float,
        tokens: int,
    ) -> None:
        queue_seconds = [began - event.arrived for event in events]
        statuses: list[Status] = []
        for outcome in outcomes:
            if isinstance(outcome, Batch):
                for row in outcome.rows:
                    statuses.append(row.status)
                    if row.status is Status.INVALID:
                        _log.info("%s is refused: %s", row.id, row.reason)
        self.rate.computed(tokens, seconds)
        if self._on_pass is not None:
            self._on_pass(PassStatistics(tuple(queue_seconds), seconds, tokens, tuple(statuses)))
