"""The present state of the fleet: data of `GET /v1/fleet/events`, and of the metrics of each member."""

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from msgspec import Struct
from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from functions.gateway.fleet.grants import Grants, MemberPods
from functions.gateway.fleet.members import Members, Version
from functions.gateway.fleet.parts import Part, Parts

_log = logging.getLogger(__name__)

FLEET_EVENTS: Final = "/v1/fleet/events"
_LOOK_SECONDS: Final = 1.0
_STATES: Final = ("asleep", "loading", "loaded", "failed")  # of members at this gateway

# zero: no pod. waiting: requests wait for a device. starting: a stage has no pod that works yet. failed: this gateway cannot
# serve it, as its log says.
MemberStatus = Literal["zero", "waiting", "starting", "serving", "leaving", "failed"]


class MemberState(Struct, frozen=True, kw_only=True):
    """The state of a member or of its canary."""

    model: str
    percent: int | None = None  # share of the model's requests that a canary takes; None: no canary
    state: MemberStatus
    stages: int
    pods: int  # of all stages, those that start or leave included
    pod_seconds: float  # what they have cost since this gateway began to look
    tokens_per_second: float  # drawn for requests of this gateway
    running: int  # sequences
    waiting: int  # requests, for a device or their turn
    device_wait_seconds: float | None = None  # of the oldest request that waits for a device; None: none does


class FleetState(Struct, frozen=True, kw_only=True):
    """State of a fleet: data of the event `snapshot`. The data of a `change` is a JSON merge patch (RFC 7396) of it."""

    fleet: str
    ready: bool  # this gateway knows the members
    devices: int  # pods of all members, also of those that the client may not ask
    max_devices: int | None = None
    tokens_per_second: float
    members: dict[str, MemberState]  # by name; only those that the client may ask


@dataclass(eq=False)
class Overview:
    """Samples the state of all members once a second, and adds up the seconds of their pods. Thread-safe."""

    _members: Members
    _parts: Parts
    _grants: Grants | None
    _pods: Callable[[Sequence[str]], MemberPods]  # as in Grants
    _max_devices: int | None

    def __post_init__(self) -> None:
        self._looked_at = time.monotonic()
        self._states: dict[str, MemberState] = {}  # replaced as a whole by each look
        self._tokens: dict[Version, int] = {}
        self._stopped = threading.Event()
        self.thread = threading.Thread(target=self._keep_looking, name="fleet-overview", daemon=True)

    def stop(self) -> None:
        self._stopped.set()
        self.thread.join(_LOOK_SECONDS)

    def state(self, fleet: str, models: Iterable[str]) -> FleetState:
        """Returns the state of the last sample, with the members of those `models` that the client may use."""
        states, own = self._states, frozenset(models)
        return FleetState(
            fleet=fleet,
            ready=self._members.listed.is_set(),
            devices=sum(each.pods for each in states.values()),
            max_devices=self._max_devices,
            tokens_per_second=round(sum(each.tokens_per_second for each in states.values()), 1),
            members={name: each for name, each in states.items() if each.model in own},
        )

    def counts(self) -> dict[str, int]:
        """Returns how many members are in each state at this gateway."""
        count = Counter[str](part.state for part in self._parts.loaded())
        asleep = max(0, len(self._members.versions()) - count.total())
        return {state: count[state] for state in _STATES} | {"asleep": asleep}

    def metrics(self) -> Iterator[Metric]:
        return fleet_metrics(self.counts(), self._parts.evictions, self._states.values())

    def look(self) -> None:
        now = time.monotonic()
        seconds, self._looked_at = now - self._looked_at, now
        parts = {part.version: part for part in self._parts.loaded()}
        waits = {} if self._grants is None else self._grants.waits()
        states: dict[str, MemberState] = {}
        tokens: dict[Version, int] = {}
        for version in self._members.versions():
            part, before = parts.get(version), self._states.get(version.name)
            status = None if part is None or part.function is None else part.function.running.scheduler.status()
            drawn = 0
            if status is not None:
                tokens[version] = status.tokens
                drawn = max(0, status.tokens - self._tokens.get(version, status.tokens))
            pods = self._pods(version.services)
            queued, waited = waits.get(version.devices_key, (0, None))
            running, waiting = (0, queued) if status is None else (status.running, status.waiting + queued)
            states[version.name] = MemberState(
                model=version.model,
                percent=version.percent,
                state=self._status(version, part, pods, queued, running + waiting),
                stages=len(version.services),
                pods=pods.pods,
                pod_seconds=round((0.0 if before is None else before.pod_seconds) + pods.pods * seconds, 1),
                tokens_per_second=round(drawn / seconds, 1) if seconds > 0 else 0.0,
                running=running,
                waiting=waiting,
                device_wait_seconds=None if waited is None else round(waited, 1),
            )
        self._states, self._tokens = states, tokens

    def _status(self, version: Version, part: Part | None, pods: MemberPods, queued: int, requests: int) -> MemberStatus:
        if version.config is None or (part is not None and part.state == "failed"):
            return "failed"
        if queued:
            return "waiting"
        if pods.pods == pods.leaving:
            return "starting" if requests else "leaving" if pods.leaving else "zero"
        return "serving" if pods.ready else "starting"

    def _keep_looking(self) -> None:
        while not self._stopped.wait(_LOOK_SECONDS):
            try:
                self.look()
            except Exception:  # noqa: BLE001 - the page would stand still for ever
                _log.exception("looking at the fleet failed")


def fleet_metrics(counts: Mapping[str, int], evictions: int, members: Iterable[MemberState]) -> Iterator[Metric]:
    """Yields the fleet's metrics.

    `counts` has the number of members in each state here, `evictions` that of evictions so far.
    """
    states = GaugeMetricFamily("lamina_fleet_members", "Members of the fleet by their state here", labels=["state"])
    for state, count in counts.items():
        states.add_metric([state], count)
    yield states
    yield CounterMetricFamily("lamina_fleet_evictions", "Members given up for memory while idle", evictions)
    pods = GaugeMetricFamily("lamina_fleet_pods", "Pods of a model's stages", labels=["model"])
    cost = CounterMetricFamily("lamina_fleet_pod_seconds", "Seconds of pods of a model's stages", labels=["model"])
    wait = GaugeMetricFamily(
        "lamina_fleet_device_wait_seconds", "Age of the oldest request of a model that waits for a device", labels=["model"]
    )
    by_model: dict[str, list[MemberState]] = {}
    for each in members:
        by_model.setdefault(each.model, []).append(each)
    for model, own in by_model.items():
        pods.add_metric([model], sum(each.pods for each in own))
        cost.add_metric([model], sum(each.pod_seconds for each in own))
        wait.add_metric([model], max(each.device_wait_seconds or 0.0 for each in own))
    yield from (pods, cost, wait)


@dataclass(eq=False)
class FleetCollector(Collector):
    """Merges the metrics of all loaded members into one registry. The label `model` has only names of members' models.

    A member's series end when its part is closed, and begin at 0 when it is loaded again. So the gateway's memory and the
    fleet's members bound the number of series.
    """

    _own: CollectorRegistry
    _loaded: Callable[[], Iterable[tuple[str, CollectorRegistry]]]  # model and registry of each part
    _fleet: Callable[[], Iterable[Metric]]  # as `fleet_metrics` makes them

    def collect(self) -> Iterator[Metric]:
        yield from self._fleet()
        families = {family.name: family for family in self._own.collect()}
        for model, registry in self._loaded():
            for family in registry.collect():
                if family.name in ("lamina_ready", "lamina_startup_phase_seconds"):  # of the process
                    continue
                known = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
                known.samples += [sample._replace(labels={"model": model, **sample.labels}) for sample in family.samples]
        yield from families.values()
