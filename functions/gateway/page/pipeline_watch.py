"""The pipeline's state for whoever watches: sampled a few times a second, once for all, and only while somebody does."""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final

from functions.gateway.page.pipeline_state import PipelineState, Queue, Replica, RunningAnswer, Stage, Start
from functions.gateway.scheduling.cold_starts import ColdStart
from functions.gateway.scheduling.outlook import InstanceOutlook, Outlook, StageOutlook

SAMPLE_SECONDS: Final = 0.3
MOST_ANSWERS: Final = 32
WINDOW_SECONDS: Final = 2.0
"""Over which rates and averages are taken."""


@dataclass(frozen=True, slots=True)
class StageName:
    """What never changes of a stage."""

    service: str
    layers: tuple[int, int]
    target: float | None


@dataclass(frozen=True, slots=True)
class Watched:
    """What is watched, and by which names."""

    model: str
    pipeline: str
    queue_limit: int
    stages: tuple[StageName, ...]
    outlook: Callable[[], Outlook]
    ready: Callable[[], bool]
    draining: Callable[[], bool]


class PipelineWatch:
    """Thread-safe."""

    def __init__(self, watched: Watched) -> None:
        self.watched = watched
        self._lock = threading.Lock()
        self._samples: deque[Outlook] = deque()
        """The last one is how it stands now, the first the one that rates are taken from."""

    def state(self, client_id: str) -> PipelineState:
        """As this client may see it: nobody sees the answers of others."""
        with self._lock:
            self._sample()
            before, now = self._samples[0], self._samples[-1]
        seconds = now.moment - before.moment
        stages = zip(self.watched.stages, before.stages, now.stages, strict=True)
        return PipelineState(
            model=self.watched.model,
            pipeline=self.watched.pipeline,
            ready=self.watched.ready(),
            stages={str(number): _stage(*each, seconds) for number, each in enumerate(stages)},
            queue=Queue(
                waiting=now.waiting, limit=self.watched.queue_limit, running=now.running, micro_batches=now.micro_batches
            ),
            tokens_per_second=round(_rate(now.tokens - before.tokens, seconds), 1),
            answers=_answers_of(client_id, now),
        )

    def _sample(self) -> None:
        now = time.monotonic()
        if self._samples and now - self._samples[-1].moment < SAMPLE_SECONDS:
            return
        while self._samples and now - self._samples[0].moment > WINDOW_SECONDS:
            self._samples.popleft()
        self._samples.append(self.watched.outlook())


def _rate(difference: float, seconds: float) -> float:
    return difference / seconds if seconds > 0 else 0.0


def _stage(name: StageName, before: StageOutlook, now: StageOutlook, seconds: float) -> Stage:
    steps = now.steps - before.steps
    return Stage(
        service=name.service,
        layers=name.layers,
        target=name.target,
        asleep=now.cold,
        step_seconds=round((now.step_seconds - before.step_seconds) / steps, 4) if steps else None,
        replicas={str(each.number): _replica(before.instances, each, seconds) for each in now.instances},
        start=None if now.start is None else _start(now.start),
    )


def _replica(before: Iterable[InstanceOutlook], now: InstanceOutlook, seconds: float) -> Replica:
    earlier = next((each.event_seconds for each in before if each.number == now.number), 0.0)
    concurrency = round(_rate(now.event_seconds - earlier, seconds), 2)
    return Replica(
        state=now.state, revision=now.revision, concurrency=concurrency, routes=now.routes, free_tokens=now.free_tokens
    )


def _start(start: ColdStart) -> Start:
    seconds = (time.monotonic() if start.ended is None else start.ended) - start.began
    return Start(seconds=round(seconds, 2), over=start.ended is not None, failed=start.cause or None, phases=dict(start.phases))


def _answers_of(client_id: str, now: Outlook) -> dict[str, RunningAnswer]:
    """Those that compute before those that wait, and no more than somebody can look at."""
    own = sorted((answer for answer in now.answers if answer.client_id == client_id), key=lambda each: not each.route)
    return {
        each.request_id: RunningAnswer(
            route=each.route, prompt_tokens=each.prompt_tokens, tokens=each.tokens, replays=each.replays
        )
        for each in own[:MOST_ANSWERS]
    }
