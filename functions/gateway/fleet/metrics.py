"""Metrics of a fleet's gateway: its own, and those of each loaded member with the label `model`."""

from collections.abc import Callable, Iterable, Iterator, Mapping

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample


class FleetCollector(Collector):
    """Makes one registry's text of all members' registries.

    A member's series end when its part is given up, and begin at 0 when it is loaded again. So their number is bounded by the
    gateway's memory, and by the fleet's members.
    """

    def __init__(
        self,
        own: CollectorRegistry,
        loaded: Callable[[], Iterable[tuple[str, CollectorRegistry]]],
        states: Callable[[], Mapping[str, int]],
        evictions: Callable[[], int],
    ) -> None:
        """loaded: model and registry of each part. states: number of members in each state."""
        self._own = own
        self._loaded = loaded
        self._states = states
        self._evictions = evictions

    def collect(self) -> Iterator[Metric]:
        states = GaugeMetricFamily("lamina_fleet_members", "Members of the fleet by their state here", labels=["state"])
        for state, count in self._states().items():
            states.add_metric([state], count)
        yield states
        yield CounterMetricFamily("lamina_fleet_evictions", "Members given up for memory while idle", self._evictions())
        families = {family.name: family for family in self._own.collect()}
        of_process = {"lamina_ready", "lamina_startup_phase_seconds"}
        for model, registry in self._loaded():
            for family in registry.collect():
                if family.name in of_process:
                    continue
                known = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
                known.samples += [_labelled(sample, model) for sample in family.samples]
        yield from families.values()


def _labelled(sample: Sample, model: str) -> Sample:
    return sample._replace(labels={"model": model, **sample.labels})
