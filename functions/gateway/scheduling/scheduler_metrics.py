"""The scheduler's counters as metrics, read whenever somebody asks for them."""

from collections.abc import Callable, Iterator, Mapping

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from functions.gateway.scheduling.stats import Stats


class SchedulerCollector(Collector):
    """stage_names: per stage, as the label `stage`."""

    def __init__(self, stats: Callable[[], Stats], stage_names: list[str]) -> None:
        self._stats = stats
        self._stage_names = stage_names

    def collect(self) -> Iterator[Metric]:
        stats = self._stats()
        yield GaugeMetricFamily("lamina_gateway_waiting_sequences", "Requests that wait for their turn", stats.waiting)
        yield GaugeMetricFamily("lamina_gateway_running_sequences", "Requests that are being answered", stats.running)
        yield GaugeMetricFamily("lamina_gateway_micro_batches", "Micro-batches that exist", stats.micro_batches)
        yield GaugeMetricFamily("lamina_gateway_events_in_flight", "Forward events on their way", stats.trips)
        yield CounterMetricFamily("lamina_gateway_drawn_tokens", "Tokens that came from the last stage", stats.tokens)
        yield CounterMetricFamily(
            "lamina_gateway_sent_prompt_tokens", "Prompt tokens sent, replays included", stats.prompt_tokens
        )
        yield CounterMetricFamily("lamina_gateway_wakes", "Warm-ups of sleeping stages", stats.wakes)
        yield _by_label("lamina_gateway_sequences", "Sequences by how they ended", "outcome", stats.sequences)
        yield _by_label("lamina_gateway_replays", "Sequences computed anew, by cause", "cause", stats.replays)
        yield _by_label("lamina_gateway_moves", "Micro-batches that moved to another instance", "cause", stats.moves)
        yield from self._stages(stats)

    def _stages(self, stats: Stats) -> Iterator[Metric]:
        steps = CounterMetricFamily("lamina_gateway_stage_steps", "Events that a stage answered", labels=["stage"])
        seconds = CounterMetricFamily("lamina_gateway_stage_seconds", "From events to their replies", labels=["stage"])
        for name, stage in zip(self._stage_names, stats.stages, strict=True):
            steps.add_metric([name], stage.steps)
            seconds.add_metric([name], stage.seconds)
        yield from (steps, seconds)


def _by_label(name: str, help_: str, label: str, counts: Mapping[str, int]) -> CounterMetricFamily:
    family = CounterMetricFamily(name, help_, labels=[label])
    for value, count in counts.items():
        family.add_metric([value], count)
    return family
