"""The pipeline's state, which `GET /v1/pipeline/events` sends.

It is sampled on demand, once per SAMPLE_SECONDS for all readers. Things that come and go are members of objects and not
elements of lists, so that a merge patch can name them. A null field may also be missing. Rates and averages are those of this
gateway over its last seconds. docs/openai.md says how clients read the stream.
"""

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Set
from dataclasses import dataclass, field
from typing import Final

from msgspec import Struct

from eventing.problems import Problem
from functions.gateway.page.state_events import SAMPLE_SECONDS
from functions.gateway.scheduling.pipeline_status import InstanceState, InstanceStatus, PipelineStatus, StageStatus
from functions.gateway.scheduling.wake_up import ColdStart

PIPELINE_EVENTS: Final = "/v1/pipeline/events"
MAX_ANSWERS: Final = 32
WINDOW_SECONDS: Final = 2.0  # rates and averages are taken over it


class ReplicaState(Struct, frozen=True, kw_only=True):
    """One instance of a stage: a pod."""

    state: InstanceState
    revision: str
    concurrency: float  # forward events in flight there, on average
    routes: int  # micro-batches whose route it is on
    free_tokens: int | None = None  # free memory for keys and values, as its last reply said; None: unknown


class ColdStartState(Struct, frozen=True, kw_only=True):
    """A start of a stage from zero replicas."""

    seconds: float  # from the warm-up event to its reply, or until now
    over: bool  # it has ended, with or without success
    failed: str | None = None  # the cause in a word, such as timeout
    phases: dict[str, float]  # reported by the pod: phase → seconds from its process's start to the phase's end


class StageState(Struct, frozen=True, kw_only=True):
    """A stage: one layer group, served by one Knative Service."""

    service: str
    layers: tuple[int, int]  # first, and last + 1
    target: float | None = None  # concurrency at which a replica is added; None: not scaled by concurrency, or unknown
    asleep: bool  # no replica takes work now
    step_seconds: float | None = None  # average from an event to its reply; None: there was none
    replicas: dict[str, ReplicaState]  # by number, in the order in which the gateway learned of them
    start: ColdStartState | None = None  # the latest that this gateway saw


class QueueState(Struct, frozen=True, kw_only=True):
    waiting: int  # requests
    limit: int  # of requests that may wait
    running: int  # sequences
    micro_batches: int


class RunningAnswer(Struct, frozen=True, kw_only=True):
    """A running or waiting answer of the client that reads the stream. Answers of other clients are not shown."""

    route: tuple[int, ...]  # number of the replica at each stage; empty while the answer waits
    prompt_tokens: int
    tokens: int  # drawn so far
    replays: int


class AdapterState(Struct, frozen=True, kw_only=True):
    """An adapter (LoRA) of the model, as the store lists it."""

    running: int  # answers of all clients that are computed with it: the stages of their routes have it in memory


class PipelineState(Struct, frozen=True, kw_only=True):
    """State of a pipeline: data of the event `snapshot`. The data of a `change` is a JSON merge patch (RFC 7396) of it."""

    model: str
    pipeline: str  # its fingerprint
    ready: bool  # this gateway has loaded its tokenizer
    stages: dict[str, StageState]  # by number, from 0 on
    queue: QueueState
    tokens_per_second: float
    answers: dict[str, RunningAnswer]  # by the id of the response; at most 32, running ones first
    adapters: dict[str, AdapterState] | None = None  # by name; None: none are served
    batches: bool  # `/v1/batches` is served here


@dataclass(frozen=True, slots=True)
class StageDescription:
    service: str
    layers: tuple[int, int]  # first, and last + 1
    target: float | None  # concurrency at which the autoscaler adds a replica; None: unknown, or not scaled by it


@dataclass(eq=False)
class PipelineWatch:
    """Computes PipelineStates from samples of the last WINDOW_SECONDS, which all readers share. Thread-safe.

    Its fields are constants of the pipeline, and functions that return the present state of this gateway.
    """

    model: str
    pipeline: str
    queue_limit: int
    stages: tuple[StageDescription, ...]
    status: Callable[[], PipelineStatus]
    ready: Callable[[], bool]
    draining: Callable[[], bool]
    # Digests of the versions of each adapter by its name; None: the gateway serves no adapters.
    adapters: Callable[[], Mapping[str, Set[bytes]]] | None = None
    has_batches: bool = False
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False)
    # The last one is the current one; rates are differences to the first.
    _samples: deque[PipelineStatus] = field(default_factory=deque, init=False)

    def state(self, client_id: str) -> PipelineState:
        """Returns the pipeline's state, at most SAMPLE_SECONDS old, with the answers of this client only."""
        with self._lock:
            self._sample()
            before, now = self._samples[0], self._samples[-1]
        seconds = now.moment - before.moment
        stages = zip(self.stages, before.stages, now.stages, strict=True)
        return PipelineState(
            model=self.model,
            pipeline=self.pipeline,
            ready=self.ready(),
            stages={str(number): _stage(*each, seconds) for number, each in enumerate(stages)},
            queue=QueueState(waiting=now.waiting, limit=self.queue_limit, running=now.running, micro_batches=now.micro_batches),
            tokens_per_second=round(_rate(now.tokens - before.tokens, seconds), 1),
            answers=_answers_of(client_id, now),
            adapters=self._adapters(now),
            batches=self.has_batches,
        )

    def _adapters(self, now: PipelineStatus) -> dict[str, AdapterState] | None:
        if self.adapters is None:
            return None
        try:
            known = self.adapters()
        except Problem:  # the store cannot be asked; the state has no place for that
            return {}
        running = Counter(each.adapter for each in now.answers if each.route)
        return {name: AdapterState(running=sum(running[each] for each in digests)) for name, digests in known.items()}

    def _sample(self) -> None:
        now = time.monotonic()
        if self._samples and now - self._samples[-1].moment < SAMPLE_SECONDS:
            return
        while self._samples and now - self._samples[0].moment > WINDOW_SECONDS:
            self._samples.popleft()
        self._samples.append(self.status())


def _rate(difference: float, seconds: float) -> float:
    return difference / seconds if seconds > 0 else 0.0


def _stage(description: StageDescription, before: StageStatus, now: StageStatus, seconds: float) -> StageState:
    steps = now.steps - before.steps
    return StageState(
        service=description.service,
        layers=description.layers,
        target=description.target,
        asleep=now.cold,
        step_seconds=round((now.step_seconds - before.step_seconds) / steps, 4) if steps else None,
        replicas={str(each.number): _replica(before.instances, each, seconds) for each in now.instances},
        start=None if now.start is None else _cold_start(now.start),
    )


def _replica(before: Iterable[InstanceStatus], now: InstanceStatus, seconds: float) -> ReplicaState:
    earlier = next((each.event_seconds for each in before if each.number == now.number), 0.0)
    concurrency = round(_rate(now.event_seconds - earlier, seconds), 2)
    return ReplicaState(
        state=now.state, revision=now.revision, concurrency=concurrency, routes=now.routes, free_tokens=now.free_tokens
    )


def _cold_start(start: ColdStart) -> ColdStartState:
    seconds = (time.monotonic() if start.ended is None else start.ended) - start.began
    over = start.ended is not None
    return ColdStartState(seconds=round(seconds, 2), over=over, failed=start.cause or None, phases=dict(start.phases))


def _answers_of(client_id: str, now: PipelineStatus) -> dict[str, RunningAnswer]:
    """Returns the client's answers by request id: running ones before waiting ones, at most MAX_ANSWERS."""
    own = sorted((answer for answer in now.answers if answer.client_id == client_id), key=lambda each: not each.route)
    return {
        each.request_id: RunningAnswer(
            route=each.route, prompt_tokens=each.prompt_tokens, tokens=each.tokens, replays=each.replays
        )
        for each in own[:MAX_ANSWERS]
    }
