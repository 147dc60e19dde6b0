"""The engine of a stage: takes events from many threads, runs them one pass at a time, answers each.

It knows batches and layer groups, no HTTP. Everything that touches KV happens in a turn, which one thread has at a time: who
brings an event while nobody computes takes the turn, which spares two hand-overs between threads; else the engine's own
thread does, and the others wait for their replies. Torch's operators keep threads for each thread that calls them, so there the
engine's thread has every turn.
"""

import logging
import math
import threading
import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final, TypeVar

import numpy as np
from msgspec.structs import replace

from eventing.problems import EventExpired
from eventing.wire.control import LEASE_SECONDS, ROOM_SECONDS, ReleaseRow, ReservedRow, ReserveRow
from eventing.wire.events import Batch, Row, Status, Want
from eventing.wire.prefix_chain import BLOCK_TOKENS
from functions.grammars.compiler import GrammarCompiler
from functions.stage.engine.constraints import Constraints
from functions.stage.engine.event_queue import Call, EventQueue, WaitingEvent
from functions.stage.engine.forward_pass import ForwardPass, Part
from functions.stage.engine.leases import Leases
from functions.stage.engine.remembered import Left
from functions.stage.engine.reuse import MEMORY, ComputeRate, OnReuse
from functions.stage.engine.room import MOST_WAITING, Room
from functions.stage.engine.row_checks import check_event
from functions.stage.engine.sequences import SequenceTable
from functions.stage.engine.threads import PassThreads
from functions.stage.engine.tiers import Gone, Tier, Wanted
from functions.stage.engine.wire_tensors import wire_tensor
from functions.stage.models.floats import DTYPES
from functions.stage.models.kv_ranges import KVRanges
from functions.stage.models.layer_group import LayerGroup

_log: Final = logging.getLogger(__name__)

T = TypeVar("T")

_RESTORING_SHARE: Final = 0.7
"""Of the time that a reservation is waited for: all its rows ask the tiers in it, one after the other."""


@dataclass(frozen=True, slots=True)
class PassStatistics:
    """What one pass was like. Given to `on_pass` in the turn, after the replies are there."""

    queue_seconds: tuple[float, ...]
    """How long each merged event waited."""
    compute_seconds: float
    tokens: int
    rows: tuple[Status, ...]
    """The status of every row answered."""


def _ignore(_: object) -> None:
    pass


class Engine:
    """Runs a layer group.

    num_stages: of the pipeline; bounds merging (see EventQueue). max_merge: most events in one pass.
    idle_sequence_seconds: a sequence not heard of for so long is released. lease_seconds: so is all of a source of which
    nothing at all was heard. most_awaiting_room: see `Room`. threads: of a pass; None: as the group has it. tiers: asked, in
    this order, for what memory does not hold. rate: told of passes. grammars: of a last stage, whose answers may have one.
    wire_dtype: I8 where hidden states travel in 8 bits; None: as the group has them. clock: seconds since the epoch, by which
    events expire and sequences are idle.
    """

    def __init__(
        self,
        group: LayerGroup,
        *,
        num_stages: int,
        max_merge: int,
        idle_sequence_seconds: float,
        lease_seconds: float = LEASE_SECONDS,
        most_awaiting_room: int = MOST_WAITING,
        threads: PassThreads | None = None,
        tiers: Sequence[Tier] = (),
        rate: ComputeRate | None = None,
        grammars: GrammarCompiler | None = None,
        wire_dtype: str | None = None,
        on_evicted: Callable[[Left], None] | None = None,
        clock: Callable[[], float] = time.time,
        on_pass: Callable[[PassStatistics], None] = _ignore,
        on_reuse: OnReuse = _ignore,
    ) -> None:
        self._group = group
        self._wire_dtype = wire_dtype or group.hidden_dtype
        self._clock = clock
        self._on_pass = on_pass
        self._queue = EventQueue(num_stages, max_merge)
        self._on_reuse = on_reuse
        self.rate = rate or ComputeRate()
        self._sequences = SequenceTable(group.kv, idle_sequence_seconds, clock)
        self._sequences.memory.on_found = lambda tokens: on_reuse(self.rate.reuse(MEMORY, tokens))
        self._room = Room(lambda: self.free_tokens, most_awaiting_room)
        self._forward_pass = ForwardPass(group, self._sequences, Constraints(grammars), self._wire_dtype)
        self._leases = Leases(lease_seconds)
        self._look_seconds = min(self._leases.look_seconds, idle_sequence_seconds / 10)
        self._threads = threads
        self._tiers = tuple(tiers)
        if on_evicted is not None:
            self._sequences.memory.on_evicted = on_evicted
        self._pass_began: float | None = None
        self._turn = threading.Lock()
        self._thread = threading.Thread(target=self._serve, name="engine", daemon=True)

    @property
    def free_tokens(self) -> int:
        """KV tokens that can still be reserved."""
        return self._sequences.memory.free_tokens

    @property
    def kv_resident_bytes(self) -> int:
        """Of the memory for keys and values, what has been used once."""
        return self._group.kv.resident_bytes

    @property
    def remembers(self) -> bool:
        """What ended sequences held is found by others."""
        return self._sequences.memory.remembers

    @property
    def remembered_tokens(self) -> int:
        """KV tokens of ended sequences."""
        return self._sequences.memory.tokens

    @property
    def sequences(self) -> int:
        """Sequences that have KV reserved."""
        return len(self._sequences)

    @property
    def runs_by(self) -> str:
        """What computes the layers; see `LayerGroup`."""
        return self._group.runs_by

    def start(self) -> None:
        self._thread.start()

    def drain(self) -> None:
        """Nobody waits here for room any more: there are other instances."""
        self._room.close()

    def stop(self, *, drain: bool = True) -> None:
        """Takes no more work and ends the thread; without `drain`, what waits is answered NotReady."""
        self.drain()
        if drain:
            self._queue.close()
        else:
            self._queue.abandon()
        self._thread.join()
        with self._turn:  # Somebody who brought an event may still compute.
            pass

    def alive(self, stuck_after_seconds: float) -> bool:
        """False once the thread is dead or one pass has taken longer than `stuck_after_seconds`."""
        began = self._pass_began
        stuck = began is not None and time.perf_counter() - began > stuck_after_seconds
        return self._thread.is_alive() and not stuck

    def handle(self, batch: Batch, *, source: str, expires_at: float | None = None) -> Batch:
        """The reply to one forward event; blocks until its pass is done. Call it from any thread.

        source: of the event; a sequence belongs to the source that began it. expires_at: seconds since the epoch.
        Raises MalformedEvent, EventTooLarge, EventExpired, NotReady, and whatever the layer group raised on this event.
        """
        self._leases.heard(source)
        check_event(batch, self._group, self._wire_dtype)
        event = WaitingEvent(batch, source, expires_at, arrived=time.perf_counter())
        if self._group.shares_work and self._turn.acquire(blocking=False):
            try:
                self._queue.put(event, wakes=False)
                self._do(self._queue.take())
            finally:
                self._turn.release()
                self._queue.wake()
        else:
            self._queue.put(event)
        return event.reply.result()

    def reserve(self, rows: Sequence[ReserveRow], *, source: str, expires_at: float | None = None) -> list[ReservedRow]:
        """ok, full, stale or invalid for each, and what is held; the reserved ones stay reserved if others do not fit.

        What memory does not hold the tiers are asked for, in this thread, for a share of the time until `expires_at`, seconds
        since the epoch: the reply has to be there by then. Raises NotReady.
        """
        self._leases.heard(source)
        until = math.inf if expires_at is None else time.monotonic() + _RESTORING_SHARE * (expires_at - self._clock())
        reserved = self._call(lambda: [self._sequences.reserve(row, source) for row in rows])
        return [self._restored(row, own, source, until) for row, own in zip(rows, reserved, strict=True)]

    def with_sequences(self, action: Callable[[SequenceTable], T]) -> T:
        """Runs `action` on the engine's thread, between two passes: what is held can be read there. Raises NotReady."""
        return self._call(lambda: action(self._sequences))

    def _restored(self, row: ReserveRow, reserved: ReservedRow, source: str, until: float) -> ReservedRow:
        for tier in self._tiers:
            if reserved.status is not Status.OK or reserved.held >= BLOCK_TOKENS * len(row.digests):
                break
            wanted = Wanted(
                row.digests,
                reserved.held,
                partial(self._at, row, source),
                sequence=(row.id, row.attempt, source),
                peers=row.peers,
                draws_by_tokens=bool(row.token_ids),
                until=until,
            )
            began = time.perf_counter()
            try:
                held = tier.restore(wanted)
            except Gone:
                break
            if held > reserved.held:
                self._on_reuse(self.rate.reuse(tier.name, held - reserved.held, time.perf_counter() - began))
                reserved = replace(reserved, held=held)
        return reserved

    def _at(self, row: ReserveRow, source: str, action: Callable[[KVRanges, int], int]) -> int:
        def act() -> int:
            handle = self._sequences.handle(row.id, row.attempt, source)
            if handle is None or not isinstance(self._group.kv, KVRanges):
                raise Gone(row.id)
            return action(self._group.kv, handle)

        return self._call(act)

    def _call(self, action: Callable[[], T]) -> T:
        call = Call(action)
        self._queue.call(call)
        result: T = call.reply.result()
        return result

    def release(self, rows: Sequence[ReleaseRow], *, source: str) -> int:
        """How many sequences were released; an unknown one is no error. No rows: `source` lives. Raises NotReady."""
        self._leases.heard(source)
        return self._call(lambda: sum(self._release(row, source) for row in rows))

    def await_room(self, tokens: int, *, source: str, expires_at: float | None = None) -> None:
        """Returns when `tokens` can be reserved, or soon enough for a reply before `expires_at`. Nothing is reserved by it."""
        self._leases.heard(source)
        left = math.inf if expires_at is None else (expires_at - self._clock()) / 2
        self._room.wait(tokens, min(ROOM_SECONDS, left))

    def warm_up(self) -> None:
        """Runs one token through everything, so that the first event finds all kernels ready."""
        source, row_id = "warm-up", "warm-up"
        tensor = None
        if self._group.first_layer > 0:
            dtype = self._group.hidden_dtype
            tensor = wire_tensor(np.zeros((1, self._group.hidden_size), DTYPES[dtype]), dtype, self._wire_dtype)
        row = Row(row_id, attempt=0, position=0, length=1, want=Want.TOKEN, reserve_tokens=1)
        self.handle(Batch((row,), memoryview(array("i", [0])), tensor), source=source)
        self.release([ReleaseRow(row_id, attempt=0)], source=source)

    def _release(self, release: ReleaseRow, source: str) -> bool:
        self._queue.mark_released(release.id, release.attempt, source)
        return self._sequences.release(release, source)

    def _serve(self) -> None:
        last_look = self._clock()
        try:
            while self._queue.wait(self._look_seconds):
                with self._turn:
                    if self._clock() - last_look >= self._look_seconds:
                        last_look = self._clock()
                        self._expire()
                    self._do(self._queue.take())
        finally:
            self._queue.abandon()

    def _do(self, work: Sequence[Call | WaitingEvent]) -> None:
        """In a turn. What it raises nobody expected: the stage takes nothing more, and nobody waits for it for ever."""
        try:
            self._answer([event for event in work if isinstance(event, WaitingEvent)])
            for call in work:
                if isinstance(call, Call):
                    _settle(call)
            self._room.look()
        except BaseException:
            self._queue.abandon(in_hand=work)
            raise

    def _expire(self) -> None:
        """Frees what nobody will ever release: idle sequences, and all of gateways that are gone."""
        gone = self._leases.look(self._sequences.sources())
        if released := self._sequences.expire(gone):
            _log.warning(
                "released %d sequences of nobody; gateways not heard of any more: %s", released, sorted(gone) or "none"
            )

    def _answer(self, events: list[WaitingEvent]) -> None:
        """Runs what has not expired, and settles every event's reply."""
        if not events:
            return
        now = self._clock()
        current = [event for event in events if event.expires_at is None or event.expires_at > now]
        began = self._pass_began = time.perf_counter()
        self._set_threads(began)
        outcomes = self._run(current)
        self._pass_began = None
        if self._threads is not None:
            self._threads.end(began, time.perf_counter())
        # Ahead of the replies: whoever gets one may send the sequence's next step at once.
        self._queue.done(events)
        for event in set(events).difference(current):
            event.reply.set_exception(EventExpired("the event expired before its turn came"))
        for event, outcome in zip(current, outcomes, strict=True):
            if isinstance(outcome, Batch):
                event.reply.set_result(outcome)
            else:
                event.reply.set_exception(outcome)
        if current:
            self._report(current, outcomes, began)

    def _set_threads(self, now: float) -> None:
        if self._threads is not None:
            self._group.use_threads(self._threads.begin(now))

    def _run(self, events: list[WaitingEvent]) -> list[Batch | Exception]:
        """One pass over all; where that raises, one for each, so that a poisoned event fails alone."""
        if not events:
            return []
        try:
            return [*self._forward_pass.run([Part(event.batch, event.source, event.stale) for event in events])]
        except Exception as error:  # noqa: BLE001 - the sender of the event gets it; the engine serves on
            _log.exception("a pass failed: %s", ", ".join(row.id for event in events for row in event.batch.rows))
            if len(events) == 1:
                return [error]
        return [outcome for event in events for outcome in self._run([event])]

    def _report(self, events: Sequence[WaitingEvent], outcomes: Sequence[Batch | Exception], began: float) -> None:
        replies = [outcome for outcome in outcomes if isinstance(outcome, Batch)]
        for row in (row for reply in replies for row in reply.rows if row.status is Status.INVALID):
            _log.info("%s is refused: %s", row.id, row.reason)
        seconds, tokens = time.perf_counter() - began, sum(len(event.batch.token_ids) for event in events)
        self.rate.computed(tokens, seconds)
        self._on_pass(
            PassStatistics(
                queue_seconds=tuple(began - event.arrived for event in events),
                compute_seconds=seconds,
                tokens=tokens,
                rows=tuple(row.status for reply in replies for row in reply.rows),
            )
        )


def _settle(call: Call) -> None:
    try:
        call.reply.set_result(call.action())
    except Exception as error:  # noqa: BLE001 - whoever waits for the call gets it
        call.reply.set_exception(error)
