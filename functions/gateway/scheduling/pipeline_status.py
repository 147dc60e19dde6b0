"""A snapshot of the pipeline as this gateway sees it: plain data for the page and for `GET /v1/pipeline/events`.

A gateway knows the instances from its watch, its own events in flight and its own queue. It does not see the work of other
gateways.
"""

import time
from dataclasses import dataclass
from typing import Literal

from eventing.wire.generation import ProgressEvent
from functions.gateway.scheduling.sequence import Sequence
from functions.gateway.scheduling.state import SchedulerState
from functions.gateway.scheduling.wake_up import ColdStart
from functions.gateway.stages.routes import Instance

# asleep: a Service URL, used without a watch, that must be woken. suspended: gets no work for a while after a failure.
InstanceState = Literal["asleep", "starting", "ready", "suspended", "leaving"]


@dataclass(frozen=True, slots=True)
class InstanceStatus:
    number: int
    revision: str
    state: InstanceState
    routes: int  # how many use it
    free_tokens: int | None  # for which it has KV memory, by its last reply; None: unknown
    event_seconds: float  # sum over all events so far of the time in flight, see InFlight


@dataclass(frozen=True, slots=True)
class StageStatus:
    instances: tuple[InstanceStatus, ...]
    steps: int
    step_seconds: float  # sum over all steps
    cold: bool  # it has no instance that takes work
    start: ColdStart | None  # the one under way or the last one


@dataclass(frozen=True, slots=True)
class AnswerStatus:
    request_id: str
    client_id: str
    route: tuple[int, ...]  # number of the instance at each stage; empty while it waits
    prompt_tokens: int
    tokens: int
    replays: int
    adapter: bytes = b""  # digest of its adapter's version; empty: none


@dataclass(frozen=True, slots=True)
class PipelineStatus:
    moment: float  # in time.monotonic()
    stages: tuple[StageStatus, ...]
    waiting: int
    running: int
    micro_batches: int
    tokens: int  # drawn since the start
    answers: tuple[AnswerStatus, ...]


def pipeline_status(state: SchedulerState) -> PipelineStatus:
    """Takes a snapshot of the pipeline. The caller holds the scheduler's lock."""
    now, cold, stages = time.monotonic(), set(state.placement.cold()), []
    for stage, stats in enumerate(state.stats.stages):
        instances = tuple(_instance_status(instance, now) for instance in state.placement.stages[stage].values())
        start = state.wake_ups.last_start(stage)
        stages.append(StageStatus(instances, stats.steps, stats.seconds, stage in cold, start))
    return PipelineStatus(
        moment=now,
        stages=tuple(stages),
        waiting=len(state.waiting),
        running=state.running,
        micro_batches=len(state.micro_batches),
        tokens=state.stats.tokens,
        answers=tuple(
            AnswerStatus(
                request_id=sequence.prompt.request_id,
                client_id=sequence.prompt.client_id,
                route=tuple(instance.number for instance in sequence.route.instances) if sequence.route else (),
                prompt_tokens=len(sequence.prompt.token_ids),
                tokens=len(sequence.tokens) - len(sequence.prompt.token_ids),
                replays=sequence.stream.timings().replays,
                adapter=sequence.prompt.adapter,
            )
            for sequence in state.sequences.values()
        ),
    )


def progress_of(state: SchedulerState, sequence: Sequence) -> ProgressEvent | None:
    """Returns what a sequence waits for now, or None if only for its next token. The caller holds the scheduler's lock."""
    placement, waiting = state.placement, state.waiting
    cold = placement.cold()
    if cold:
        percent, stage = min((state.wake_ups.loaded_percent(placement, stage), stage) for stage in cold)
        doing = "starting" if percent < 0 else f"loading, {percent} %"
        text = f"stage {stage + 1} of {placement.num_stages} {doing}"
        known = percent if percent >= 0 else None
        return ProgressEvent("start", text, stage=stage + 1, stages=placement.num_stages, percent=known)
    if sequence.route is None and sequence in waiting.backing_off:
        return ProgressEvent("retry", "next attempt, after a stage failed")
    if sequence.route is None and sequence not in waiting.backlog.sequences:
        return ProgressEvent("turn", f"turn in the queue, {len(waiting)} waiting", waiting=len(waiting))
    if not sequence.reserved:
        return ProgressEvent("memory", "memory at the stages")
    held, total = min(sequence.progress.held), len(sequence.tokens)
    if held + 1 < total:
        percent = 100 * held // total
        return ProgressEvent("prompt", f"prompt, {percent} %", percent=percent)
    return None


def _instance_status(instance: Instance, now: float) -> InstanceStatus:
    if instance.terminating:
        state: InstanceState = "leaving"
    elif not instance.ready:
        state = "starting"
    elif not instance.awake:
        state = "asleep"
    else:
        state = "suspended" if instance.suspended(now) else "ready"
    return InstanceStatus(
        number=instance.number,
        revision=instance.revision,
        state=state,
        routes=instance.routes,
        free_tokens=instance.free_tokens,
        event_seconds=instance.in_flight.event_seconds(),
    )
