"""Whom a pipeline that scales must beat: static pipelines of any number of pods, and one that knows the arrivals."""

import math
from collections.abc import Sequence
from typing import Final

from bench.evaluation.fleet import SCRAPE_SECONDS
from bench.evaluation.outcome import Outcome
from bench.evaluation.setting import OBJECTIVE, STATIC, Setting
from bench.evaluation.simulator import Simulation, World
from bench.evaluation.trace import Trace

_IN_FLIGHT: Final = 2.0  # requests for each pod: the target of the rendered Services


def spread(seconds: Sequence[float], pods: int) -> tuple[int, ...]:
    """How many of `pods` each stage gets, at least one: always the stage with most seconds of a pass for each pod is next."""
    counts = [1] * len(seconds)
    for _ in range(pods - len(seconds)):
        narrowest = max(range(len(seconds)), key=lambda stage: seconds[stage] / counts[stage])
        counts[narrowest] += 1
    return tuple(counts)


def static(setting: Setting, trace: Trace, world: World, pods: int) -> tuple[Outcome, int]:
    """A static pipeline of so many pods."""
    step = [times.forward_seconds(1, 1, 1) + times.logits_seconds(1) for times in setting.pass_times(STATIC)]
    return Simulation(setting, STATIC, trace, world, pods=spread(step, pods)).run()


def clairvoyant(setting: Setting, trace: Trace, world: World) -> tuple[Outcome, int]:
    """Pods come just before their load and go when no further load is near.

    The load is that of a static pipeline with all devices under the same trace. A pod that goes costs its drain, so none goes
    that would be wanted again before its drain and another start are over. Starts and drains are those of the way OBJECTIVE.
    """
    full = Simulation(setting, OBJECTIVE, trace, world, pods=[setting.replicas(OBJECTIVE)] * setting.stages)
    full.run()
    plans = []
    for fleet in full.fleets:
        wanted = [max(1, min(len(fleet.pods), math.ceil(load / _IN_FLIGHT))) for load in fleet.loads]
        before = math.ceil(fleet.kind.start_seconds / SCRAPE_SECONDS) + 1
        after = before + math.ceil(fleet.drain_seconds / SCRAPE_SECONDS)
        plan, pods = [], max(wanted[: before + 1])
        for second in range(len(wanted)):
            pods = max([pods, *wanted[second : second + before + 1]])
            pods = min(pods, max(wanted[second : second + after + 1]))
            plan.append(pods)
        plans.append(plan)
    return Simulation(setting, OBJECTIVE, trace, world, plans=plans).run()
