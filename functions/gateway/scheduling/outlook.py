"""The pipeline as the gateway sees it at one moment: plain data, for whoever watches.

A gateway knows what it watches and does: instances by their EndpointSlices, its own events on their way, its own queue. With
several gateways each sees its own part of the work.
"""

import time
from dataclasses import dataclass
from typing import Literal

from functions.gateway.scheduling.board import Board
from functions.gateway.scheduling.cold_starts import ColdStart, ColdStarts
from functions.gateway.scheduling.sequence import Sequence
from functions.gateway.stages.instances import Instance

InstanceState = Literal["asleep", "starting", "ready", "suspended", "leaving"]
"""asleep: a Service URL that nobody watches behind, and that has to be woken. suspended: it has just failed."""


@dataclass(frozen=True, slots=True)
class InstanceOutlook:
    number: int
    revision: str
    state: InstanceState
    routes: int
    free_tokens: int | None
    event_seconds: float
    """As `InFlight` counts."""


@dataclass(frozen=True, slots=True)
class StageOutlook:
    instances: tuple[InstanceOutlook, ...]
    steps: int
    step_seconds: float
    """Of all these steps together."""
    cold: bool
    start: ColdStart | None


@dataclass(frozen=True, slots=True)
class AnswerOutlook:
    request_id: str
    client_id: str
    route: tuple[int, ...]
    """Numbers of the instances, one for each stage; empty while it waits."""
    prompt_tokens: int
    tokens: int
    replays: int


@dataclass(frozen=True, slots=True)
class Outlook:
    moment: float
    """In time.monotonic()."""
    stages: tuple[StageOutlook, ...]
    waiting: int
    running: int
    micro_batches: int
    tokens: int
    """Drawn since the start."""
    answers: tuple[AnswerOutlook, ...]


def outlook(board: Board, cold_starts: ColdStarts) -> Outlook:
    """The scheduler's lock is held around it."""
    now, cold = time.monotonic(), set(board.placement.cold())
    return Outlook(
        moment=now,
        stages=tuple(_stage(board, cold_starts, stage, stage in cold, now) for stage in range(board.placement.num_stages)),
        waiting=len(board.waiting),
        running=board.running,
        micro_batches=len(board.micro_batches),
        tokens=board.stats.tokens,
        answers=tuple(map(_answer, board.sequences.values())),
    )


def _stage(board: Board, cold_starts: ColdStarts, stage: int, cold: bool, now: float) -> StageOutlook:
    stats = board.stats.stages[stage]
    instances = tuple(_instance(instance, now) for instance in board.placement.instances(stage))
    return StageOutlook(instances, stats.steps, stats.seconds, cold, cold_starts.last(stage))


def _instance(instance: Instance, now: float) -> InstanceOutlook:
    seconds = instance.in_flight.event_seconds()
    state = _state(instance, now)
    return InstanceOutlook(instance.number, instance.revision, state, instance.routes, instance.free_tokens, seconds)


def _state(instance: Instance, now: float) -> InstanceState:
    if instance.terminating:
        return "leaving"
    if not instance.ready:
        return "starting"
    if not instance.awake:
        return "asleep"
    return "suspended" if instance.suspended(now) else "ready"


def _answer(sequence: Sequence) -> AnswerOutlook:
    prompt = sequence.prompt
    route = () if sequence.route is None else tuple(instance.number for instance in sequence.route.instances)
    tokens = sequence.total_tokens - len(prompt.token_ids)
    replays = sequence.stream.timings().replays
    return AnswerOutlook(prompt.request_id, prompt.client_id, route, len(prompt.token_ids), tokens, replays)
