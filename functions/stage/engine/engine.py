"""The engine of a stage: takes events from many threads, computes one forward pass at a time, and answers each event.

The engine knows batches and layer groups, no HTTP. A thread must hold the engine's lock to read or write KV. A thread that
brings an event while the lock is free computes the event itself, which spares two hand-overs between threads. Otherwise the
engine's own thread computes, and the others wait for their replies. Torch's operators keep threads for each thread that calls
them, so with torch only the engine's own thread computes.
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
    """Measurements of one forward pass, for metrics. `on_pass` gets them after the replies, while the engine's lock is held."""

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
        """num_stages: stages of the whole pipeline. max_merge: most events in one pass (`EventQueue`).

        idle_sequence_seconds: a sequence is released if no event names it for so long. lease_seconds: a gateway's sequences are
        released if nothing comes from it for so long. max_memory_waiters: most requests that `await_memory` holds open at once.
        threads: chooses the number of threads of each pass; None: the group's default. tiers: asked in this order for KV that
        the prefix cache lacks. rate: is told the time of every pass. grammars: compiles grammars of answers; the last stage
        needs it. wire_dtype: of hidden states between stages, I8 for 8 bits; None: the group's own. vector_head: of an
        embedder; None: the model generates tokens. adapters: most adapters in memory. load_adapter: reads one; None: rows with
        adapters are refused. clock: seconds since the epoch.

        on_adapter: called after each load of an adapter. on_evicted: called just before a cached prefix is evicted. on_pass:
        called after each pass. on_reuse: called when a reservation found KV in the prefix cache or a tier.
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
        """Makes `await_memory` return at once, now and later: other instances of the stage may have free memory."""
        self._memory_waiters.close()

    def stop(self, *, drain: bool = True) -> None:
        """Refuses new work, ends the engine's thread and waits for that.

        drain: compute the events that wait; False: they fail with NotReady.
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
        """The lineage of what this stage computes from input of the lineage `before`; None: unknown."""
        return None if before is None else lineage_after(before, self._kind)

    def handle(self, batch: Batch, *, source: str, expires_at: float | None = None, lineage: str | None = "") -> Batch:
        """Computes a forward event and returns the reply, after its pass. Parameters and errors are those of `compute`."""
        return self.compute(batch, source=source, expires_at=expires_at, lineage=lineage).result()

    def compute(self, batch: Batch, *, source: str, expires_at: float | None = None, lineage: str | None = "") -> ForwardEvent:
        """Hands a forward event to the engine. Its `result` blocks until the pass is done; then it also knows the pass.

        source: names the gateway that sent the event; a sequence belongs to the source that began it. expires_at: seconds since
        the epoch; None: the event never expires. lineage: of the event's hidden states; empty: there is no stage before; None:
        unknown.
        This or the result raises MalformedEvent, EventTooLarge, EventExpired, NotReady, or what the layer group raised.
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

        Returns for each row its status (ok, full, stale or invalid), and how many tokens of its chain are held. Rows that fit
        stay reserved if others do not. The tiers are asked in other threads; rows that are still being restored after
        RESTORE_HOLD_SECONDS say so, and the same reservation asks again. source: names the gateway. expires_at: when the reply
        is due, seconds since the epoch; the tiers may use 70 % of the time until then. lineage: of the hidden states that will
        come, as for `handle`. Raises NotReady.
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
        """Calls `action` with the sequence table between two passes, and returns its result.

        The engine's thread calls it, so it may read KV but should be short. Raises NotReady, and what `action` raises.
        """
        return self._queue.call(lambda: action(self.sequences))

    def release(self, rows: Sequence[ReleaseRow], *, source: str) -> int:
        """Releases sequences and returns how many there were; unknown ones are no error. Raises NotReady.

        source: names the gateway, whose lease every call renews, even one without rows.
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
        """Blocks until `tokens` can be reserved, or the time is over. Reserves nothing and does not say which of both happened.

        source: names the gateway, whose lease this renews. expires_at: seconds since the epoch; this returns after half of the
        time until then, so that the reply is not late.
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
        """Waits until adapters are loaded, at most `seconds`. Rows of one that cannot be are refused by the pass."""

        def claim() -> list[Future[None]]:
            loads = []
            for adapter in wanted:
                with suppress(Refusal):
                    loads.append(self.adapters.claim(adapter))
            return loads

        wait(self._queue.call(claim), None if seconds == math.inf else max(0.0, seconds))

    def _with_adapter(self, row: ReserveRow, reserved: ReservedRow) -> ReservedRow:
        """The reply to a reservation, which also says whether the sequence's adapter is loaded."""
        if not row.adapter or reserved.status is not Status.OK or self.adapters.is_ready(row.adapter):
            return reserved
        if (reason := self.adapters.refusal(row.adapter)) is not None:
            return ReservedRow(row.id, row.attempt, Status.INVALID, reason=reason)
        return replace(reserved, restoring=True)

    def _reserve(
        self, row: ReserveRow, lineage: str | None, source: str, deadline: float
    ) -> tuple[ReservedRow | Restore, "Future[None] | None"]:
        """Reserves memory for a sequence, and begins to load its adapter and to restore the KV that it lacks.

        The engine's thread calls this. If the same reservation is asked again, returns its restore. Also returns the end of the
        adapter's load. deadline: of a new restore, in time.monotonic().
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
        """Releases idle sequences, and all sequences of gateways whose leases have expired: no gateway will release them."""
        lost = self._leases.expired({sequence.source for sequence in self.sequences.by_id.values()})
        if released := self.sequences.expire(lost):
            _log.warning("released %d abandoned sequences; gateways with expired leases: %s", released, sorted(lost) or "none")

    def _work(self) -> None:
        """Runs all queued calls or, if there are none, one pass over the next events. The caller holds the engine's lock.

        An error that escapes here is a defect. The stage then takes no more work, and fails all waiting work.
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
        """Computes the events that have not expired and answers them. The others fail with EventExpired."""
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
        """Runs one pass over all events, or one for each if that raises, so that an event that causes an error fails alone.

        Returns the reply or the error of each event.
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
