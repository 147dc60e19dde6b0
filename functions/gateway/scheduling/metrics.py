"""What the scheduler counts and measures, and the same as Prometheus metrics, which are made when somebody reads them."""

import copy
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final, get_args

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from eventing.problems import PROBLEMS
from eventing.wire.events import Status
from eventing.wire.generation import FinishReason
from functions.gateway.scheduling.batching import RowCosts

_QUICKER_WEIGHT: Final = 0.3  # weight of a new measurement that is quicker than the estimate
_SLOWER_WEIGHT: Final = 0.01  # weight of a slower one: waiting makes steps slow, nothing makes them quick

_PROBLEMS: Final = tuple(problem.name for problem in PROBLEMS.values())
_OUTCOMES: Final = (*get_args(FinishReason), *_PROBLEMS)
_BROKEN_ROUTES: Final = ("refused", "broken", "timeout", "infrastructure", "malformed")
_STATUSES: Final = tuple(str(status) for status in Status if status is not Status.OK)
_REPLAY_CAUSES: Final = (*_BROKEN_ROUTES, *_PROBLEMS, *_STATUSES, "rebooted", "moved")
_MIGRATION_CAUSES: Final = ("leaving", "balance")


@dataclass(slots=True)
class StageStats:
    """What the gateway measured of one stage."""

    steps: int = 0
    seconds: float = 0.0  # of all steps, from request to reply: network, queueing and compute
    exchange_seconds: float = 0.0  # part of `seconds`: from the request's first byte to the reply's last
    service_seconds: float = 0.0  # a decode step that does not wait, network included; moving estimate, 0: unknown
    network_seconds: float = 0.0  # an event's way to the stage and back; moving estimate
    costs: RowCosts = field(default_factory=RowCosts)  # decode steps at the stage, without the network

    def step(
        self, seconds: float, decode_tokens: int, exchange_seconds: float = 0.0, engine_seconds: float | None = None
    ) -> None:
        """Takes in a step. decode_tokens: 0 for prompt chunks. engine_seconds: the stage's own account, if it gave one."""
        self.steps += 1
        self.seconds += seconds
        self.exchange_seconds += exchange_seconds
        if decode_tokens:
            at_stage = seconds if engine_seconds is None else engine_seconds
            self.costs.step(decode_tokens, at_stage)
            self.service_seconds = _moved_estimate(self.service_seconds, seconds)
            self.network_seconds = _moved_estimate(self.network_seconds, max(0.0, seconds - at_stage))


def _moved_estimate(estimate: float, seconds: float) -> float:
    weight = 1.0 if not estimate else _QUICKER_WEIGHT if seconds < estimate else _SLOWER_WEIGHT
    return estimate + weight * (seconds - estimate)


@dataclass(slots=True)
class Stats:
    """Counters since the start. `waiting` to `trips` say how it stands now; `Scheduler.stats` sets them."""

    stages: list[StageStats]
    waiting: int = 0
    memory_backlog: int = 0  # those of `waiting` that a stage refused for lack of memory
    running: int = 0
    micro_batches: int = 0
    trips: int = 0
    steps_seconds: float = 0.0  # all seconds of the threads that walk trips
    deciding_seconds: float = 0.0  # part of `steps_seconds`: with the lock, or waiting for it
    tokens: int = 0  # drawn by the last stage
    prompt_tokens: int = 0  # sent to the first stage, replays included
    cached_tokens: int = 0  # prompt tokens that every stage held when the first chunk was sent
    draft_tokens_accepted: int = 0
    draft_tokens_rejected: int = 0
    sequences: Counter[str] = field(default_factory=Counter)  # ended, by finish reason or problem name
    replays: Counter[str] = field(default_factory=Counter)  # sequences whose KV was computed again, by cause
    grown: int = 0  # times that an open-ended answer filled its memory and asked for more
    migrations: Counter[str] = field(default_factory=Counter)  # micro-batches, by cause: leaving or balance
    wake_ups: int = 0  # rounds of warm-up events

    def step_over(self, began: float, walked: float) -> float:
        """Counts a thread's step, from `began`; its trip was over at `walked`. Returns now, when its next step begins.

        All in time.perf_counter().
        """
        now = time.perf_counter()
        self.deciding_seconds += now - walked
        self.steps_seconds += now - began
        return now

    def seconds_by_part(self) -> dict[str, float]:
        """What the seconds of steps were spent on."""
        hops = sum(stage.seconds for stage in self.stages)
        exchange = sum(stage.exchange_seconds for stage in self.stages)
        rows = max(0.0, self.steps_seconds - hops - self.deciding_seconds)
        return {"exchange": exchange, "events": hops - exchange, "deciding": self.deciding_seconds, "rows": rows}

    def snapshot(self) -> "Stats":
        return copy.deepcopy(self)


class SchedulerCollector(Collector):
    def __init__(self, stats: Callable[[], Stats], stage_names: list[str]) -> None:
        """stage_names: values of the label `stage`, in order."""
        self._stats = stats
        self._stage_names = stage_names

    def collect(self) -> Iterator[Metric]:
        stats = self._stats()
        drafts = {"accepted": stats.draft_tokens_accepted, "rejected": stats.draft_tokens_rejected}
        yield GaugeMetricFamily("lamina_gateway_waiting_sequences", "Requests that wait for their turn", stats.waiting)
        yield GaugeMetricFamily(
            "lamina_gateway_memory_backlog_sequences", "Requests that a stage refused for lack of memory", stats.memory_backlog
        )
        yield GaugeMetricFamily("lamina_gateway_running_sequences", "Requests that are being answered", stats.running)
        yield GaugeMetricFamily("lamina_gateway_micro_batches", "Micro-batches that exist", stats.micro_batches)
        yield GaugeMetricFamily("lamina_gateway_events_in_flight", "Forward events in flight", stats.trips)
        yield CounterMetricFamily("lamina_gateway_drawn_tokens", "Tokens drawn by the last stage", stats.tokens)
        yield CounterMetricFamily(
            "lamina_gateway_sent_prompt_tokens", "Prompt tokens sent, replays included", stats.prompt_tokens
        )
        yield CounterMetricFamily(
            "lamina_gateway_cached_prompt_tokens", "Prompt tokens that every stage held already", stats.cached_tokens
        )
        yield CounterMetricFamily("lamina_gateway_wake_ups", "Rounds of warm-up events to sleeping stages", stats.wake_ups)
        yield CounterMetricFamily(
            "lamina_gateway_grown_sequences", "Answers that filled their memory and went on with more", stats.grown
        )
        yield _by_label("lamina_gateway_draft_tokens", "Draft tokens", "outcome", drafts, ())
        yield _by_label("lamina_gateway_sequences", "Sequences that ended", "outcome", stats.sequences, _OUTCOMES)
        yield _by_label("lamina_gateway_replays", "Sequences computed again", "cause", stats.replays, _REPLAY_CAUSES)
        yield _by_label(
            "lamina_gateway_migrations",
            "Micro-batches that changed to another instance",
            "cause",
            stats.migrations,
            _MIGRATION_CAUSES,
        )
        by_stage = list(zip(self._stage_names, stats.stages, strict=True))
        steps, seconds = {name: each.steps for name, each in by_stage}, {name: each.seconds for name, each in by_stage}
        yield _by_label("lamina_gateway_stage_steps", "Events that a stage answered", "stage", steps, ())
        yield _by_label("lamina_gateway_stage_seconds", "Seconds from events to their replies", "stage", seconds, ())
        yield _by_label(
            "lamina_gateway_step_seconds", "Seconds of the threads that walk trips", "part", stats.seconds_by_part(), ()
        )


def _by_label(name: str, help_: str, label: str, values: Mapping[str, float], initial: Iterable[str]) -> CounterMetricFamily:
    """initial: label values that exist from 0 on, because Prometheus' rate() does not see a series begin."""
    family = CounterMetricFamily(name, help_, labels=[label])
    for value, count in {**dict.fromkeys(initial, 0), **values}.items():
        family.add_metric([value], count)
    return family
