"""Watches the ready instances of each stage, in the EndpointSlices of its private Services.

Lists, then watches from the list's resourceVersion, lists again on 410, and reconnects with back-off.
"""

import logging
import random
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final
from urllib.parse import urlsplit

import urllib3

from eventing.http.pod_network import PodNetwork
from functions.gateway.stages.endpoint_slices import (
    CONNECT_SECONDS,
    GONE,
    REVISION_LABEL,
    Expired,
    KubernetesAPI,
    KubernetesError,
    Port,
    Slice,
    WatchEvent,
    lines_of,
    read_event,
    read_slice,
    read_status,
)
from functions.gateway.stages.readiness import OnChange
from functions.gateway.stages.routes import Endpoint

_log = logging.getLogger(__name__)

_FIRST_PAUSE_SECONDS: Final = 0.1
_LONGEST_PAUSE_SECONDS: Final = 10.0


@dataclass(frozen=True, slots=True)
class Found:
    """The addresses of one stage's pods, as its EndpointSlices list them, whether ready or not.

    Those outside the pod network are kept apart, because the gateway must not send to them.
    """

    endpoints: list[Endpoint]  # inside the pod network, one per address and port
    refused: dict[str, str]  # addresses outside of it, with slice and port for the log


def service_name(url: str) -> str:
    """The name of the Service in its URL: `http://stage-0.default.svc.cluster.local` → `stage-0`."""
    return (urlsplit(url).hostname or "").partition(".")[0]


def endpoints_of(slices: Iterable[Slice], pods: PodNetwork) -> Found:
    """Collects the pods' addresses from the EndpointSlices of one stage. Missing fields have Kubernetes's defaults.

    pods: the network to which requests may be sent; addresses outside it are returned as refused.
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
                )
                known = found.get(endpoint.url)
                if known is None or (endpoint.ready and not known.ready):
                    found[endpoint.url] = endpoint
    return Found(list(found.values()), refused)


def _port(ports: Sequence[Port], pods: PodNetwork) -> int | None:
    """The port for requests: the one named http, else the only one; None if there is no port, or several and none named http.

    With TLS: the pods' configured port, as Knative's activator does (`useSecurePort`), else the one named https.
    """
    if pods.secure and pods.port:
        return pods.port
    named = [port for port in ports if port.name == pods.scheme] or ([] if pods.secure else ports)
    return named[0].port if len(named) == 1 else None


class EndpointsWatch:
    """Watches every stage's EndpointSlices and reports changes of its instances to `on_change`, in one thread per stage."""

    def __init__(self, api: KubernetesAPI, services: Sequence[str], pods: PodNetwork, on_change: OnChange) -> None:
        """services: names of the stages' Knative Services."""
        self._followers = [_Follower(api, stage, service, pods, on_change) for stage, service in enumerate(services)]

    def refused(self, stage: int) -> int:
        """How many addresses of `stage` are ignored because they are outside of the pod network."""
        return len(self._followers[stage].refused)

    def start(self) -> None:
        for follower in self._followers:
            follower.thread.start()

    def stop(self) -> None:
        for follower in self._followers:
            follower.stop()
        for follower in self._followers:
            follower.thread.join(CONNECT_SECONDS)


class _Follower:
    """Lists and watches the EndpointSlices of one stage in a thread."""

    def __init__(self, api: KubernetesAPI, stage: int, service: str, pods: PodNetwork, on_change: OnChange) -> None:
        self._api = api
        self._stage = stage
        self._service = service
        self._pods = pods
        self._on_change = on_change
        self._slices: dict[str, Slice] = {}
        self.refused: dict[str, str] = {}
        self._falls_back = False  # all addresses are refused, so requests go to the Service URL
        self._resource_version = ""
        self._has_listed = False  # if it has, its endpoints are kept while the API is unavailable
        self._stopped = threading.Event()
        self._stream: urllib3.BaseHTTPResponse | None = None
        self.thread = threading.Thread(target=self._run, name=f"endpoints-{service}", daemon=True)

    def stop(self) -> None:
        self._stopped.set()
        stream = self._stream
        if stream is not None:
            stream.shutdown()

    def _run(self) -> None:
        """The thread's loop. It survives all errors: otherwise the gateway would go on sending to instances that are gone."""
        pause = _FIRST_PAUSE_SECONDS
        while not self._stopped.is_set():
            try:
                if not self._resource_version:
                    self._list()
                self._follow()
                pause = _FIRST_PAUSE_SECONDS
                self._stopped.wait(_FIRST_PAUSE_SECONDS)
                continue
            except Expired:
                self._resource_version = ""
            except Exception as error:  # noqa: BLE001 - errors of `on_change` too must not end the thread
                if self._stopped.is_set():
                    return
                self._failed(error)
            self._stopped.wait(pause * random.uniform(0.75, 1.25))
            pause = min(_LONGEST_PAUSE_SECONDS, 2 * pause)

    def _failed(self, error: Exception) -> None:
        expected = isinstance(error, KubernetesError | urllib3.exceptions.HTTPError | OSError | ValueError)
        _log.warning(
            "watching the instances of %s failed, trying again: %s", self._service, error, exc_info=None if expected else error
        )
        self._resource_version = ""
        if not self._has_listed or (isinstance(error, KubernetesError) and error.without_right):
            try:
                self._on_change(self._stage, None)
            except Exception:  # noqa: BLE001 - must not end the thread
                _log.exception("the scheduler could not be told that the instances of %s are unknown", self._service)

    def _list(self) -> None:
        found = self._api.list(self._service)
        self._slices = {each.metadata.name: each for each in found.items}
        self._resource_version = found.metadata.resource_version
        self._has_listed = True
        self._tell()

    def _follow(self) -> None:
        """Watches and applies changes until the server ends the watch."""
        stream = self._api.watch(self._service, self._resource_version)
        self._stream = stream
        try:
            lines = lines_of(stream)
            while not self._stopped.is_set() and (line := next(lines, None)) is not None:
                self._apply(read_event(line))
        finally:
            self._stream = None
            stream.close()

    def _apply(self, event: WatchEvent) -> None:
        if event.type == "ERROR":
            status = read_status(event.object)
            raise Expired if status.code == GONE else KubernetesError(status.code, status.message)
        each = read_slice(event.object)
        self._resource_version = each.metadata.resource_version or self._resource_version
        if event.type == "BOOKMARK":
            return
        if event.type == "DELETED":
            self._slices.pop(each.metadata.name, None)
        else:
            self._slices[each.metadata.name] = each
        self._tell()

    def _tell(self) -> None:
        found = endpoints_of(self._slices.values(), self._pods)
        for host in found.refused.keys() - self.refused.keys():
            _log.warning("%s is ignored: it is not in the pod network, %s", found.refused[host], self._pods)
        self.refused = found.refused
        fell_back, self._falls_back = self._falls_back, bool(found.refused) and not found.endpoints
        if not self._falls_back:
            self._on_change(self._stage, found.endpoints)
        elif not fell_back:
            _log.error(
                "no instance of %s is in the pod network, %s: requests %s; set gateway.pod_network to the pods' network",
                self._service,
                self._pods,
                "wait, because TLS leads to pods only"
                if self._pods.secure
                else "go to its Service URL, which is slower and spreads them badly",
            )
            self._on_change(self._stage, ())
            self._on_change(self._stage, None)
