"""Simulates a pipeline of any number of pods under a trace, faster than real time (discrete events, simpy).

All decisions are made by the project's own code: the autoscaler (`fleet`), the number of micro-batches in flight and of their
sequences, the admission and refusal of requests (`functions/gateway/scheduling/batching.py`), migrations to another pod
(`functions/gateway/stages/routes.py`), the planner's cut, and the manifests' settings. A profile replaces the computation.
Requests are not simulated one by one: between two ticks all decoding sequences advance at the same pace, so a request is three
places on curves: admitted, prompt tokens computed, tokens per sequence.
"""

from collections import Counter
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import Final, TypeVar

import simpy

from bench.evaluation.fleet import Fleet, reconcile_forever
from bench.evaluation.outcome import Cost, Outcome, outcome_of
from bench.evaluation.rounds import Overheads, Work, flow
from bench.evaluation.sequences import Sequences
from bench.evaluation.setting import Setting
from bench.evaluation.trace import Trace
from functions.gateway.scheduling.batching import (
    SchedulerLimits,
    admissible_sequences,
    max_waiting,
    micro_batches_allowed,
    micro_batches_wanted,
)
from functions.gateway.stages.routes import uneven
from knative.local.autoscaler.revision_settings import revision_settings
from knative.local.platform import FROM_ZERO
from knative.render.resolved_pipeline import ResolvedPipeline
from knative.render.services import stage_service

START_SECONDS: Final = 1.2  # of a pod without its weights: process, imports, one step, readiness
_NO_DIGEST: Final = "0" * 64
T = TypeVar("T")
_Wait = Generator[simpy.Event, None, None]


@dataclass(frozen=True, kw_only=True, slots=True)
class World:
    """The environment of the pipeline."""

    overheads: Overheads = field(default_factory=Overheads)
    tail_seconds: float = 30.0  # after the last arrival; an answer that has not ended then never ends
    step_seconds: float = 0.1  # between two ticks


class Simulation:
    """One way under one trace: call `run` once."""

    def __init__(self, setting: Setting, way: str, trace: Trace, world: World) -> None:
        """Raises DoesNotFit, OverBudget."""
        self._env = simpy.Environment()
        self._world = world
        self._trace = trace.within(setting.context_tokens)
        stages = zip(setting.pass_times(way), (plan.weight_bytes for plan in setting.plans(way)), strict=True)
        self._kinds = Counter(stages)  # stages with the same passes and weights behave alike, and are simulated once
        self._times = [times for times, _ in self._kinds]
        self._many = list(self._kinds.values())
        pipeline = ResolvedPipeline(setting.spec(way), setting.cut(way), _NO_DIGEST)
        settings = revision_settings(stage_service(pipeline, 0)["spec"]["template"], FROM_ZERO)
        self._fleets = [
            Fleet(self._env, settings, START_SECONDS + weight_bytes / setting.weights_bytes_per_second)
            for _, weight_bytes in self._kinds
        ]
        self._sequences = Sequences(self._trace)
        self._queue_limit = pipeline.spec.gateway.queue_limit or SchedulerLimits().queue_limit
        self._most_sequences = setting.micro_batch_sequences
        self._kv_tokens = setting.kv_tokens(way)
        self._network_bytes_per_token = setting.network_bytes_per_token(way)
        # A step at each stage without waiting.
        self._seconds_alone = self._of_all(
            [each.forward_seconds(1, 0, 0) + world.overheads.hop_seconds for each in self._times]
        )
        self._peak = 0
        self._micro_batches = 0
        self._last_ready: list[int] = [fleet.ready for fleet in self._fleets]

    def run(self) -> tuple[Outcome, int]:
        """The outcome, and the peak number of pods."""
        end = self._trace.seconds + self._world.tail_seconds
        self._env.process(reconcile_forever(self._env, self._fleets))
        self._env.process(self._serve(end))
        self._env.run(until=end)
        for fleet in self._fleets:
            fleet.count()
        fleets = list(zip(self._fleets, self._many, strict=True))
        held = [fleet.replica_seconds * many for fleet, many in fleets]
        first, last = self._sequences.times()
        tokens = int(self._trace.prompt_tokens.sum() + self._trace.answer_tokens.sum()) + self._sequences.replayed_tokens
        cost = Cost(
            replica_seconds=sum(held),
            byte_seconds=sum(seconds * weight_bytes for seconds, (_, weight_bytes) in zip(held, self._kinds, strict=True)),
            cold_starts=sum(fleet.cold_starts * many for fleet, many in fleets),
            network_bytes=tokens * self._network_bytes_per_token,
        )
        return outcome_of(self._trace, first, last, end, cost), self._peak

    def _serve(self, end: float) -> _Wait:
        step = self._world.step_seconds
        while self._env.now < end - step / 2:
            yield self._env.timeout(step)
            self._tick(step)

    def _tick(self, step: float) -> None:
        ready = [fleet.ready for fleet in self._fleets]
        of_all = self._of_all(ready)
        self._peak = max(self._peak, sum(of_all))
        one = self._sequences
        allowed = micro_batches_allowed(of_all, self._seconds_alone)
        beyond = admissible_sequences(one.running, allowed, self._most_sequences)
        one.arrive(self._env.now, max_waiting(self._queue_limit, beyond))
        if not all(ready):
            self._wake(one.waiting + one.running)
            one.stand_still(self._env.now)
            return
        self._moved(ready)
        one.admit(beyond, min(ready) * self._kv_tokens)
        decoding = one.decoding
        # Admission opens micro-batches for arrivals; superfluous ones join others before their next step.
        wanted = micro_batches_wanted(one.running, len(of_all), self._most_sequences, allowed)
        # Sequences whose prompts are being computed belong to a micro-batch too; only decoding ones take part in its steps.
        micro_batches = self._micro_batches = min(decoding, wanted)
        work = Work(
            decoding=decoding,
            micro_batches=micro_batches,
            held_tokens=one.held_tokens / decoding if decoding else 0.0,
            prompt_tokens=one.prompt_backlog,
            chunk_tokens=SchedulerLimits().chunk_tokens,
        )
        now = flow(self._times, ready, work, self._world.overheads, self._many)
        one.go_on(self._env.now, step, now, max(1, micro_batches))
        for fleet, in_flight, busy in zip(self._fleets, now.in_flight, now.busy_share, strict=True):
            fleet.in_flight, fleet.busy_share = in_flight, busy

    def _of_all(self, of_kinds: Sequence[T]) -> list[T]:
        """A value for each stage, in no particular order."""
        return [each for each, many in zip(of_kinds, self._many, strict=True) for _ in range(many)]

    def _wake(self, wanted: int) -> None:
        for fleet in self._fleets:
            fleet.in_flight, fleet.busy_share = (1.0, 0.0) if wanted else (0.0, 0.0)
            if wanted:
                fleet.poke()

    def _moved(self, ready: list[int]) -> None:
        """Micro-batches migrate to new pods and away from leaving ones; their keys and values are computed anew."""
        changed = {(before, now) for before, now in zip(self._last_ready, ready, strict=True) if before not in (0, now)}
        self._last_ready = ready
        if changed and self._micro_batches:
            moves = max(moves_of(self._micro_batches, before, now) for before, now in changed)
            self._sequences.replay(moves / self._micro_batches * self._sequences.held_tokens)


def moves_of(routes: int, before: int, now: int) -> int:
    """The number of routes that change pods when a stage goes from `before` to `now` pods.

    All routes leave a leaving pod. New pods get routes one by one, from the pod with most to the one with fewest, until the
    gateway's rule (`uneven`) stops.
    """
    if now < before:
        return round(routes * (before - now) / before)
    each, more = divmod(routes, before)
    pods = +Counter({each: before - more}) + Counter({each + 1: more}) + Counter({0: now - before})
    moves = 0
    while uneven(most := max(pods), least := min(pods)):
        together = min(pods[most], pods[least])
        moves += together
        pods[most - 1] += together
        pods[least + 1] += together
        pods -= Counter({most: together}) + Counter({least: together})
    return moves
