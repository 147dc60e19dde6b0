"""A gateway in virtual time: the product's own scheduler, whose actions reach simulated pods instead of threads and sockets.

Admission, routes, micro-batches, steps, migrations, retries and wake-ups are those of `functions/gateway/scheduling`, because
they are its code. What is replaced is what its threads do: `_start` and `_tick` of `Scheduler`.
"""

import math
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from threading import Event
from typing import Final

from bench.evaluation.clock import Clock
from bench.evaluation.fleet import Fleet, Pod
from eventing.http.delivery import Sender
from eventing.wire.control import ReserveReply, WarmupReply
from eventing.wire.events import Batch, Row, Status
from functions.gateway.scheduling.apply import note_origin
from functions.gateway.scheduling.batching import SchedulerLimits
from functions.gateway.scheduling.decide import Action, next_due
from functions.gateway.scheduling.leases import Release
from functions.gateway.scheduling.prefix_sharing import PrefixSharing
from functions.gateway.scheduling.reservations import Reserve, combined, reservation_over
from functions.gateway.scheduling.scheduler import Scheduler
from functions.gateway.scheduling.wake_up import Wake
from functions.gateway.stages.client import ForwardReply, PipelineIdentity, ReplyOrigin, StageClient, Trip
from functions.gateway.stages.failures import StageFailed
from functions.gateway.stages.routes import Instance, Placement

_NO_BODY: Final = memoryview(b"")


@dataclass(frozen=True, slots=True)
class Hops:
    """What an event costs between gateway and pod. A hop is a reply and the request to the next stage."""

    hop_seconds: float = 0.001  # of a hop without hidden states
    hop_token_seconds: float = 0.0  # for each token whose hidden states travel

    def leg(self, tokens: int) -> float:
        """Seconds of one way, with the hidden states of so many tokens."""
        return (self.hop_seconds + tokens * self.hop_token_seconds) / 2


class SimulatedGateway(Scheduler):
    """One gateway before the pods of all stages."""

    def __init__(
        self, clock: Clock, fleets: Sequence[Fleet], limits: SchedulerLimits, hops: Hops, name: str = "gateway"
    ) -> None:
        self._virtual, self._fleets, self._hops, self._name = clock, fleets, hops, name
        self._entering: defaultdict[Instance, deque[tuple[Event, Callable[[], object]]]] = defaultdict(deque)
        self.tokens_sent = 0  # tokens whose hidden states left a pod or a gateway, once for each way
        placement = Placement([f"http://{fleet.kind.index}" for fleet in fleets], watched=True)
        client = StageClient(Sender(), PipelineIdentity("", "", name, ()), 60.0)  # never asked
        super().__init__(client, placement, limits, PrefixSharing("simulated", "pipeline"))
        for fleet in fleets:
            self.endpoints_changed(fleet.kind.index, fleet.endpoints())

    def _tick(self) -> None:
        """The clock's thread ends at once: `_start` looks at the virtual clock."""

    def _start(self, actions: Sequence[Action]) -> None:
        for action in actions:
            if isinstance(action, Trip):
                self._walked.add(action)
                self._send(action, 0, action.batch)
            elif isinstance(action, Reserve):
                self._ask(action, [])
            elif isinstance(action, Release):
                self._send_release(action)
            elif isinstance(action, Wake):
                waiting = set(action.stages)
                for stage in action.stages:
                    self._fleets[stage].await_pod(partial(self._woke, stage, waiting))
        due = next_due(self._state, self._virtual.now)
        if due < self._clock_looks_at:
            self._clock_looks_at = due
            self._virtual.after(due - self._virtual.now, partial(self._look, due))

    def _look(self, due: float) -> None:
        if due == self._clock_looks_at:
            self._clock_looks_at = math.inf
            self._act()

    def _pod(self, instance: Instance) -> Pod | None:
        """None: it is gone, or its process is starting again."""
        pod = self._fleets[instance.stage].pods.get(instance.url)
        return pod if pod is not None and pod.ready else None

    def _request(self, pod: Pod, seconds: float, arrived: Callable[[], object]) -> None:
        """queue-proxy counts a request while it is at the pod and for one of its two ways."""
        pod.count(1)
        self._virtual.after(seconds, arrived)

    def _origin(self, instance: Instance, pod: Pod) -> ReplyOrigin:
        lineage = f"{instance.stage + 1:016x}"  # all pods of a stage compute the same bits
        before = f"{instance.stage:016x}" if instance.stage else ""
        return ReplyOrigin(instance, f"{pod.name}-{pod.boot}", pod.kv.free_tokens, before, lineage)

    # Trips, as `walk` of the gateway's client makes them.

    def _send(self, trip: Trip, stage: int, batch: Batch) -> None:
        instance = trip.instances[stage]
        sent = self._virtual.now
        instance.in_flight.__enter__()
        pod = self._pod(instance)
        if pod is None:
            refused = StageFailed(stage, "refused", f"{instance.url} is gone")
            self._virtual.after(self._hops.leg(0), partial(self._replied, trip, stage, None, sent, refused, 0.0))
            return
        tokens = len(batch.token_ids) if stage else 0
        self.tokens_sent += tokens
        reply = partial(self._at_pod, trip, stage, pod, sent)
        self._request(pod, self._hops.leg(tokens), partial(pod.forward, batch, self._name, reply))

    def _at_pod(self, trip: Trip, stage: int, pod: Pod, sent: float, reply: Batch | StageFailed, engine_seconds: float) -> None:
        pod.count(-1)
        carries = not isinstance(reply, StageFailed) and stage < len(trip.instances) - 1
        tokens = len(reply.token_ids) if carries and isinstance(reply, Batch) else 0
        self.tokens_sent += tokens
        answer = partial(self._replied, trip, stage, pod, sent, reply, engine_seconds, pod.last_pass)
        self._virtual.after(self._hops.leg(tokens), answer)

    def _replied(
        self,
        trip: Trip,
        stage: int,
        pod: Pod | None,
        sent: float,
        reply: Batch | StageFailed,
        engine_seconds: float,
        last_pass: tuple[float, int] = (0.0, 0),
    ) -> None:
        """last_pass: seconds and tokens of the pass that computed the reply."""
        instance = trip.instances[stage]
        instance.in_flight.__exit__()
        ids = [row.id for row in trip.batch.rows] if isinstance(reply, StageFailed) else [row.id for row in reply.rows]
        try:
            if isinstance(reply, StageFailed) or pod is None:
                raise reply if isinstance(reply, StageFailed) else StageFailed(stage, "refused", instance.url)
            seconds = self._virtual.now - sent
            origin = self._origin(instance, pod)
            self.replied(trip, stage, ForwardReply(origin, reply, _NO_BODY, seconds, engine_seconds, *last_pass), seconds)
        except StageFailed as failure:
            self.failed(trip, ids, failure)
            self._over(trip, stage)
            return
        going = [row for row in reply.rows if row.status is Status.OK]
        if not going or stage == trip.depth:
            self._over(trip, stage)
            return
        batch = reply if len(going) == len(reply.rows) else _only(reply, going)
        if not trip.chunks:
            self._send(trip, stage + 1, batch)
            return
        # Chunks enter the next stage one after the other, and queue there before they leave this one.
        entered = trip.instances[stage + 1]
        turn = entered.prompts.queue()
        self._leave(instance)
        self._enter(entered, turn, partial(self._next_stage, trip, stage + 1, batch))

    def _next_stage(self, trip: Trip, stage: int, batch: Batch) -> None:
        if stage == 1:
            self.first_stage_free()
        self._send(trip, stage, batch)

    def _enter(self, instance: Instance, turn: Event, then: Callable[[], object]) -> None:
        if turn.is_set():
            then()
        else:
            self._entering[instance].append((turn, then))

    def _leave(self, instance: Instance) -> None:
        instance.prompts.leave()
        waiting = self._entering[instance]
        if waiting and waiting[0][0].is_set():
            self._virtual.after(0.0, waiting.popleft()[1])

    def _over(self, trip: Trip, stage: int) -> None:
        if trip.chunks:
            self._leave(trip.instances[stage])
        self._walked.discard(trip)
        self._state.step_over(trip)
        self._act()

    # Reservations, releases, wake-ups.

    def _ask(self, wanted: Reserve, replies: list[tuple[ReplyOrigin, ReserveReply] | StageFailed]) -> None:
        """Asks all instances, or the next one after each reply."""
        asked = wanted.instances[len(replies) :][: 1 if wanted.in_order else None]
        for instance in asked:
            pod = self._pod(instance)
            if pod is None:
                gone = StageFailed(instance.stage, "refused", f"{instance.url} is gone")
                self._virtual.after(self._hops.leg(0), partial(self._reserved, wanted, replies, None, gone))
                continue
            reserve = partial(self._reserve_at, wanted, replies, instance, pod)
            self._request(pod, self._hops.leg(0), partial(pod.call, reserve))

    def _reserve_at(
        self, wanted: Reserve, replies: list[tuple[ReplyOrigin, ReserveReply] | StageFailed], instance: Instance, pod: Pod
    ) -> None:
        if not pod.ready:
            pod.count(-1)
            gone = StageFailed(instance.stage, "refused", f"{instance.url} is gone")
            self._virtual.after(self._hops.leg(0), partial(self._reserved, wanted, replies, None, gone))
            return
        peers = self._fleets[instance.stage].pods
        urls = wanted.peers.get(instance, ())
        holder = next((peers[url] for url in urls if url in peers), None)
        reserved = [pod.reserve(row, self._name, holder) for row in wanted.rows]

        def reply() -> None:
            pod.count(-1)
            rows = tuple(pod.so_far(row, self._name) for row, _ in reserved)
            remembers = not math.isinf(pod.kind.handover_seconds)
            answer = self._origin(instance, pod), ReserveReply(rows, remembers)
            self._virtual.after(self._hops.leg(0), partial(self._reserved, wanted, replies, answer, None))

        self._virtual.after(max(hold for _, hold in reserved), reply)

    def _reserved(
        self,
        wanted: Reserve,
        replies: list[tuple[ReplyOrigin, ReserveReply] | StageFailed],
        answer: tuple[ReplyOrigin, ReserveReply] | None,
        failure: StageFailed | None,
    ) -> None:
        found = answer or failure
        assert found is not None
        replies.append(found)
        in_order = sorted(replies, key=lambda each: each.stage if isinstance(each, StageFailed) else each[0].instance.stage)
        reservation = combined(in_order, len(wanted.rows))
        refused = reservation.failure is not None or all(status is not Status.OK for status in reservation.statuses)
        if len(replies) < len(wanted.instances) and not (wanted.in_order and refused):
            if wanted.in_order:
                self._ask(wanted, replies)
            return
        reservation_over(self._state, wanted, reservation)
        self._act()

    def _send_release(self, release: Release) -> None:
        pod = self._pod(release.instance)
        if pod is None:
            self._virtual.after(self._hops.leg(0), partial(self._released, release, None))
            return

        def answered() -> None:
            pod.count(-1)
            self._virtual.after(self._hops.leg(0), partial(self._released, release, pod if pod.ready else None))

        def at_pod() -> None:
            pod.release(release.rows, self._name)
            if release.awaited_tokens:
                pod.await_memory(release.awaited_tokens, answered)
            else:
                answered()

        self._request(pod, self._hops.leg(0), partial(pod.call, at_pod))

    def _released(self, release: Release, pod: Pod | None) -> None:
        state = self._state
        if pod is None:
            state.leases.release_failed(release.instance, release.rows)
        else:
            note_origin(state, self._origin(release.instance, pod))
        if state.backlog_signals.replied(release, state.waiting.backlog, self._virtual.now):
            self._act()

    def _woke(self, stage: int, waiting: set[int]) -> None:
        self._state.wake_ups.stage_woke(stage, WarmupReply(""))
        self._state.placement.woken(stage)
        waiting.discard(stage)
        if not waiting:
            self._state.wake_ups.round_over()
        self._act()


def _only(batch: Batch, going: Sequence[Row]) -> Batch:
    tokens = sum(row.length for row in going)
    return Batch(tuple(going), batch.token_ids[:tokens])
