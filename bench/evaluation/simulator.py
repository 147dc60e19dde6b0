"""Simulates a pipeline under a trace, faster than real time: discrete events, one for each micro-batch at each pod.

All decisions are made by the project's own code: the gateway's scheduler (`gateway`), what a pod merges and admits
(`fleet`), the autoscaler, the planner's cut, and the manifests' settings. A profile replaces the computation, and `Overheads`
the network.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Final

import numpy as np

from bench.evaluation.clock import Clock
from bench.evaluation.fleet import Fleet, StageKind
from bench.evaluation.gateway import Hops, SimulatedGateway
from bench.evaluation.outcome import PATIENCE_SECONDS, Cost, Outcome, outcome_of
from bench.evaluation.setting import Setting
from bench.evaluation.trace import Trace
from eventing.problems import Problem
from functions.gateway.scheduling.batching import SchedulerLimits
from functions.gateway.scheduling.sequence import Prompt
from functions.gateway.scheduling.token_stream import TokenStream
from functions.gateway.stages.routes import Endpoint
from knative.local.autoscaler.revision_settings import revision_settings
from knative.local.platform import FROM_ZERO
from knative.render.resolved_pipeline import ResolvedPipeline
from knative.render.services import stage_service

START_SECONDS: Final = 1.2  # of a pod without its weights: process, imports, one step, readiness
_NO_DIGEST: Final = "0" * 64


@dataclass(frozen=True, kw_only=True, slots=True)
class Overheads:
    """The costs of the real parts of an emulated run, as `measure_overheads` finds them."""

    pass_seconds: float = 0.0  # per pass, beyond the profile's time
    hops: Hops = field(default_factory=Hops)


@dataclass(frozen=True, kw_only=True, slots=True)
class World:
    """The environment of the pipeline."""

    overheads: Overheads = field(default_factory=Overheads)
    tail_seconds: float = 30.0  # after the last arrival; an answer that has not ended then never ends
    handover_bytes_per_second: float = 3.125e9  # of KV between pods: 25 Gbit/s; 0: KV is computed again
    gateways: int = 1  # requests go to them in turn
    kill_every_seconds: float = 0.0  # the process of a pod, drawn from those that are ready; 0: never
    slow_pod: float = 1.0  # factor of the seconds of passes of the first pod of the second stage
    seed: int = 0  # of the jitter of retries


class Simulation:
    """One way under one trace: call `run` once."""

    def __init__(
        self,
        setting: Setting,
        way: str,
        trace: Trace,
        world: World,
        *,
        pods: Sequence[int] = (),
        plans: Sequence[Sequence[int]] = (),
    ) -> None:
        """pods: per stage, how many there are all the time. plans: per stage, how many in each second. Empty: as the way says.

        Raises DoesNotFit, OverBudget.
        """
        self.clock = Clock()
        self._world = world
        self._slowness = setting.slowness
        self._trace = trace.within(setting.context_tokens)
        self._plans = setting.plans(way)
        self._hidden_bytes = max(plan.hop_bytes_per_token for plan in self._plans)
        spec, cut = setting.spec(way), setting.cut(way)
        pipeline = ResolvedPipeline(spec, cut, _NO_DIGEST)
        kv_bytes = setting.kv_tokens(way) * max(plan.kv_bytes_per_token for plan in self._plans)
        rate = world.handover_bytes_per_second
        self.fleets = []
        for plan, times in zip(self._plans, setting.pass_times(way), strict=True):
            fixed = [pods[plan.index]] if pods else plans[plan.index] if plans else ()
            template = stage_service(pipeline, plan.index)["spec"]["template"]
            kind = StageKind(
                index=plan.index,
                num_stages=len(cut),
                times=times,
                pass_seconds=world.overheads.pass_seconds,
                kv_tokens=kv_bytes // plan.kv_bytes_per_token,
                start_seconds=START_SECONDS + plan.weight_bytes / setting.weights_bytes_per_second,
                handover_seconds=plan.kv_bytes_per_token / rate if rate else math.inf,
            )
            settings = revision_settings(template, FROM_ZERO)
            self.fleets.append(Fleet(self.clock, kind, settings, template, self._changed, fixed))
        self._limits = SchedulerLimits(
            queue_limit=spec.gateway.queue_limit or SchedulerLimits().queue_limit,
            chunk_tokens=spec.gateway.chunk_tokens or SchedulerLimits().chunk_tokens,
            micro_batch_sequences=setting.micro_batch_sequences,
            prompt_seconds=math.inf if spec.objective is None else spec.objective.prompt_seconds,
        )
        self.gateways: list[SimulatedGateway] = []
        self._pauses: list[float] = []  # between two tokens of an answer
        # Of each request's first and last token; NaN: never.
        self.first_seconds, self.last_seconds = np.full(len(trace), np.nan), np.full(len(trace), np.nan)

    def run(self) -> tuple[Outcome, int]:
        """The outcome, and the peak number of pods."""
        end = self._trace.seconds + self._world.tail_seconds
        with self.clock.instead_of_real_time(self._world.seed):
            for number in range(self._world.gateways):
                gateway = SimulatedGateway(
                    self.clock, self.fleets, self._limits, self._world.overheads.hops, f"gateway-{number}"
                )
                self.gateways.append(gateway)
            for index, arrival in enumerate(self._trace.arrival_seconds):
                self.clock.after(float(arrival), partial(self._submit, index))
            if self._world.kill_every_seconds:
                self.clock.after(self._world.kill_every_seconds, self._kill)
            for pod in list(self.fleets[1].pods.values())[:1] if len(self.fleets) > 1 else ():
                pod.slowness = self._world.slow_pod
            self.clock.run(end)
        for fleet in self.fleets:
            fleet.count()
        stages = list(zip(self.fleets, self._plans, strict=True))
        cost = Cost(
            replica_seconds=sum(fleet.replica_seconds for fleet in self.fleets),
            byte_seconds=sum(fleet.replica_seconds * plan.weight_bytes for fleet, plan in stages),
            cold_starts=sum(fleet.cold_starts for fleet in self.fleets),
            network_bytes=float(sum(gateway.tokens_sent for gateway in self.gateways) * self._hidden_bytes),
        )
        outcome = outcome_of(self._trace, self.first_seconds, self.last_seconds, end, cost, self._pauses, self._slowness)
        return outcome, sum(fleet.peak for fleet in self.fleets)

    def _kill(self) -> None:
        ready = [(fleet, pod) for fleet in self.fleets for pod in fleet.ready]
        if ready:
            fleet, pod = random.choice(ready)
            fleet.kill(pod)
        self.clock.after(self._world.kill_every_seconds, self._kill)

    def _changed(self, stage: int, endpoints: list[Endpoint]) -> None:
        for gateway in self.gateways:
            gateway.endpoints_changed(stage, endpoints)

    def _submit(self, index: int) -> None:
        gateway = self.gateways[index % len(self.gateways)]
        prompt = Prompt(
            [index] * int(self._trace.prompt_tokens[index]),
            int(self._trace.answer_tokens[index]),
            deadline_seconds=PATIENCE_SECONDS,
        )
        try:
            stream = gateway.submit(prompt)
        except Problem:
            return  # the queue is full
        stream.on_change = partial(self._progressed, index, stream)

    def _progressed(self, index: int, stream: TokenStream) -> None:
        if stream.completion_tokens == 1:
            self.first_seconds[index] = self.clock.now
        if stream.finish_reason == "length":
            self.last_seconds[index] = self.clock.now
            self._pauses += stream.waits(1)
