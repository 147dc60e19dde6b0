"""Continuous batching over a pipeline of stages: the threads and the one lock around the board.

What happens is simple to say: whoever changes the board, a trip that came back, a door that submits, the watch, the clock, then
lets everything happen that can happen now, under the one lock, and hands what must be sent to threads that do nothing but wait
for replies. A thread per event on its way rather than an event loop: `eventing.http.delivery` is synchronous (it needs less CPU
per request than an asyncio client), each hop's work is waiting in a system call, and no code has to be written twice. The lock
is never held over input or output.
"""

import logging
import math
import secrets
import threading
import time
from collections.abc import Iterator
from collections.abc import Sequence as Items
from contextlib import contextmanager
from itertools import count
from typing import Final

from eventing.problems import InvalidRequest, NotReady, PipelineUnavailable, QueueFull
from eventing.wire.events import MAX_POSITION
from functions.gateway.scheduling.actions import Action, Release, Reserve, Wake, Walk
from functions.gateway.scheduling.admission import Admission
from functions.gateway.scheduling.board import Board
from functions.gateway.scheduling.capacity import most_waiting
from functions.gateway.scheduling.cold_starts import ColdStarts
from functions.gateway.scheduling.failures import Failures
from functions.gateway.scheduling.limits import Limits
from functions.gateway.scheduling.moves import Moves
from functions.gateway.scheduling.next_steps import NextSteps
from functions.gateway.scheduling.outlook import Outlook, outlook
from functions.gateway.scheduling.prefix_sharing import KeyOf, beginning, nobody
from functions.gateway.scheduling.progress import Progress
from functions.gateway.scheduling.prompt import Prompt
from functions.gateway.scheduling.renewals import Renewals
from functions.gateway.scheduling.replies import Replies
from functions.gateway.scheduling.reservation import reserve_at_once, reserve_in_order
from functions.gateway.scheduling.rooms import Rooms
from functions.gateway.scheduling.sequence import Sequence, named
from functions.gateway.scheduling.speculation import Experience
from functions.gateway.scheduling.stats import Stats
from functions.gateway.scheduling.token_stream import TokenStream
from functions.gateway.scheduling.wake_ups import WakeUps
from functions.gateway.stages.client import ForwardReply, StageClient
from functions.gateway.stages.failures import StageFailed
from functions.gateway.stages.instances import Endpoint
from functions.gateway.stages.routes import Placement
from functions.gateway.stages.trip import Trip, walk
from functions.threads.pool import ThreadPool

_log = logging.getLogger(__name__)

_THREADS: Final = 512
"""At most: one for each event on its way. They are made when they are needed, and end when they are not."""
_LOOK_AGAIN_SECONDS: Final = 5.0
"""The clock looks at least so often, whatever is due, and whatever a deadline says."""
_STUCK_SECONDS: Final = 30.0
"""A clock that has not looked for so long will not look again."""
_MOST_FAILURES: Final = 3
"""Decisions that failed one after the other, until the gateway is taken for broken."""
_CLOSE_SECONDS: Final = 5.0
"""What `close` waits for events on their way."""
_SHUTTING_DOWN: Final = "this gateway is shutting down; ask again, another one will answer"


class Scheduler:
    """Takes prompts and puts tokens into their streams. Thread-safe."""

    def __init__(self, client: StageClient, placement: Placement, limits: Limits, key_of: KeyOf = nobody) -> None:
        self._client = client
        self._key_of = key_of
        self._placement = placement
        self._limits = limits
        self._board = Board(placement, limits)
        self._failures = Failures(self._board)
        self._replies = Replies(self._board, self._failures)
        self._moves = Moves(self._board)
        self._admission = Admission(self._board, self._replies, self._failures)
        self._next_steps = NextSteps(self._board, self._failures)
        self._cold_starts = ColdStarts()
        self._wake_ups = WakeUps(self._board, self._cold_starts)
        self._renewals, self._rooms = Renewals(self._board), Rooms(self._board)
        self._experience = Experience()
        self._boot = secrets.token_hex(6)
        self._numbers = count()
        self._changed = threading.Condition()
        """The one lock; notified when the clock has to look again and when sequences end."""
        self._entering = 0
        self._closing = self._closed = False
        self._walked: set[Trip] = set()
        """Trips that a thread has, or will have."""
        self._failed_in_a_row = self._releases_under_way = 0
        self._clock_looked_at = time.monotonic()
        self._clock_looks_at = math.inf
        self._trips = ThreadPool(_THREADS, "trip")
        self._calls = ThreadPool(_THREADS, "call")
        """For what a thread of the other pool waits for, so that they cannot wait for each other."""
        self._clock = threading.Thread(target=self._tick, name="scheduler-clock", daemon=True)
        self._clock.start()

    # For doors.

    @contextmanager
    def entering(self) -> Iterator[None]:
        """For what a door does with a request before `submit`; it counts as waiting. Raises QueueFull or NotReady (closing)."""
        with self._changed:
            self._check_room()
            self._entering += 1
        try:
            yield
        finally:
            with self._changed:
                self._entering -= 1

    def submit(self, prompt: Prompt) -> TokenStream:
        """Queues a sequence, whose tokens come by themselves. Raises QueueFull, NotReady (closing) or InvalidRequest."""
        reserve_tokens = len(prompt.token_ids) + prompt.max_tokens
        if reserve_tokens > MAX_POSITION:
            raise InvalidRequest(f"{reserve_tokens} tokens of prompt and answer; the most is {MAX_POSITION}")
        key, chain = beginning(self._key_of, prompt)
        drafter = self._experience.drafter(prompt.token_ids, prompt.predicted_ids) if self._limits.draft_tokens else None
        with self._changed:
            self._check_room()
            number = next(self._numbers)
            id_ = f"{self._boot}-{number}"
            stream = TokenStream(
                prompt.max_tokens, prompt.eos_ids, lambda: self._cancel(id_), prompt.arrived, prompt.kept_end_ids
            )
            if not prompt.max_tokens and len(prompt.token_ids) == 1:
                stream.finish("length")  # A first token has no probability.
                return stream
            progress = Progress(self._placement.num_stages)
            self._board.submit(Sequence(id_, number, prompt, stream, progress, drafter=drafter, chain_key=key, chain=chain))
            self._act()
        return stream

    def _cancel(self, id_: str) -> None:
        with self._changed:
            sequence = self._board.sequences.get(id_)
            if sequence is not None:
                self._board.end(sequence)
                self._act()

    def wake(self) -> None:
        """Warm-up events to all stages at once, where any is cold, before a sequence asks for them."""
        with self._changed:
            self._start(self._wake_ups.begin(everything=True))

    def sick(self) -> str | None:
        """What is wrong with the scheduler itself, if anything. Takes no lock: whoever holds it may be what is stuck."""
        if self._closed:
            return None
        if not self._clock.is_alive():
            return "the scheduler's clock has ended"
        silent = time.monotonic() - self._clock_looked_at
        if silent > _STUCK_SECONDS:
            return f"the scheduler has been stuck for {silent:.0f} s"
        if self._failed_in_a_row >= _MOST_FAILURES:
            return "the scheduler fails whenever it decides what is next; its log has the traceback"
        return None

    def close(self) -> None:
        """Ends what is left with NotReady and frees its memory at the stages, for which it waits some seconds at most.

        Threads that wait for a stage even longer end when the sender is closed.
        """
        with self._changed:
            self._closing = True
            for sequence in list(self._board.sequences.values()):
                self._board.end(sequence, NotReady(_SHUTTING_DOWN))
            self._act()
            self._changed.wait_for(lambda: self._board.idle and not self._releases_under_way, _CLOSE_SECONDS)
            self._closed = True
            self._changed.notify_all()
        self._clock.join(_CLOSE_SECONDS)
        self._trips.shutdown()
        self._calls.shutdown()

    def stats(self) -> Stats:
        """How it stands now."""
        with self._changed:
            board = self._board
            stats = board.stats.snapshot()
            stats.waiting, stats.running = len(board.waiting), board.running
            stats.micro_batches, stats.trips = len(board.micro_batches), len(board.steps)
            stats.hungry = len(board.waiting.hungry.sequences)
            return stats

    def outlook(self) -> Outlook:
        with self._changed:
            return outlook(self._board, self._cold_starts)

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

    def replied(self, trip: Trip, stage: int, reply: ForwardReply, seconds: float) -> None:
        with self._changed:
            self._replies.replied(self._board.steps[trip], stage, reply, seconds)

    def failed(self, trip: Trip, ids: Items[str], failure: StageFailed) -> None:
        with self._changed:
            step = self._board.steps[trip]
            self._failures.trip_failed(step, ids, failure)
        _log.warning("a trip of %s broke: %s", named(step.pieces[id_][0] for id_ in ids), failure)

    def first_stage_free(self) -> None:
        with self._changed:
            self._act()

    # With the lock held.

    def _check_room(self) -> None:
        if self._closing:
            raise NotReady(_SHUTTING_DOWN)
        waiting = len(self._board.waiting) + self._entering
        if waiting >= most_waiting(self._limits.queue_limit, self._admission.room()):
            raise QueueFull(f"{waiting} requests wait already; ask again later")

    def _act(self) -> None:
        self._start(self._decide())

    def _decide(self) -> list[Action]:
        """What has to be sent now. Where that fails nobody knows how the sequences stand: they end, and it begins anew."""
        try:
            actions = self._go_on()
        except Exception:  # noqa: BLE001 - whoever decides has something else to do then
            self._failed_in_a_row += 1
            sequences = self._board.sequences.values()
            _log.exception("the gateway failed; its %d answers end: %s", len(sequences), named(sequences))
            for trip in self._board.steps.keys() - self._walked:
                self._never_walked(trip)
            self._failures.broke_inside(sequences)
            return list(self._board.take_releases())
        self._failed_in_a_row = 0
        return actions

    def _never_walked(self, trip: Trip) -> None:
        if trip.chunks:
            trip.instances[0].prompts.leave()
        self._board.step_ends(trip)

    def _go_on(self) -> list[Action]:
        """Everything that can happen now, in this order; what has to be sent for it."""
        now = time.monotonic()
        self._failures.expire(now)
        self._board.waiting.resume(now)
        self._board.close_empty()
        actions: list[Action] = [
            *self._moves.make(now),
            *self._renewals.next(now),
            *self._admission.ask_again(),
            *self._admission.take_in(now),
        ]
        self._failures.choose_trial()
        actions += [Walk(step.trip) for step in self._next_steps.begin(now)]
        actions += [*self._wake_ups.next(now), *self._rooms.next(now)]
        actions += self._board.take_releases()
        return actions

    def _next_due(self) -> float | None:
        """When to look again although nothing has happened, in time.monotonic(); None: never."""
        now = time.monotonic()
        due = [*self._failures.due(), *self._board.waiting.due(), *self._wake_ups.due(), *self._renewals.due()]
        due += [moment for moment in [self._placement.next_resumption()] if moment is not None]
        return min((moment for moment in due if moment > now), default=None)

    def _start(self, actions: Items[Action]) -> None:
        for action in () if self._closed else actions:
            if isinstance(action, Walk):
                self._walked.add(action.trip)
            self._releases_under_way += isinstance(action, Release) and bool(action.rows)
            self._trips.submit(self._guarded, action)
        due = self._next_due()
        if (due is not None and due < self._clock_looks_at) or not self._board.sequences:
            self._changed.notify_all()

    # In threads.

    def _tick(self) -> None:
        """The clock: looks again when something is due that no reply brings."""
        with self._changed:
            while not self._closed:
                self._clock_looked_at = time.monotonic()
                try:
                    self._act()
                    due = self._next_due()
                except Exception:  # noqa: BLE001 - a clock that stopped would be noticed by deadlines that never come
                    _log.exception("the clock failed inside the gateway")
                    due = None
                self._clock_looks_at = math.inf if due is None else due
                left = _LOOK_AGAIN_SECONDS if due is None else due - time.monotonic()
                self._changed.wait(min(_LOOK_AGAIN_SECONDS, max(0.0, left)))

    def _guarded(self, action: Action) -> None:
        try:
            self._do(action)
        except Exception:  # noqa: BLE001 - the end of a thread
            _log.exception("%s failed inside the gateway", type(action).__name__)

    def _do(self, action: Action) -> None:
        match action:
            case Walk(trip):
                self._drive(trip)
            case Reserve(sequences):
                with self._ending(sequences):
                    self._reserve(action)
            case Release():
                self._release(action)
            case Wake(stages):
                self._wake(stages)

    def _drive(self, trip: Trip | None) -> None:
        """Walks the trip, then the first that is to be walked next: most of the time its own micro-batch's next step."""
        began = time.perf_counter()
        while trip is not None:
            with self._ending([sequence for sequence, _ in self._board.steps[trip].pieces.values()]):
                walk(trip, self._client, self)
            walked = time.perf_counter()
            with self._changed:
                self._walked.discard(trip)
                self._board.step_ends(trip)
                actions = self._decide()
                walks = [action for action in actions if isinstance(action, Walk)]
                self._start([action for action in actions if action not in walks[:1]])
                trip = walks[0].trip if walks and not self._closed else None
                if trip is not None:
                    self._walked.add(trip)
                began = self._board.stats.step_over(began, walked)

    @contextmanager
    def _ending(self, sequences: Items[Sequence]) -> Iterator[None]:
        """What nobody expected ends them: they wait for what this thread does, and nobody else will do it."""
        try:
            yield
        except Exception:  # noqa: BLE001 - where a thread, or a step of one, ends
            _log.exception("the gateway failed; the answers that it had in hand end: %s", named(sequences))
            with self._changed:
                self._failures.broke_inside(sequences)
                self._act()

    def _reserve(self, wanted: Reserve) -> None:
        asked = (self._client, wanted.instances, wanted.rows, wanted.deadline, wanted.traces, wanted.peers)
        reservation = reserve_in_order(*asked) if wanted.one_by_one else reserve_at_once(*asked, self._calls)
        if reservation.failure is not None:
            _log.warning("no memory for %s: %s", named(wanted.sequences), reservation.failure)
        with self._changed:
            self._admission.reserved(wanted, reservation)
            self._act()

    def _release(self, release: Release) -> None:
        try:
            origin = self._client.release(release.instance, release.rows, release.awaited_tokens)
            with self._changed:
                self._replies.heard(origin)
        except StageFailed as failure:
            if release.rows:
                _log.info("not released: %s: %s", ", ".join(row.id for row in release.rows), failure)
            with self._changed:
                self._renewals.lost(release.instance, release.rows)
        finally:
            with self._changed:
                self._releases_under_way -= bool(release.rows)
                if self._rooms.over(release, time.monotonic()) or self._closing:
                    self._act()

    def _wake(self, stages: Items[int]) -> None:
        try:
            for future in [self._calls.submit(self._warm_up, stage) for stage in stages]:
                future.result()
        finally:
            with self._changed:
                self._wake_ups.over()
                self._act()

    def _warm_up(self, stage: int) -> None:
        try:
            url = self._placement.service_urls[stage]
            reply = self._client.warm_up(stage, url, self._limits.cold_start_timeout_seconds)
        except StageFailed as failure:
            _log.info("not awake yet: %s", failure)
            with self._changed:
                self._cold_starts.fails(stage, failure.cause)
                if failure.final:
                    self._failures.end_waiting(PipelineUnavailable(str(failure)))
            return
        with self._changed:
            self._cold_starts.ends(stage, reply)
            self._placement.woken(stage)
            self._act()
