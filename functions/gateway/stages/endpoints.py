"""Watches the instances of stages in the EndpointSlices of their private Services, with one watch for all stages."""

import logging
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final
from urllib.parse import urlsplit

import msgspec

from eventing.http.pod_network import PodNetwork
from functions.gateway.stages.kubernetes_api import KubernetesAPI, KubernetesItem, ObjectWatch
from functions.gateway.stages.routes import Endpoint

_log = logging.getLogger(__name__)

SERVICE_LABEL: Final = "serving.knative.dev/service"
REVISION_LABEL: Final = "serving.knative.dev/revision"
SERVICE_TYPE_LABEL: Final = "networking.internal.knative.dev/serviceType"
PRIVATE: Final = f"{SERVICE_TYPE_LABEL}=Private"  # selects the slices that list a revision's pods

OnEndpoints = Callable[[Sequence[Endpoint] | None], None]  # all endpoints of a Service after a change; None: unknown


class Conditions(msgspec.Struct, frozen=True):
    ready: bool | None = None
    serving: bool | None = None  # it answers, also while it terminates
    terminating: bool | None = None


class Address(msgspec.Struct):
    addresses: tuple[str, ...] = ()
    conditions: Conditions = Conditions()


class Port(msgspec.Struct):
    port: int | None = None
    name: str | None = None


class Slice(KubernetesItem):
    endpoints: tuple[Address, ...] | None = None
    ports: tuple[Port, ...] | None = None


@dataclass(frozen=True, slots=True)
class Found:
    """The addresses of one stage's pods, as its EndpointSlices list them, whether ready or not.

    Addresses outside the pod network are kept apart, because the gateway must not send to them.
    """

    endpoints: list[Endpoint]  # inside the pod network, one per address and port
    refused: dict[str, str]  # addresses outside of it, with slice and port for the log


@dataclass(frozen=True, slots=True)
class PodCount:
    """How many pods a Service has."""

    pods: int = 0  # also those that start or terminate
    terminating: int = 0
    serves: bool = False  # one of them takes work


def with_last(endpoints: list[Endpoint]) -> list[Endpoint]:
    """Returns the endpoints. If none is ready, marks as ready those that terminate and still answer."""
    if any(each.ready and not each.terminating for each in endpoints):
        return endpoints
    return [replace(each, ready=True, terminating=False) if each.terminating and each.serving else each for each in endpoints]


def service_name(url: str) -> str:
    """Returns the Service's name from its URL: `http://stage-0.default.svc.cluster.local` → `stage-0`."""
    return (urlsplit(url).hostname or "").partition(".")[0]


def endpoints_of(slices: Iterable[Slice], pods: PodNetwork) -> Found:
    """Collects the pods' addresses from the EndpointSlices of one stage.

    Requests may be sent to the network `pods` only. Addresses outside it are returned as refused. Missing fields have
    Kubernetes's defaults.
    """
    found: dict[str, Endpoint] = {}
    refused: dict[str, str] = {}
    for each in slices:
        port = _port(each.ports or (), pods)
        for address in each.endpoints or ():
            for host in address.addresses[:1]:
                if port is None or not pods.admits(host, port):
                    refused[host] = f"{each.metadata.name}: {host} port {port}"
                    continue
                endpoint = Endpoint(
                    url=f"{pods.scheme}://[{host}]:{port}" if ":" in host else f"{pods.scheme}://{host}:{port}",
                    revision=(each.metadata.labels or {}).get(REVISION_LABEL, ""),
                    ready=address.conditions.ready is not False,
                    terminating=bool(address.conditions.terminating),
                    serving=address.conditions.serving is not False,
                )
                known = found.get(endpoint.url)
                if known is None or (endpoint.ready and not known.ready):
                    found[endpoint.url] = endpoint
    return Found(list(found.values()), refused)


def _port(ports: Sequence[Port], pods: PodNetwork) -> int | None:
    """Returns the port for requests, or None if there is none or the choice is not clear.

    Without TLS, this is the port named http, else the only port. With TLS, this is the pods' configured port, as Knative's
    activator does (`useSecurePort`), else the port named https.
    """
    if pods.secure and pods.port:
        return pods.port
    named = [port for port in ports if port.name == pods.scheme] or ([] if pods.secure else ports)
    return named[0].port if len(named) == 1 else None


class EndpointsWatch:
    """Watches EndpointSlices of a namespace and reports changes of Services' instances. Thread-safe."""

    def __init__(
        self, api: KubernetesAPI, pods: PodNetwork, services: Sequence[str] | None = None, *, keeps_last: bool = False
    ) -> None:
        """Watches the slices of the Knative Services named in `services`. If it is None, watches all of the namespace.

        Only Services that are followed are reported. If `keeps_last`, a Service's last pod is reported as ready while it
        terminates and still answers. queue-proxy lets it answer until 30 s have passed without a request.
        """
        self._pods = pods
        self._keeps_last = keeps_last
        self._lock = threading.Lock()  # held during reports, so that they come in the order of the changes
        self._followed: dict[str, _Followed] = {}
        self._by_service: dict[str, list[Slice]] = {}
        self._listed = False
        self._unknown = False
        chosen = PRIVATE if services is None else f"{SERVICE_LABEL} in ({','.join(services)}),{PRIVATE}"
        names = f"of {', '.join(services)}" if services is not None else "of all Services"
        self.slices = ObjectWatch(api, chosen, Slice, f"the instances {names}", self._changed, self._lost)

    def follow(self, service: str, on_change: OnEndpoints) -> None:
        """Reports the Service's instances to `on_change` after each change, and also at once if they are known."""
        with self._lock:
            followed = self._followed[service] = _Followed(service, self._pods, on_change, keeps_last=self._keeps_last)
            if self._unknown:
                on_change(None)
            elif self._listed:
                followed.tell(self._by_service.get(service, ()))

    def unfollow(self, service: str) -> None:
        with self._lock:
            self._followed.pop(service, None)

    def pods_of(self, service: str) -> PodCount:
        """Counts the Service's pods now, including those that start or terminate."""
        with self._lock:
            slices = self._by_service.get(service, ())
        if not slices:
            return PodCount()
        found = endpoints_of(slices, self._pods).endpoints
        serving = with_last(found) if self._keeps_last else found
        return PodCount(
            len(found), sum(each.terminating for each in found), any(each.ready and not each.terminating for each in serving)
        )

    def refused(self, service: str) -> int:
        """Returns how many addresses of the Service are ignored because they are outside the pod network."""
        with self._lock:
            followed = self._followed.get(service)
            return 0 if followed is None else len(followed.refused)

    def _changed(self, slices: Mapping[str, Slice], changed: Slice | None) -> None:
        by_service: dict[str, list[Slice]] = {}
        for each in slices.values():
            by_service.setdefault(_service_of(each), []).append(each)
        with self._lock:
            self._by_service, self._listed, self._unknown = by_service, True, False
            services = list(self._followed) if changed is None else [_service_of(changed)]
            errors = []
            for service in services:
                if (followed := self._followed.get(service)) is not None:
                    try:
                        followed.tell(by_service.get(service, ()))
                    except Exception as error:  # noqa: BLE001 - the others are told first
                        errors.append(error)
        if errors:
            raise errors[0]

    def _lost(self) -> None:
        with self._lock:
            self._unknown = True
            for followed in self._followed.values():
                followed.on_change(None)


def _service_of(each: Slice) -> str:
    return (each.metadata.labels or {}).get(SERVICE_LABEL, "")


class _Followed:
    """A Service that is followed: passes its instances to `on_change`."""

    def __init__(self, service: str, pods: PodNetwork, on_change: OnEndpoints, *, keeps_last: bool) -> None:
        self._service = service
        self._keeps_last = keeps_last
        self._pods = pods
        self.on_change = on_change
        self.refused: dict[str, str] = {}
        self._falls_back = False  # all addresses are refused, so requests go to the Service URL

    def tell(self, slices: Iterable[Slice]) -> None:
        found = endpoints_of(slices, self._pods)
        for host in found.refused.keys() - self.refused.keys():
            _log.warning("%s is ignored: it is not in the pod network, %s", found.refused[host], self._pods)
        self.refused = found.refused
        fell_back, self._falls_back = self._falls_back, bool(found.refused) and not found.endpoints
        if not self._falls_back:
            self.on_change(with_last(found.endpoints) if self._keeps_last else found.endpoints)
        elif not fell_back:
            _log.error(
                "no instance of %s is in the pod network, %s: requests %s; set gateway.pod_network to the pods' network",
                self._service,
                self._pods,
                "wait, because TLS leads to pods only"
                if self._pods.secure
                else "go to its Service URL, which is slower and spreads them badly",
            )
            self.on_change(())
            self.on_change(None)
