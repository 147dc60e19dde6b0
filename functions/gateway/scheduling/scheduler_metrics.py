"""The scheduler's counters as metrics, read whenever somebody asks for them."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Final, get_args

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from eventing.problems import PROBLEMS
from eventing.wire.events import Status
from eventing.wire.generation import FinishReason
from functions.gateway.scheduling.stats import Stats

_PROBLEMS: Final = tuple(problem.name for problem in PROBLEMS.values())
_OUTCOMES: Final = (*get_args(FinishReason), *_PROBLEMS)
_BROKEN_ROUTES: Final = ("refused", "broken", "timeout", "infrastructure", "malformed")
_REPLAY_CAUSES: Final = (
    *_BROKEN_ROUTES,
    *_PROBLEMS,
    *(str(status) for status in Status if status is not Status.OK),
    "rebooted",
    "moved",
)
_MOVE_CAUSES: Final = ("leaving", "balance")


class SchedulerCollector(Collector):
    """stage_names: per stage, as the label `stage`."""

    def __init__(self, stats: Callable[[], Stats], stage_names: list[str]) -> None:
        self._stats = stats
        self._stage_names = stage_names

    def collect(self) -> Iterator[Metric]:
        stats = self._stats()
        yield GaugeMetricFamily("lamina_gateway_waiting_sequences", "Requests that wait for their turn", stats.waiting)
        yield GaugeMetricFamily(
            "lamina_gateway_hungry_sequences", "Requests that wait because a stage has no memory for them", stats.hungry
        )
        yield GaugeMetricFamily("lamina_gateway_running_sequences", "Requests that are being answered", stats.running)
        yield GaugeMetricFamily("lamina_gateway_micro_batches", "Micro-batches that exist", stats.micro_batches)
        yield GaugeMetricFamily("lamina_gateway_events_in_flight", "Forward events on their way", stats.trips)
        yield CounterMetricFamily("lamina_gateway_drawn_tokens", "Tokens that came from the last stage", stats.tokens)
        yield CounterMetricFamily(
            "lamina_gateway_sent_prompt_tokens", "Prompt tokens sent, replays included", stats.prompt_tokens
        )
        yield CounterMetricFamily(
            "lamina_gateway_cached_prompt_tokens", "Prompt tokens that every stage held already", stats.cached_tokens
        )
        draft_tokens = {"accepted": stats.draft_tokens_accepted, "rejected": stats.draft_tokens_rejected}
        yield _by_label("lamina_gateway_draft_tokens", "Draft tokens, by what became of them", "outcome", draft_tokens, ())
        yield CounterMetricFamily("lamina_gateway_wakes", "Warm-ups of sleeping stages", stats.wakes)
        yield _by_label("lamina_gateway_sequences", "Sequences by how they ended", "outcome", stats.sequences, _OUTCOMES)
        yield _by_label("lamina_gateway_replays", "Sequences computed anew, by cause", "cause", stats.replays, _REPLAY_CAUSES)
        yield CounterMetricFamily("lamina_gateway_grown_sequences", "Answers that went on with more memory", stats.grown)
        yield _by_label(
            "lamina_gateway_moves", "Micro-batches that moved to another instance", "cause", stats.moves, _MOVE_CAUSES
        )
        yield from self._stages(stats)

    def _stages(self, stats: Stats) -> Iterator[Metric]:
        steps = CounterMetricFamily("lamina_gateway_stage_steps", "Events that a stage answered", labels=["stage"])
        seconds = CounterMetricFamily("lamina_gateway_stage_seconds", "From events to their replies", labels=["stage"])
        for name, stage in zip(self._stage_names, stats.stages, strict=True):
            steps.add_metric([name], stage.steps)
            seconds.add_metric([name], stage.seconds)
        parts = CounterMetricFamily("lamina_gateway_step_seconds", "Of threads that go round the stages", labels=["part"])
        for part, spent in stats.parts().items():
            parts.add_metric([part], spent)
        yield from (steps, seconds, parts)


def _by_label(name: str, help_: str, label: str, counts: Mapping[str, int], born: Iterable[str]) -> CounterMetricFamily:
    """born: values that are there from 0 on, because a rate does not see a series begin."""
    family = CounterMetricFamily(name, help_, labels=[label])
    for value, count in {**dict.fromkeys(born, 0), **counts}.items():
        family.add_metric([value], count)
    return family
