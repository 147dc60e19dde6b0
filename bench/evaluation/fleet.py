"""The pods of one stage in the simulator: their queues, passes and memory, and the autoscaler that adds and removes them.

What a pod decides is decided by the stage's own code: which events a pass merges (`EventQueue`), which rows it computes and
which sequences get memory (`SequenceTable`). Only the computation is replaced, by the seconds of a profile.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

from bench.evaluation.clock import Clock
from eventing.wire.control import HOLD_SECONDS, RESTORE_HOLD_SECONDS, ReleaseRow, ReservedRow, ReserveRow
from eventing.wire.events import Batch, Result, Row, Status, Want
from functions.configuration.pass_times import PassTimes, pairs
from functions.gateway.stages.failures import StageFailed
from functions.gateway.stages.routes import Endpoint
from functions.stage.engine.event_queue import EventQueue, ForwardEvent
from functions.stage.engine.sequences import MAX_MEMORY_WAITERS, Refusal, SequenceTable
from functions.stage.models.kv_cache import KVBudget
from knative.local.autoscaler.hpa import HpaRevisionAutoscaler
from knative.local.autoscaler.kpa import TICK_SECONDS
from knative.local.autoscaler.revision_autoscaler import revision_autoscaler
from knative.local.autoscaler.revision_settings import RevisionSettings
from knative.local.kubelet.pods import PodTiming

SCRAPE_SECONDS: Final = 1.0
_MAX_MERGE: Final = 4  # the default of LAMINA_MAX_MERGE
_DRAWN: Final = Result((1,))


@dataclass(frozen=True, slots=True)
class StageKind:
    """What all pods of a stage have in common."""

    index: int
    num_stages: int
    times: PassTimes
    pass_seconds: float  # of every pass, beyond its profile
    kv_tokens: int  # that a pod holds
    start_seconds: float  # of a pod, with its weights
    handover_seconds: float  # for each token of KV that a pod fetches from another one; infinite: it computes them again


@dataclass(eq=False, slots=True)
class Pod:
    """One pod of a stage. It computes one pass at a time; other requests are served between two passes."""

    clock: Clock
    kind: StageKind
    name: str
    number: int  # in place of a process id
    slowness: float = 1.0  # factor of the seconds of its passes
    ready: bool = False
    leaving: bool = False
    boot: int = 0
    busy_seconds: float = 0.0
    last_pass: tuple[float, int] = (0.0, 0)  # seconds and tokens of the pass that the replies under way report
    passes: int = 0
    in_flight: int = 0  # requests
    request_seconds: float = 0.0  # sum over requests of the time that each was in flight
    counted_at: float = 0.0
    quiet_since: float = 0.0
    queue: EventQueue = field(init=False)
    kv: KVBudget = field(init=False)
    sequences: SequenceTable = field(init=False)
    computing: bool = False
    _between: list[Callable[[], object]] = field(default_factory=list)
    _replies: dict[ForwardEvent, tuple[float, Callable[[Batch | StageFailed, float], object]]] = field(default_factory=dict)
    _waiters: list[tuple[int, Callable[[], object]]] = field(default_factory=list)  # tokens that each waits for
    _restored_at: dict[str, float] = field(default_factory=dict)  # by sequence, when its KV has come
    _link_free_at: float = 0.0  # sequences' KV comes over the pod's link one after the other

    def __post_init__(self) -> None:
        self._forget()

    def _forget(self) -> None:
        self.queue = EventQueue(self.kind.num_stages, _MAX_MERGE)
        self.kv = KVBudget(self.kind.kv_tokens)
        self.sequences = SequenceTable(self.kv, math.inf, lambda: self.clock.now)

    # What queue-proxy counts.

    def count(self, requests: int) -> None:
        now = self.clock.now
        self.request_seconds += self.in_flight * (now - self.counted_at)
        self.counted_at = now
        self.in_flight += requests
        if requests > 0:
            self.quiet_since = now

    # Requests.

    def forward(self, batch: Batch, source: str, reply: Callable[[Batch | StageFailed, float], object]) -> None:
        """reply: is called with the reply and the seconds since now, at the end of the pass."""
        if not self.ready:
            reply(StageFailed(self.kind.index, "refused", f"{self.name} is not running"), 0.0)
            return
        event = ForwardEvent(batch, source, lineage="")
        self._replies[event] = self.clock.now, reply
        self.queue.put(event, wakes=False)
        if not self.computing:
            self._begin_pass()

    def call(self, action: Callable[[], object]) -> None:
        """Calls `action` when no pass runs."""
        if self.computing:
            self._between.append(action)
        else:
            action()

    def reserve(self, row: ReserveRow, source: str, holder: "Pod | None") -> tuple[ReservedRow, float]:
        """The reply, and the seconds for which the pod holds it. holder: has KV of the sequence, which this pod fetches."""
        reserved = self.sequences.reserve(row, source, "")
        sequence = self.sequences.get(row.id, source)
        if reserved.status is not Status.OK or sequence is None or math.isinf(self.kind.handover_seconds):
            return reserved, 0.0
        now = self.clock.now
        fetched = row.id in self._restored_at or self.held(row.id, source)
        if holder is not None and not fetched and (there := holder.held(row.id, source)):
            self._link_free_at = max(now, self._link_free_at) + there * self.kind.handover_seconds
            self._restored_at[row.id] = self._link_free_at
            self.clock.after(self._link_free_at - now, partial(self._restored, row.id, source, there))
        hold = min(RESTORE_HOLD_SECONDS, max(0.0, self._restored_at.get(row.id, now) - now))
        return reserved, hold

    def so_far(self, reserved: ReservedRow, source: str) -> ReservedRow:
        """The reply as it is when it is sent."""
        restoring = self._restored_at.get(reserved.id, 0.0) > self.clock.now
        return ReservedRow(reserved.id, reserved.attempt, reserved.status, self.held(reserved.id, source), restoring=restoring)

    def held(self, id_: str, source: str) -> int:
        sequence = self.sequences.get(id_, source)
        return 0 if sequence is None else self.kv.length(sequence.handle)

    def _restored(self, id_: str, source: str, tokens: int) -> None:
        self._restored_at.pop(id_, None)
        sequence = self.sequences.get(id_, source)
        if sequence is not None and not self.kv.length(sequence.handle):
            self.kv.extend(sequence.handle, min(tokens, self.kv.reserved(sequence.handle)))

    def release(self, rows: Sequence[ReleaseRow], source: str) -> None:
        for row in rows:
            self.sequences.release(row, source)
        waiting, self._waiters = self._waiters, []
        for tokens, reply in waiting:
            self.await_memory(tokens, reply)

    def await_memory(self, tokens: int, reply: Callable[[], object]) -> None:
        """Calls `reply` when `tokens` could be reserved, after HOLD_SECONDS, or at once if too many wait already."""
        if self.kv.free_tokens >= tokens or len(self._waiters) >= MAX_MEMORY_WAITERS:
            reply()
            return
        waiter = tokens, reply
        self._waiters.append(waiter)
        self.clock.after(HOLD_SECONDS, partial(self._waited, waiter))

    def _waited(self, waiter: tuple[int, Callable[[], object]]) -> None:
        if waiter in self._waiters:
            self._waiters.remove(waiter)
            waiter[1]()

    # Passes.

    def _begin_pass(self) -> None:
        between, self._between = self._between, []
        for action in between:
            action()
        events = self.queue.take()[1]
        if not events:
            return
        times, tokens, paired, held, draws = self.kind.times, 0, 0.0, 0, 0
        rows_of: list[list[Row]] = []
        for event in events:
            rows = []
            for row in event.batch.rows:
                try:
                    self.sequences.admit(row, event.source, "")
                except Refusal as refusal:
                    rows.append(Row(row.id, row.attempt, row.position, 0, status=refusal.status, held=refusal.held))
                    continue
                rows.append(row)
                tokens += row.length
                paired += pairs(row.position, row.length)
                held += row.position + row.length
                draws += row.want is Want.TOKEN
            rows_of.append(rows)
        logits = times.logits_seconds(draws) if self.kind.index == self.kind.num_stages - 1 else 0.0
        computes = times.forward_seconds(tokens, paired, held) + logits if tokens else 0.0
        seconds = self.kind.pass_seconds + computes * self.slowness
        self.computing = True
        self.busy_seconds += seconds
        self.passes += 1
        self.clock.after(seconds, partial(self._end_pass, events, rows_of, self.boot, (seconds, tokens)))

    def _end_pass(
        self, events: Sequence[ForwardEvent], rows_of: Sequence[Sequence[Row]], boot: int, seconds_and_tokens: tuple[float, int]
    ) -> None:
        if boot != self.boot:
            return
        is_last = self.kind.index == self.kind.num_stages - 1
        self.queue.done(events)
        self.computing = False
        replies = []
        for event, rows in zip(events, rows_of, strict=True):
            answered = []
            for row in rows:
                sequence = self.sequences.get(row.id, event.source)
                if row.status is Status.OK and sequence is not None:
                    self.kv.extend(sequence.handle, row.length)
                draws = is_last and row.status is Status.OK and row.want is Want.TOKEN
                answered.append(Row(row.id, row.attempt, row.position, 0, result=_DRAWN) if draws else row)
            replies.append((*self._replies.pop(event), Batch(tuple(answered), event.batch.token_ids)))
        self._begin_pass()
        self.last_pass = seconds_and_tokens
        for arrived, reply, batch in replies:
            reply(batch, self.clock.now - arrived)

    def crash(self) -> None:
        """The process dies with all that it holds; the kubelet starts it again at once."""
        self.boot += 1
        self.ready = self.computing = False
        failure = StageFailed(self.kind.index, "broken", f"{self.name} was killed", blames=True)
        replies, self._replies = self._replies, {}
        between, self._between = self._between, []
        waiting, self._waiters, self._restored_at = self._waiters, [], {}
        self._forget()
        for _, reply in replies.values():
            reply(failure, 0.0)
        for action in (*between, *(each for _, each in waiting)):
            action()


class Fleet:
    """The pods of a stage and their autoscaler, which is told what Knative's would be told."""

    def __init__(
        self,
        clock: Clock,
        kind: StageKind,
        settings: RevisionSettings,
        template: Mapping[str, Any],
        changed: Callable[[int, list[Endpoint]], object],
        plan: Sequence[int] = (),
    ) -> None:
        """changed: is called with the stage and its endpoints when they change.

        A pod is ready at the beginning, or the minimum, because a gateway that starts wakes its stages.

        plan: pods wanted in each second, instead of the autoscaler's decisions; empty: it decides.
        """
        self.clock, self.kind = clock, kind
        self.pods: dict[str, Pod] = {}
        self.cold_starts = self.peak = 0
        self.replica_seconds = 0.0
        self.loads: list[float] = []  # requests in flight at ready pods or held by the activator, mean of each second
        self._plan = plan
        self._changed = changed
        self._counted_at = 0.0
        self._seconds_before: dict[Pod, float] = {}
        self._held: list[tuple[float, Callable[[], object]]] = []  # by the activator, while no pod is ready
        self._held_seconds = 0.0
        self._added = 0
        self._busy: dict[int, float] = {}  # seconds of each pod, for the class HPA
        # Of a pod that leaves: queue-proxy waits until no request has come for so long, the kubelet no longer than the timeout.
        self.drain_seconds = min(PodTiming().drain_quiet_seconds, float(template["spec"]["timeoutSeconds"]))
        self._grace_seconds = float(template["spec"]["timeoutSeconds"])
        first = max(1, settings.min_scale)
        self.autoscaler = revision_autoscaler(settings, template, ready=first, now=clock.now, cpu=self._busy.get)
        for _ in range(plan[0] if plan else first):
            self._add().ready = True
        self.cold_starts = 0
        clock.after(SCRAPE_SECONDS, partial(self._scrape, 1))

    @property
    def staying(self) -> list[Pod]:
        return [pod for pod in self.pods.values() if not pod.leaving]

    @property
    def ready(self) -> list[Pod]:
        return [pod for pod in self.pods.values() if pod.ready and not pod.leaving]

    def endpoints(self) -> list[Endpoint]:
        return [Endpoint(pod.name, ready=pod.ready, terminating=pod.leaving) for pod in self.pods.values()]

    def await_pod(self, reply: Callable[[], object]) -> None:
        """A request to the Service: calls `reply` when a pod is ready, and wakes the stage if it has none."""
        if self.ready:
            reply()
            return
        self._held.append((self.clock.now, reply))
        if not self.staying and not isinstance(self.autoscaler, HpaRevisionAutoscaler):
            self.autoscaler.record(self.clock.now, 1.0, 1.0)
            self._decide()

    def count(self) -> None:
        """Replica-seconds up to now."""
        self.replica_seconds += len(self.pods) * (self.clock.now - self._counted_at)
        self._counted_at = self.clock.now

    def _scrape(self, number: int) -> None:
        now, ready, concurrency = self.clock.now, self.ready, 0.0
        for pod in ready:
            pod.count(0)
            concurrency += pod.request_seconds - self._seconds_before.get(pod, 0.0)
            self._seconds_before[pod] = pod.request_seconds
        concurrency += self._held_seconds + sum(now - max(since, now - SCRAPE_SECONDS) for since, _ in self._held)
        self._held_seconds = 0.0
        self.loads.append(concurrency / SCRAPE_SECONDS)
        if isinstance(self.autoscaler, HpaRevisionAutoscaler):
            self._busy.update({pod.number: pod.busy_seconds for pod in ready})
            self.autoscaler.observe(now, [(pod.number, pod.ready) for pod in self.staying])
        elif ready or concurrency:
            self.autoscaler.record(now, concurrency / SCRAPE_SECONDS, 0.0)
        if self._plan:
            self._scale_to(self._plan[min(number, len(self._plan) - 1)])
        elif number % round(TICK_SECONDS / SCRAPE_SECONDS) == 0:
            self._decide()
        self.clock.after(SCRAPE_SECONDS, partial(self._scrape, number + 1))

    def _decide(self) -> None:
        now, ready = self.clock.now, len(self.ready)
        self.autoscaler.decide(now, ready)
        self._scale_to(self.autoscaler.reconcile(now, replicas=len(self.staying), ready=ready).replicas)

    def _scale_to(self, wanted: int) -> None:
        staying = self.staying
        for _ in range(wanted - len(staying)):
            pod = self._add()
            self.clock.after(self.kind.start_seconds, partial(self._started, pod))
        # Like a ReplicaSet: pods that are not ready end first, then the youngest.
        for pod in sorted(staying, key=lambda each: (each.ready, -each.number))[: max(0, len(staying) - wanted)]:
            self._leave(pod)
        if wanted != len(staying):
            self._changed(self.kind.index, self.endpoints())

    def _add(self) -> Pod:
        self.count()
        self._added += 1
        self.cold_starts += 1
        pod = Pod(self.clock, self.kind, f"http://{self.kind.index}-{self._added}", self._added)
        pod.counted_at = self.clock.now
        self.pods[pod.name] = pod
        self.peak = max(self.peak, len(self.staying))
        return pod

    def _started(self, pod: Pod) -> None:
        if pod.name not in self.pods or pod.ready:
            return
        pod.ready = True
        self._changed(self.kind.index, self.endpoints())
        held, self._held = self._held, []
        for since, reply in held:
            self._held_seconds += self.clock.now - max(since, self.clock.now - SCRAPE_SECONDS)
            reply()

    def kill(self, pod: Pod) -> None:
        """Kills the pod's process, as a node that runs out of memory does."""
        pod.crash()
        self._changed(self.kind.index, self.endpoints())
        self.clock.after(self.kind.start_seconds, partial(self._started, pod))

    def _leave(self, pod: Pod) -> None:
        if not pod.ready:
            self.count()
            del self.pods[pod.name]
            return
        pod.leaving = True
        pod.quiet_since = self.clock.now
        self._drain(pod, self.clock.now + self._grace_seconds)

    def _drain(self, pod: Pod, deadline: float) -> None:
        """Removes the pod once no request has come for a while, as queue-proxy does, or at the end of its grace period."""
        now = self.clock.now
        remaining = min(self.drain_seconds - (now - pod.quiet_since), deadline - now)
        if now < deadline and (remaining > 1e-9 or pod.in_flight):
            self.clock.after(min(max(remaining, 1.0), deadline - now), partial(self._drain, pod, deadline))
            return
        pod.crash()
        self.count()
        del self.pods[pod.name]
        self._seconds_before.pop(pod, None)
        self._changed(self.kind.index, self.endpoints())
