"""Continuous batching over a pipeline of stages: the threads and the lock around board and planner.

What happens is simple to say: whoever changes the board, a trip that came back, a door that submits, the watch, the clock, then
asks the planner what to do next, under the one lock, and hands it to threads that do nothing but wait for answers. A thread per
event on its way rather than an event loop: `eventing.http.delivery` is synchronous (it needs less CPU per request than an
asyncio client), each hop's work is waiting in a system call, and no code has to be written twice. The lock is never held over
input or output.
"""

import logging
import math
import secrets
import threading
import time
from collections.abc import Sequence as Items
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from typing import Final

from eventing.problems import InvalidRequest, NotReady, PipelineUnavailable, QueueFull
from eventing.wire.control import ReleaseRow, ReserveRow
from eventing.wire.events import MAX_POSITION
from functions.gateway.scheduling.board import Board, Limits
from functions.gateway.scheduling.job import Job
from functions.gateway.scheduling.next_actions import Action, Planner, Release, Reserve, Wake, Walk
from functions.gateway.scheduling.progress import Progress
from functions.gateway.scheduling.reservation import reserve_at_once, reserve_in_order
from functions.gateway.scheduling.sequence import Sequence, traces_of
from functions.gateway.scheduling.stats import Stats
from functions.gateway.stages.client import ForwardReply, Pipeline, StageFailed
from functions.gateway.stages.routes import Endpoint, Instance, Placement
from functions.gateway.stages.trip import Trip, walk

_log = logging.getLogger(__name__)

_THREADS: Final = 512
"""At most: one for each event on its way. They are made when they are needed."""
_LOOK_AGAIN_SECONDS: Final = 1.0
_CLOSE_SECONDS: Final = 5.0
"""What `close` waits for events on their way."""


class Scheduler:
    """Takes sequences and puts tokens into them. Thread-safe."""

    def __init__(self, pipeline: Pipeline, placement: Placement, limits: Limits) -> None:
        self._pipeline = pipeline
        self._placement = placement
        self._limits = limits
        self._board = Board(placement, limits)
        self._planner = Planner(self._board)
        self._boot = secrets.token_hex(6)
        self._numbers = count()
        self._changed = threading.Condition()
        """The one lock; notified when the clock has to look again and when sequences end."""
        self._draining = False
        self._closed = False
        self._clock_looks_at = math.inf
        self._trips = ThreadPoolExecutor(_THREADS, "trip")
        self._calls = ThreadPoolExecutor(_THREADS, "call")
        """For what a thread of the other pool waits for, so that they cannot wait for each other."""
        self._clock = threading.Thread(target=self._tick, name="scheduler-clock", daemon=True)
        self._clock.start()

    # For doors.

    def submit(self, sequence: Sequence) -> None:
        """Queues `sequence`; its tokens come by themselves. Raises QueueFull, NotReady (draining) or InvalidRequest."""
        reserve_tokens = sequence.prompt_tokens + sequence.max_tokens
        if reserve_tokens > MAX_POSITION:
            raise InvalidRequest(f"{reserve_tokens} tokens of prompt and answer; the most is {MAX_POSITION}")
        with self._changed:
            if self._draining:
                raise NotReady("this gateway is draining and takes no new requests; ask again, another one will answer")
            limit = self._limits.queue_limit + max(0, self._planner.room())
            if self._board.waiting >= limit:
                raise QueueFull(f"{self._board.waiting} requests wait already; ask again later")
            number = next(self._numbers)
            job = Job(sequence, f"{self._boot}-{number}", Progress(self._pipeline.num_stages), reserve_tokens, number)
            sequence.attach(lambda: self._cancelled(job))
            self._board.submit(job)
            self._act()

    def wake(self) -> None:
        """Warm-up events to all stages at once, where any is cold, before a sequence asks for them."""
        with self._changed:
            self._start(list(self._planner.wake(everything=True)))

    def drain(self, timeout_seconds: float) -> bool:
        """Takes no new sequences and waits for those it has; False where some are left when the time is over."""
        with self._changed:
            self._draining = True
            return self._changed.wait_for(lambda: not self._board.jobs, timeout_seconds)

    def close(self) -> None:
        """Ends what is left with NotReady, frees its memory at the stages, and waits for the threads."""
        with self._changed:
            self._draining = True
            for job in list(self._board.jobs):
                self._board.end(job, NotReady("this gateway is shutting down; ask again, another one will answer"))
            self._act()
            self._changed.wait_for(lambda: not self._board.jobs, _CLOSE_SECONDS)
            self._closed = True
            self._changed.notify_all()
        self._clock.join()
        self._trips.shutdown()
        self._calls.shutdown()

    def _cancelled(self, job: Job) -> None:
        with self._changed:
            if job in self._board.jobs:
                self._board.end(job)
                self._act()

    def stats(self) -> Stats:
        """How it stands now."""
        with self._changed:
            board = self._board
            stats = board.stats.snapshot()
            stats.waiting, stats.running = board.waiting, board.running
            stats.micro_batches, stats.trips = len(board.micro_batches), board.trips
            return stats

    # For the watch.

    def endpoints_changed(self, stage: int, endpoints: Items[Endpoint] | None) -> None:
        """All instances of `stage`; None: they cannot be known."""
        with self._changed:
            if endpoints is None:
                self._placement.unwatched(stage)
            else:
                self._placement.update(stage, endpoints)
            self._act()

    # For trips (trip.TripLog).

    def answered(self, trip: Trip, stage: int, reply: ForwardReply, seconds: float) -> list[int]:
        with self._changed:
            return self._board.answered(trip, stage, reply, seconds)

    def broke(self, trip: Trip, failure: StageFailed) -> None:
        _log.warning("a trip with %d sequences broke: %s", len(trip.pieces), failure)
        with self._changed:
            self._board.broke(trip, failure)

    def first_stage_free(self) -> None:
        with self._changed:
            self._act()

    # With the lock held.

    def _act(self) -> None:
        self._start(self._planner.next_actions())

    def _start(self, actions: Items[Action]) -> None:
        for action in () if self._closed else actions:
            self._trips.submit(self._guarded, action)
        due = self._planner.next_due()
        if (due is not None and due < self._clock_looks_at) or not self._board.jobs:
            self._changed.notify_all()

    # In threads.

    def _tick(self) -> None:
        """The clock: looks again when something is due that no reply brings."""
        with self._changed:
            while not self._closed:
                try:
                    self._act()
                    due = self._planner.next_due()
                except Exception:  # noqa: BLE001 - a clock that stopped would be noticed by deadlines that never come
                    _log.exception("the clock failed inside the gateway")
                    due = time.monotonic() + _LOOK_AGAIN_SECONDS
                self._clock_looks_at = math.inf if due is None else due
                self._changed.wait(None if due is None else max(0.0, due - time.monotonic()))

    def _guarded(self, action: Action) -> None:
        try:
            self._do(action)
        except Exception:  # noqa: BLE001 - the end of a thread
            _log.exception("%s failed inside the gateway", type(action).__name__)

    def _do(self, action: Action) -> None:
        match action:
            case Walk(trip):
                self._drive(trip)
            case Reserve():
                self._reserve(action)
            case Release(instance, rows):
                self._release(instance, rows)
            case Wake(stages):
                self._wake(stages)

    def _drive(self, trip: Trip | None) -> None:
        """Walks the trip, then the first that is to be walked next: most of the time its own micro-batch's next step."""
        while trip is not None:
            try:
                walk(trip, self._pipeline, self)
            except Exception as error:  # noqa: BLE001 - its sequences must not wait for ever
                _log.exception("a trip failed inside the gateway")
                self.broke(trip, StageFailed(0, "internal", repr(error), blames=True))
            with self._changed:
                self._board.over(trip)
                actions = self._planner.next_actions()
                walks = [action for action in actions if isinstance(action, Walk)]
                self._start([action for action in actions if action not in walks[:1]])
                trip = walks[0].trip if walks and not self._closed else None

    def _reserve(self, action: Reserve) -> None:
        rows = [ReserveRow(job.id, job.progress.attempt, job.reserve_tokens) for job in action.jobs]
        deadline = max(job.sequence.deadline for job in action.jobs)
        instances = action.micro_batch.route.instances
        traces = traces_of(job.sequence for job in action.jobs)
        if action.one_by_one:
            reservation = reserve_in_order(self._pipeline, instances, rows, deadline, traces)
        else:
            reservation = reserve_at_once(self._pipeline, instances, rows, deadline, traces, self._calls)
        if reservation.failure is not None:
            _log.warning("no memory for %d sequences: %s", len(rows), reservation.failure)
        with self._changed:
            self._board.reserved(action.jobs, reservation)
            self._act()

    def _release(self, instance: Instance, rows: Items[ReleaseRow]) -> None:
        try:
            answerer = self._pipeline.release(instance, rows)
        except StageFailed as failure:
            _log.info("%d sequences are left to expire: %s", len(rows), failure)
            return
        with self._changed:
            self._board.heard(answerer)

    def _wake(self, stages: Items[int]) -> None:
        for future in [self._calls.submit(self._warm_up, stage) for stage in stages]:
            future.result()
        with self._changed:
            self._planner.wake_over()
            self._act()

    def _warm_up(self, stage: int) -> None:
        try:
            url = self._placement.service_urls[stage]
            self._pipeline.warm_up(stage, url, self._limits.cold_start_timeout_seconds)
        except StageFailed as failure:
            _log.info("not awake yet: %s", failure)
            if failure.final:
                with self._changed:
                    self._board.fail_waiting(PipelineUnavailable(str(failure)))
            return
        with self._changed:
            self._placement.woken(stage)
            self._act()
