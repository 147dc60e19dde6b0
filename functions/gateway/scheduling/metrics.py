"""The scheduler's statistics as Prometheus metrics, made at each scrape."""

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
_STATUSES: Final = tuple(str(status) for status in Status if status is not Status.OK)
_REPLAY_CAUSES: Final = (*_BROKEN_ROUTES, *_PROBLEMS, *_STATUSES, "rebooted", "moved")
_MIGRATION_CAUSES: Final = ("leaving", "balance")


class SchedulerCollector(Collector):
    def __init__(self, stats: Callable[[], Stats], stage_names: list[str]) -> None:
        """Makes a collector that calls `stats` at each scrape.

        `stage_names` are the values of the label `stage`, in the order of the stages.
        """
        self._stats = stats
        self._stage_names = stage_names

    def collect(self) -> Iterator[Metric]:
        stats = self._stats()
        drafts = {"accepted": stats.draft_tokens_accepted, "rejected": stats.draft_tokens_rejected}
        for name, help_, number in (
            ("waiting_sequences", "Requests that wait for their turn", stats.waiting),
            ("memory_backlog_sequences", "Requests that a stage refused for lack of memory", stats.memory_backlog),
            ("running_sequences", "Requests that are being answered", stats.running),
            ("micro_batches", "Micro-batches that exist", stats.micro_batches),
            ("events_in_flight", "Forward events in flight", stats.trips),
        ):
            yield GaugeMetricFamily(f"lamina_gateway_{name}", help_, number)
        for name, help_, number in (
            ("drawn_tokens", "Tokens drawn by the last stage", stats.tokens),
            ("sent_prompt_tokens", "Prompt tokens sent, replays included", stats.prompt_tokens),
            ("cached_prompt_tokens", "Prompt tokens that every stage held already", stats.cached_tokens),
            ("wake_ups", "Rounds of warm-up events to sleeping stages", stats.wake_ups),
            ("grown_sequences", "Answers that filled their memory and went on with more", stats.grown),
        ):
            yield CounterMetricFamily(f"lamina_gateway_{name}", help_, number)
        by_stage = list(zip(self._stage_names, stats.stages, strict=True))
        steps, seconds = {name: each.steps for name, each in by_stage}, {name: each.seconds for name, each in by_stage}
        labelled: tuple[tuple[str, str, str, Mapping[str, float], Iterable[str]], ...] = (
            ("draft_tokens", "Draft tokens", "outcome", drafts, ()),
            ("sequences", "Sequences that ended", "outcome", stats.sequences, _OUTCOMES),
            ("replays", "Sequences computed again", "cause", stats.replays, _REPLAY_CAUSES),
            ("migrations", "Micro-batches that changed to another instance", "cause", stats.migrations, _MIGRATION_CAUSES),
            ("stage_steps", "Events that a stage answered", "stage", steps, ()),
            ("stage_seconds", "Seconds from events to their replies", "stage", seconds, ()),
            ("step_seconds", "Seconds of the threads that walk trips", "part", stats.seconds_by_part(), ()),
        )
        for name, help_, label, values, initial in labelled:
            family = CounterMetricFamily(f"lamina_gateway_{name}", help_, labels=[label])
            # Prometheus' rate() does not see a series begin, so known label values are there from the start, with 0.
            for value, count in {**dict.fromkeys(initial, 0), **values}.items():
                family.add_metric([value], count)
            yield family
