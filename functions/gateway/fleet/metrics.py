"""Metrics of a fleet's gateway: its own, and those of each loaded member with the label `model`."""

from collections.abc import Callable, Iterable, Iterator, Mapping

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

from functions.gateway.fleet.overview import ModelUse


class FleetCollector(Collector):
    """Makes one registry's text of all members' registries. The label `model` has names of members' models only.

    A member's series end when its part is given up, and begin at 0 when it is loaded again. So their number is bounded by the
    gateway's memory, and by the fleet's members.
    """

    def __init__(
        self,
        own: CollectorRegistry,
        loaded: Callable[[], Iterable[tuple[str, CollectorRegistry]]],
        states: Callable[[], Mapping[str, int]],
        evictions: Callable[[], int],
        by_model: Callable[[], Mapping[str, ModelUse]],
    ) -> None:
        """loaded: model and registry of each part. states: number of members in each state. by_model: of all members."""
        self._own = own
        self._loaded = loaded
        self._states = states
        self._evictions = evictions
        self._by_model = by_model

    def collect(self) -> Iterator[Metric]:
        states = GaugeMetricFamily("lamina_fleet_members", "Members of the fleet by their state here", labels=["state"])
        for state, count in self._states().items():
            states.add_metric([state], count)
        yield states
        yield CounterMetricFamily("lamina_fleet_evictions", "Members given up for memory while idle", self._evictions())
        pods = GaugeMetricFamily("lamina_fleet_pods", "Pods of a model's stages", labels=["model"])
        cost = CounterMetricFamily("lamina_fleet_pod_seconds", "Seconds of pods of a model's stages", labels=["model"])
        wait = GaugeMetricFamily(
            "lamina_fleet_device_wait_seconds", "Age of the oldest request of a model that waits for a device", labels=["model"]
        )
        for model, use in self._by_model().items():
            pods.add_metric([model], use.pods)
            cost.add_metric([model], use.pod_seconds)
            wait.add_metric([model], use.device_wait_seconds)
        yield from (pods, cost, wait)
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
