"""The scheduler: continuous batching over a pipeline of stages. Its public interface, its lock and its threads.

Replies, new requests, changed instances and the clock change the state under one lock. After each change, `decide` makes all
further changes that are possible. Threads send what `decide` returns and wait for the replies, without the lock.

There is a thread for each event in flight rather than an event loop: `eventing.http.delivery` is synchronous, which needs less
CPU for a request than an asyncio client, and a hop's time is spent waiting in a system call.
"""

import copy
import logging
import math
import secrets
import threading
import time
from collections.abc import Iterator
from collections.abc import Sequence as Items
from contextlib import contextmanager, suppress
from itertools import count
from typing import Final

from eventing.problems import InvalidRequest, NotReady, PipelineUnavailable, QueueFull
from eventing.wire.events import MAX_POSITION
from eventing.wire.generation import ProgressEvent
from functions.gateway.scheduling.apply import note_origin, stage_replied
from functions.gateway.scheduling.batching import SchedulerLimits
from functions.gateway.scheduling.decide import Action, decide, next_due
from functions.gateway.scheduling.leases import Release
from functions.gateway.scheduling.pipeline_status import PipelineStatus, pipeline_status, progress_of
from functions.gateway.scheduling.prefix_sharing import PrefixSharing, prompt_chain
from functions.gateway.scheduling.replays import gateway_failed, trip_failed
from functions.gateway.scheduling.reservations import Reserve, reservation_over, reserve_at_once, reserve_in_order
from functions.gateway.scheduling.sequence import Progress, Prompt, Sequence, names_of
from functions.gateway.scheduling.speculation import Drafter, PromptLookup, shared_rates
from functions.gateway.scheduling.state import SchedulerState
from functions.gateway.scheduling.stats import Stats
from functions.gateway.scheduling.token_stream import TokenStream
from functions.gateway.scheduling.waiting import Entering
from functions.gateway.scheduling.wake_up import Wake
from functions.gateway.stages.client import ForwardReply, StageClient, Trip, walk
from functions.gateway.stages.failures import StageFailed
from functions.gateway.stages.routes import Endpoint, Placement
from functions.threads.pool import ThreadPool

_log = logging.getLogger(__name__)

_MAX_THREADS: Final = 512  # one for each event in flight; they start when needed and end when idle
_MAX_CLOCK_SECONDS: Final = 5.0  # the clock decides at least so often
_STUCK_SECONDS: Final = 30.0  # a clock that has not decided for so long is taken for stuck
_MAX_FAILED_DECISIONS: Final = 3  # in a row; then the gateway is taken for broken
_CLOSE_SECONDS: Final = 5.0  # how long `close` waits for releases
_GAVE_WAY: Final = "its client has most requests in the queue, which is full, and another client asked; ask again later"
_SHUTTING_DOWN: Final = "this gateway is shutting down; ask again, another one will answer"


class Scheduler:
    """Computes answers to prompts on the stages, and puts their tokens into streams. Thread-safe. Runs until `close`."""

    def __init__(self, client: StageClient, placement: Placement, limits: SchedulerLimits, sharing: PrefixSharing) -> None:
        self._client = client
        self._limits = limits
        self._sharing = sharing
        self._state = SchedulerState(placement, limits)
        self._changed = threading.Condition()  # the lock; notified when the clock must look again, and when sequences end
        self._shared_rates = shared_rates()
        self._boot = secrets.token_hex(6)
        self._numbers = count()
        self._closing = self._closed = False
        self._walked: set[Trip] = set()  # trips that a thread walks or will walk
        self._releases_in_flight = 0
        self._failed_decisions = 0  # in a row
        self._trips = ThreadPool(_MAX_THREADS, "trip")
        self._calls = ThreadPool(_MAX_THREADS, "call")  # calls that a thread of `_trips` waits for
        self._clock_looked_at = time.monotonic()
        self._clock_looks_at = math.inf
        self._clock = threading.Thread(target=self._tick, name="scheduler-clock", daemon=True)
        self._clock.start()

    # For the APIs.

    @contextmanager
    def entering(self, client_id: str) -> Iterator[None]:
        """Context manager that counts a request as waiting while an API reads it, before `submit`.

        Raises NotReady if the gateway is shutting down, and QueueFull as `submit` does. On exit, raises QueueFull if another
        client's request has taken the place.
        """
        entering = Entering()
        with self._changed:
            self._make_room(client_id)
            self._state.waiting.queue.places.add(client_id, entering)
        try:
            yield
        finally:
            with self._changed:
                self._state.waiting.queue.places.remove(entering)
        if entering.gave_way:
            raise QueueFull(_GAVE_WAY)

    def submit(self, prompt: Prompt) -> TokenStream:
        """Queues a prompt and returns the stream of its answer's tokens.

        Raises QueueFull if too many requests wait already and no other client's request gives way, InvalidRequest if prompt and
        answer are too long, or NotReady if the gateway is shutting down.
        """
        total_tokens = len(prompt.token_ids) + prompt.max_tokens
        if total_tokens > MAX_POSITION:
            raise InvalidRequest(f"{total_tokens} tokens of prompt and answer; the most is {MAX_POSITION}")
        # A prompt that becomes a vector neither finds nor leaves KV: its mean takes all hidden states.
        chain_key, chain = (None, ()) if prompt.pooling else prompt_chain(self._sharing, prompt)
        drafter = None
        if self._limits.draft_tokens and prompt.max_tokens:
            drafter = Drafter(PromptLookup(prompt.token_ids, prompt.predicted_ids), self._shared_rates)
        with self._changed:
            self._make_room(prompt.client_id)
            number = next(self._numbers)
            id_ = f"{self._boot}-{number}"
            stream = TokenStream(
                prompt.max_tokens,
                prompt.eos_ids,
                lambda: self._cancel(id_),
                prompt.arrived,
                prompt.kept_end_ids,
                lambda: self._progress(id_),
            )
            if not prompt.max_tokens and prompt.pooling is None and len(prompt.token_ids) == 1:
                stream.finish("length")  # scores only, and a first token has none
                return stream
            sequence = Sequence(
                id_,
                number,
                prompt,
                stream,
                Progress(self._state.placement.num_stages),
                drafter=drafter,
                chain_key=chain_key,
                chain=chain,
                leaves_kv=prompt.pooling is None and self._sharing.leaves_kv(prompt),
            )
            self._state.add(sequence)
            self._act()
        return stream

    def _cancel(self, id_: str) -> None:
        with self._changed:
            sequence = self._state.sequences.get(id_)
            if sequence is not None:
                self._state.end(sequence)
                self._act()

    def _progress(self, id_: str) -> ProgressEvent | None:
        """Returns what a sequence waits for. None if only for its next token, or if the sequence has ended.

        Also asks starting instances for their progress, so that a later call can report it.
        """
        with self._changed:
            sequence = self._state.sequences.get(id_)
            if sequence is None:
                return None
            self._start(self._state.wake_ups.ask(self._state.placement, time.monotonic()))
            return progress_of(self._state, sequence)

    def wake(self) -> None:
        """Sends warm-up events to all stages if one is cold, so that they start before a request needs them. Does not wait."""
        with self._changed:
            self._start(self._state.wake_ups.begin(self._state.placement, all_stages=True))

    def sick(self) -> str | None:
        """Describes a defect that keeps the scheduler from working, or returns None.

        Takes no lock, because a stuck thread may hold it.
        """
        if self._closed:
            return None
        if not self._clock.is_alive():
            return "the scheduler's clock has ended"
        silent = time.monotonic() - self._clock_looked_at
        if silent > _STUCK_SECONDS:
            return f"the scheduler has been stuck for {silent:.0f} s"
        if self._failed_decisions >= _MAX_FAILED_DECISIONS:
            return "the scheduler fails whenever it decides what is next; its log has the traceback"
        return None

    def close(self) -> None:
        """Ends all sequences with NotReady, releases their memory at the stages, and ends the scheduler's threads.

        Waits at most a few seconds for the releases. Threads that still wait for a stage then end when the sender is closed.
        """
        state = self._state
        with self._changed:
            self._closing = True
            for sequence in list(state.sequences.values()):
                state.end(sequence, NotReady(_SHUTTING_DOWN))
            self._act()
            self._changed.wait_for(
                lambda: not (state.sequences or state.steps or state.releases or self._releases_in_flight), _CLOSE_SECONDS
            )
            self._closed = True
            self._changed.notify_all()
        self._clock.join(_CLOSE_SECONDS)
        self._trips.shutdown()
        self._calls.shutdown()

    def stats(self) -> Stats:
        """Returns a copy of the statistics, with the current numbers of sequences, micro-batches and trips."""
        with self._changed:
            state = self._state
            stats = copy.deepcopy(state.stats)
            stats.waiting, stats.running = len(state.waiting), state.running
            stats.micro_batches, stats.trips = len(state.micro_batches), len(state.steps)
            stats.memory_backlog, stats.wake_ups = len(state.waiting.backlog.sequences), state.wake_ups.rounds
            return stats

    def status(self) -> PipelineStatus:
        with self._changed:
            return pipeline_status(self._state)

    # For the watch.

    def endpoints_changed(self, stage: int, endpoints: Items[Endpoint] | None) -> None:
        """Applies a report of the watch and decides what to send.

        `endpoints` are all instances of `stage`. If it is None, the instances cannot be known, so routes use the Service's URL.
        """
        with self._changed:
            if endpoints is None:
                self._state.placement.unwatched(stage)
            else:
                self._state.placement.update(stage, endpoints)
            self._act()

    # For trips (client.TripLog).

    def replied(self, trip: Trip, stage: int, reply: ForwardReply, seconds: float) -> None:
        with self._changed:
            stage_replied(self._state, self._state.steps[trip], stage, reply, seconds)

    def failed(self, trip: Trip, ids: Items[str], failure: StageFailed) -> None:
        with self._changed:
            step = self._state.steps[trip]
            trip_failed(self._state, step, ids, failure)
        _log.warning("a trip of %s broke: %s", names_of(step.chunks[id_][0] for id_ in ids), failure)

    def first_stage_free(self) -> None:
        with self._changed:
            self._act()

    # With the lock held.

    def _make_room(self, client_id: str) -> None:
        """Makes sure that one more request of this client may wait.

        If the queue is full, another client's request may give way. Raises NotReady if the gateway is shutting down, and
        QueueFull if no request gives way.
        """
        if self._closing:
            raise NotReady(_SHUTTING_DOWN)
        state = self._state
        places, admitted_before = state.waiting.queue.places, state.waiting.admitted_before
        # Sequences that the next decision admits do not count as waiting.
        admissible = state.micro_batches_allowed() * self._limits.micro_batch_sequences - state.running
        capacity = self._limits.queue_limit + max(0, admissible) - admitted_before
        # If the limit falls because instances terminate, requests that wait already keep their places.
        yielding = places.make_room(client_id, 1, max(capacity, places.total))
        if yielding is None:
            raise QueueFull(f"{places.total + admitted_before} requests wait already; ask again later")
        for place in yielding:
            if isinstance(place, Entering):
                place.gave_way = True
            else:
                state.end(place, QueueFull(_GAVE_WAY))

    def _act(self) -> None:
        self._start(self._decide())

    def _decide(self) -> list[Action]:
        """Calls `decide` and returns the actions to carry out.

        If `decide` fails, the state of the sequences is unknown. Then all sequences end, and new ones can be submitted.
        """
        try:
            actions = decide(self._state, time.monotonic())
        except Exception:  # noqa: BLE001 - whichever thread decides has other work to finish
            self._failed_decisions += 1
            sequences = self._state.sequences.values()
            _log.exception("the gateway failed; its %d answers end: %s", len(sequences), names_of(sequences))
            for trip in self._state.steps.keys() - self._walked:  # begun by this decision, so no thread will end them
                if trip.chunks:
                    trip.instances[0].prompts.leave()
                self._state.step_over(trip)
            gateway_failed(self._state, sequences)
            return [*self._state.take_releases()]
        self._failed_decisions = 0
        return actions

    def _start(self, actions: Items[Action]) -> None:
        """Hands the actions to threads. Wakes the clock if something is due before the clock would wake by itself."""
        for action in () if self._closed else actions:
            if isinstance(action, Trip):
                self._walked.add(action)
            elif isinstance(action, Release) and action.rows:
                self._releases_in_flight += 1
            self._trips.submit(self._carry_out, action)
        if not self._state.sequences or next_due(self._state, time.monotonic()) < self._clock_looks_at:
            self._changed.notify_all()

    # In threads.

    def _tick(self) -> None:
        """Runs in the clock's thread: decides when something is due without a reply.

        Such things are a deadline or the end of a back-off.
        """
        with self._changed:
            while not self._closed:
                self._clock_looked_at = time.monotonic()
                try:
                    self._act()
                    self._clock_looks_at = next_due(self._state, time.monotonic())
                except Exception:  # noqa: BLE001 - without a clock no deadline would ever pass
                    _log.exception("the clock failed inside the gateway")
                    self._clock_looks_at = math.inf
                seconds = self._clock_looks_at - time.monotonic()
                self._changed.wait(min(_MAX_CLOCK_SECONDS, max(0.0, seconds)))

    def _carry_out(self, action: Action) -> None:
        try:
            if isinstance(action, Trip):
                self._walk(action)
            elif isinstance(action, Reserve):
                self._reserve(action)
            elif isinstance(action, Release):
                self._release(action)
            elif isinstance(action, Wake):
                self._wake(action)
            else:
                with suppress(StageFailed):  # it does not listen yet
                    reply = self._client.start_so_far(action.instance)
                    with self._changed:
                        self._state.wake_ups.told[action.instance] = reply
        except Exception:  # noqa: BLE001 - the end of a thread
            _log.exception("%s failed inside the gateway", type(action).__name__)

    def _walk(self, trip: Trip | None) -> None:
        """Walks the trip, applies its end, and decides what is next. Repeats this with the first trip that the decision began.

        That trip is mostly the next decode step. Other actions go to other threads. Returns when a decision begins no trip.
        """
        began = time.perf_counter()
        while trip is not None:
            try:
                walk(trip, self._client, self)
            except Exception:  # noqa: BLE001 - no other thread ends this step
                self._end_after_failure([sequence for sequence, _ in self._state.steps[trip].chunks.values()])
            walked = time.perf_counter()
            with self._changed:
                self._walked.discard(trip)
                self._state.step_over(trip)
                actions = self._decide()
                trip = None
                if not self._closed:
                    trip = next((action for action in actions if isinstance(action, Trip)), None)
                if trip is not None:
                    self._walked.add(trip)
                self._start([action for action in actions if action is not trip])
                began = self._state.stats.step_over(began, walked)

    def _end_after_failure(self, sequences: Items[Sequence]) -> None:
        """Ends the sequences of a step or reservation after an unexpected error in the gateway. Call it in an except block."""
        _log.exception("the gateway failed; the answers that it had in hand end: %s", names_of(sequences))
        with self._changed:
            gateway_failed(self._state, sequences)
            self._act()

    def _reserve(self, wanted: Reserve) -> None:
        try:
            if wanted.in_order:
                reservation = reserve_in_order(self._client, wanted)
            else:
                reservation = reserve_at_once(self._client, wanted, self._calls)
            if reservation.failure is not None:
                _log.warning("no memory for %s: %s", names_of(wanted.sequences), reservation.failure)
            with self._changed:
                reservation_over(self._state, wanted, reservation)
                self._act()
        except Exception:  # noqa: BLE001 - no other thread ends this reservation
            self._end_after_failure(wanted.sequences)

    def _release(self, release: Release) -> None:
        try:
            origin = self._client.release(release.instance, release.rows, release.awaited_tokens)
            with self._changed:
                note_origin(self._state, origin)
        except StageFailed as failure:
            if release.rows:
                _log.info("not released: %s: %s", ", ".join(row.id for row in release.rows), failure)
            with self._changed:
                self._state.leases.release_failed(release.instance, release.rows)
        finally:
            with self._changed:
                state = self._state
                self._releases_in_flight -= bool(release.rows)
                if state.backlog_signals.replied(release, state.waiting.backlog, time.monotonic()) or self._closing:
                    self._act()

    def _wake(self, wake: Wake) -> None:
        try:
            for future in [self._calls.submit(self._warm_up, stage) for stage in wake.stages]:
                future.result()
        finally:
            with self._changed:
                self._state.wake_ups.round_over()
                self._act()

    def _warm_up(self, stage: int) -> None:
        try:
            url = self._state.placement.service_urls[stage]
            reply = self._client.warm_up(stage, url, self._limits.cold_start_timeout_seconds)
        except StageFailed as failure:
            _log.info("not awake yet: %s", failure)
            with self._changed:
                self._state.last_failure = failure
                self._state.wake_ups.stage_failed(stage, failure.cause)
                if failure.final:
                    # The stage refuses this gateway, so no waiting sequence can be served.
                    for sequence in list(self._state.waiting):
                        self._state.end(sequence, PipelineUnavailable(str(failure)))
            return
        with self._changed:
            self._state.wake_ups.stage_woke(stage, reply)
            self._state.placement.woken(stage)
            self._act()
