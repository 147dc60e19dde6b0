"""A pipeline of any number of pods under a trace, faster than it would be: a discrete-event simulation (simpy).

What decides is the project's own code, imported: the autoscaler (`fleet`), how many micro-batches may be in flight and into how
many sequences are divided (`functions/gateway/scheduling/capacity.py`), the planner's cut, and the manifests' settings. What
computes is a profile. Requests are not walked one by one: between two ticks all that answer go on at the same pace, so a
request is three places on curves, how much was admitted, how much of the prompts was computed, how many tokens each sequence
got.
"""

from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import simpy

from bench.evaluation.fleet import Fleet, settings_of
from bench.evaluation.outcome import PATIENCE_SECONDS, Cost, Objective, Outcome, outcome_of
from bench.evaluation.rounds import Flow, Overheads, Work, flow
from bench.evaluation.setting import Setting
from bench.evaluation.trace import Floats, Integers, Trace
from functions.gateway.scheduling.capacity import micro_batches_allowed, micro_batches_wanted
from functions.gateway.scheduling.limits import Limits
from knative.render.resolved_pipeline import ResolvedPipeline
from knative.render.services import stage_service

START_SECONDS: Final = 1.2
"""Of a pod without its weights: process, imports, one step, readiness."""
_NO_DIGEST: Final = "0" * 64
_Wait = Generator[simpy.Event, None, None]


@dataclass(frozen=True, kw_only=True, slots=True)
class World:
    """Around the pipeline."""

    overheads: Overheads = field(default_factory=Overheads)
    start_seconds: float = START_SECONDS
    store_bytes_per_second: float = float("inf")
    """That all pods which start share."""
    tail_seconds: float = 30.0
    """Behind the last arrival, for answers that still run; what has not ended then never does."""
    step_seconds: float = 0.1
    """Between two looks at the requests."""


class Simulation:
    """One way under one trace: `run` once."""

    def __init__(self, setting: Setting, way: str, trace: Trace, world: World) -> None:
        """Raises DoesNotFit, OverBudget."""
        self._env = simpy.Environment()
        self._world = world
        self._trace = trace.within(setting.context_tokens)
        self._times = setting.pass_times(way)
        self._plans = setting.plans(way)
        self._bandwidth = setting.weights_bytes_per_second
        pipeline = ResolvedPipeline(setting.spec(way), setting.cut(way), _NO_DIGEST)
        self.fleets = [
            Fleet(self._env, settings_of(stage_service(pipeline, k)["spec"]["template"]), self._starts(plan.weight_bytes))
            for k, plan in enumerate(self._plans)
        ]
        self._sequences = _Sequences(self._trace, pipeline.spec.gateway.queue_limit or Limits().queue_limit)
        self._most_sequences = setting.micro_batch_sequences
        self._kv_tokens = setting.kv_tokens(way)
        self._hop_bytes = max(plan.hop_bytes_per_token for plan in self._plans) * 2.0
        self._network_bytes_per_token = setting.network_bytes_per_token(way)
        self._loading = 0
        self._peak = 0
        self._last_ready: list[int] = [fleet.ready for fleet in self.fleets]

    def run(self, objective: Objective | None = None) -> tuple[Outcome, int]:
        """The outcome, and the most pods that were there at once."""
        end = self._trace.seconds + self._world.tail_seconds
        self._env.process(self._serve(end))
        self._env.run(until=end)
        for fleet in self.fleets:
            fleet.count()
        first, last = self._sequences.times()
        tokens = int(self._trace.prompt_tokens.sum() + self._trace.answer_tokens.sum()) + self._sequences.replayed_tokens
        cost = Cost(
            replica_seconds=sum(fleet.replica_seconds for fleet in self.fleets),
            byte_seconds=sum(
                fleet.replica_seconds * plan.weight_bytes for fleet, plan in zip(self.fleets, self._plans, strict=True)
            ),
            cold_starts=sum(fleet.cold_starts for fleet in self.fleets),
            network_bytes=tokens * self._network_bytes_per_token,
        )
        return outcome_of(self._trace, first, last, end, cost, objective), self._peak

    def _starts(self, weight_bytes: int) -> Any:
        def seconds() -> float:
            loading = 1 + sum(fleet.starting for fleet in self.fleets)
            rate = min(self._bandwidth, self._world.store_bytes_per_second / loading)
            return self._world.start_seconds + weight_bytes / rate

        return seconds

    def _serve(self, end: float) -> _Wait:
        step = self._world.step_seconds
        while self._env.now < end - step / 2:
            yield self._env.timeout(step)
            self._tick(step)

    def _tick(self, step: float) -> None:
        ready = [fleet.ready for fleet in self.fleets]
        self._peak = max(self._peak, sum(ready))
        one = self._sequences
        one.arrive(self._env.now)
        if not all(ready):
            self._wake(one.waiting + one.running)
            one.stand_still(self._env.now)
            return
        self._moved(ready)
        seconds = [each.forward_seconds(1, 0, 0) + self._world.overheads.hop_seconds for each in self._times]
        allowed = micro_batches_allowed(ready, seconds)
        one.admit(allowed * self._most_sequences, min(ready) * self._kv_tokens)
        decoding = one.decoding
        # Who still has its prompt computed is in one, too; a micro-batch steps for as many of its sequences as answer.
        micro_batches = min(decoding, micro_batches_wanted(one.running, len(ready), self._most_sequences, allowed))
        work = Work(
            decoding=decoding,
            micro_batches=micro_batches,
            held_tokens=one.held_tokens / decoding if decoding else 0.0,
            prompt_tokens=one.prompt_backlog,
            chunk_tokens=Limits().chunk_tokens,
            hop_bytes_per_token=self._hop_bytes,
        )
        now = flow(self._times, ready, work, self._world.overheads)
        one.go_on(self._env.now, step, now)
        for fleet, in_flight, busy in zip(self.fleets, now.in_flight, now.busy_share, strict=True):
            fleet.in_flight, fleet.busy_share = in_flight, busy

    def _wake(self, wanted: int) -> None:
        for fleet in self.fleets:
            fleet.in_flight, fleet.busy_share = (1.0, 0.0) if wanted else (0.0, 0.0)
            if wanted:
                fleet.poke()

    def _moved(self, ready: list[int]) -> None:
        """Micro-batches go over to new pods, and what those lack is computed anew."""
        gained = (1 - before / now for before, now in zip(self._last_ready, ready, strict=True) if now > before > 0)
        share = max(gained, default=0.0)
        self._last_ready = ready
        self._sequences.replay(share * self._sequences.held_tokens)


class _Sequences:
    """All requests; whoever came first is admitted, and has its prompt computed, first. Who finds the queue full is refused,
    and who has waited for as long as anybody does is gone."""

    def __init__(self, trace: Trace, queue_limit: int) -> None:
        count = len(trace)
        self._trace = trace
        self._queue_limit = queue_limit
        self._queue: Integers = np.zeros(0, np.int64)
        self._admissions: Integers = np.zeros(count, np.int64)
        """Indexes of requests in the order of their admission; what follows is in this order, too."""
        self._prompts: Floats = np.zeros(count + 1)
        """Tokens of all prompts before."""
        most = int(trace.answer_tokens.max(initial=1)) + 2
        self._ends = np.zeros(most, np.int64)
        self._ends_reserved = np.zeros(most, np.float64)
        """By the tokens that each sequence got since the beginning, a ring: who ends then, and what it frees."""
        self._arrived = self._admitted = self._prompted = self._ended = 0
        self._computed = 0.0
        """Of all prompts."""
        self._replay = self.replayed_tokens = 0.0
        self._tokens = 0.0
        """That a sequence which answers throughout got."""
        self._reserved = 0.0
        self.held_tokens = 0.0
        self._admitted_at = np.zeros(count)
        self._at: list[float] = [0.0]
        self._computed_curve: list[float] = [0.0]
        self._tokens_curve: list[float] = [0.0]
        self._flows: list[tuple[float, float]] = [(0.0, 1.0)]
        """(seconds of the fill, tokens a second of a prompt alone)."""
        self._last_round = (0.0, 1.0)
        """When anybody answered, and what a round took."""

    @property
    def waiting(self) -> int:
        return len(self._queue)

    @property
    def running(self) -> int:
        return self._admitted - self._ended

    @property
    def decoding(self) -> int:
        return self._prompted - self._ended

    @property
    def prompt_backlog(self) -> float:
        return float(self._prompts[self._admitted]) - self._computed + min(self._replay, Limits().chunk_tokens)

    def arrive(self, now: float) -> None:
        arrivals = self._trace.arrival_seconds
        come = int(np.searchsorted(arrivals, now, "right"))
        gone = int(np.searchsorted(arrivals[self._queue], now - PATIENCE_SECONDS))
        new = np.arange(self._arrived, come)
        self._queue = np.concatenate([self._queue[gone:], new])[: self._queue_limit]
        self._arrived = come

    def admit(self, most_running: int, capacity_tokens: float) -> None:
        """Since the last mark."""
        first = self._queue[: max(0, most_running - self.running)]
        reserves = np.cumsum(self._trace.prompt_tokens[first] + self._trace.answer_tokens[first])
        count = int(np.searchsorted(reserves, capacity_tokens - self._reserved, "right"))
        if not count:
            return
        chosen, until = first[:count], self._admitted + count
        self._queue = self._queue[count:]
        self._admissions[self._admitted : until] = chosen
        self._admitted_at[self._admitted : until] = np.maximum(self._trace.arrival_seconds[chosen], self._at[-1])
        before = self._prompts[self._admitted]
        self._prompts[self._admitted + 1 : until + 1] = before + np.cumsum(self._trace.prompt_tokens[chosen])
        self._reserved += float(reserves[count - 1])
        self._admitted = until

    def replay(self, tokens: float) -> None:
        """Whoever ends meanwhile need not move any more."""
        self._replay = min(self._replay + tokens, self.held_tokens)

    def stand_still(self, now: float) -> None:
        self._mark(now, self._flows[-1])

    def go_on(self, now: float, seconds: float, pace: Flow) -> None:
        if pace.round_seconds:
            self._answer(seconds / pace.round_seconds)
        computed = pace.prompt_tokens_per_second * seconds
        # Micro-batches move one at a time (`functions/gateway/scheduling/moves.py`), each through one pod of every stage.
        again = min(self._replay, computed, pace.prompt_tokens_per_second_alone * seconds)
        self._replay -= again
        self.replayed_tokens += again
        self._computed = min(self._computed + computed - again, float(self._prompts[self._admitted]))
        done = int(np.searchsorted(self._prompts[: self._admitted + 1], self._computed + 1e-6, "right")) - 1
        if done > self._prompted:
            self._begin(done)
        alone = pace.prompt_tokens_per_second_alone
        if pace.round_seconds:
            self._last_round = (now, pace.round_seconds)
        self._mark(now, (pace.fill_seconds, alone) if alone else self._flows[-1])

    def _begin(self, until: int) -> None:
        """Prompts up to here are computed: their sequences have a first token and go on."""
        chosen = self._admissions[self._prompted : until]
        places = (int(self._tokens) + self._trace.answer_tokens[chosen]) % len(self._ends)
        np.add.at(self._ends, places, 1)
        np.add.at(self._ends_reserved, places, self._trace.prompt_tokens[chosen] + self._trace.answer_tokens[chosen])
        self.held_tokens += float(self._prompts[until] - self._prompts[self._prompted])
        self._prompted = until

    def _answer(self, tokens: float) -> None:
        """Each sequence that answers gets so many more."""
        before, self._tokens = int(self._tokens), self._tokens + tokens
        self.held_tokens += self.decoding * tokens
        for place in range(before + 1, int(self._tokens) + 1):
            index = place % len(self._ends)
            if ended := int(self._ends[index]):
                freed = float(self._ends_reserved[index])
                self._ended += ended
                self._reserved -= freed
                self.held_tokens = max(0.0, self.held_tokens - freed)
                self._ends[index], self._ends_reserved[index] = 0, 0.0

    def _mark(self, now: float, pace: tuple[float, float]) -> None:
        self._at.append(now)
        self._computed_curve.append(self._computed)
        self._tokens_curve.append(self._tokens)
        self._flows.append(pace)

    def times(self) -> tuple[Floats, Floats]:
        """When each request's first and last token came; NaN: not yet, or never."""
        at, computed, tokens = map(np.array, (self._at, self._computed_curve, self._tokens_curve))
        fill, alone = np.array(self._flows).T
        chosen = self._admissions[: self._prompted]
        answers = self._trace.answer_tokens[chosen]
        rising, growing = _rising(computed), _rising(tokens)
        begun = np.interp(self._prompts[: self._prompted], computed[rising], at[rising])
        begun = np.maximum(begun, self._admitted_at[: self._prompted])
        # A mark tells of the step that ends with it.
        step = np.minimum(np.searchsorted(at, begun, "right"), len(at) - 1)
        done = np.interp(self._prompts[1 : self._prompted + 1], computed[rising], at[rising])
        first = np.maximum(begun + self._trace.prompt_tokens[chosen] / alone[step] + fill[step], done)
        wanted = np.interp(first, at, tokens) + answers - 1
        # Who began within a step counted from its end, and ended as much too early: their last tokens came at the last pace.
        when, seconds = self._last_round
        beyond = when + (wanted - tokens[-1]) * seconds
        last = np.where(wanted > tokens[-1], beyond, np.interp(wanted, tokens[growing], at[growing]))
        last = np.where(answers == 1, first, last)
        firsts, lasts = np.full(len(self._trace), np.nan), np.full(len(self._trace), np.nan)
        firsts[chosen], lasts[chosen] = first, last
        firsts[firsts > at[-1]] = np.nan
        lasts[np.isnan(firsts) | (lasts > at[-1])] = np.nan
        return firsts, lasts


def _rising(curve: Floats) -> Any:
    """Indexes where a curve that never falls is about to rise or has just: its level parts would have no inverse."""
    kept = np.ones(len(curve), bool)
    kept[1:] = np.diff(curve) > 0
    kept[:-1] |= np.diff(curve) > 0
    return np.flatnonzero(kept)
