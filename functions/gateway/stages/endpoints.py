"""The watch of ready instances: list and watch of the EndpointSlices behind each stage's private Services.

The Kubernetes API over plain urllib3 (the kubernetes client costs half a second of import): list, then watch from the list's
resourceVersion, list again on 410, reconnect with back-off. `knative/local` serves the same, so this is the code everywhere.
"""

import ipaddress
import logging
import random
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import urlencode, urlsplit

import msgspec
import urllib3

from functions.gateway.stages.instances import Endpoint

_log = logging.getLogger(__name__)

SERVICE_LABEL: Final = "serving.knative.dev/service"
REVISION_LABEL: Final = "serving.knative.dev/revision"
SERVICE_TYPE_LABEL: Final = "networking.internal.knative.dev/serviceType"
SERVICE_ACCOUNT: Final = Path("/var/run/secrets/kubernetes.io/serviceaccount")
CLUSTER_API: Final = "https://kubernetes.default.svc"
IN_CLUSTER: Final = "cluster"

_WATCH_SECONDS: Final = 240
"""How long one watch lasts; the server ends it, and a connection that died in silence is noticed soon after."""
_CONNECT_SECONDS: Final = 5.0
_LIST_SECONDS: Final = 30.0
_FIRST_PAUSE_SECONDS: Final = 0.1
_LONGEST_PAUSE_SECONDS: Final = 10.0
_GONE: Final = 410
_MAX_LINE_BYTES: Final = 16 * 2**20

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
OnChange = Callable[[int, Sequence[Endpoint] | None], None]
"""Stage and all its endpoints, whenever they changed; None when they cannot be known."""


class _Metadata(msgspec.Struct, rename="camel"):
    name: str = ""
    resource_version: str = ""
    labels: dict[str, str] | None = None


class _Conditions(msgspec.Struct, frozen=True):
    ready: bool | None = None
    terminating: bool | None = None


class _Address(msgspec.Struct):
    addresses: tuple[str, ...] = ()
    conditions: _Conditions = _Conditions()


class _Port(msgspec.Struct):
    port: int | None = None
    name: str | None = None


class _Slice(msgspec.Struct):
    metadata: _Metadata
    endpoints: tuple[_Address, ...] | None = None
    ports: tuple[_Port, ...] | None = None


class _SliceList(msgspec.Struct):
    metadata: _Metadata
    items: tuple[_Slice, ...] = ()


class _WatchEvent(msgspec.Struct):
    type: str
    object: msgspec.Raw


class _Status(msgspec.Struct):
    code: int = 0
    message: str = ""


_read_list: Final = msgspec.json.Decoder(_SliceList).decode
_read_event: Final = msgspec.json.Decoder(_WatchEvent).decode
_read_slice: Final = msgspec.json.Decoder(_Slice).decode
_read_status: Final = msgspec.json.Decoder(_Status).decode


class _Expired(Exception):
    """The resourceVersion is too old: list again."""


class _Refused(Exception):
    """The API answered with an error. 401 and 403: this gateway has not the right to watch."""

    def __init__(self, status: int, detail: str) -> None:
        super().__init__(f"the Kubernetes API answered {status}: {detail}")
        self.without_right = status in (401, 403)


@dataclass(frozen=True, slots=True)
class PodNetwork:
    """Which addresses are followed."""

    network: Network
    port: int
    """0: any."""

    def admits(self, address: str, port: int) -> bool:
        try:
            inside = ipaddress.ip_address(address) in self.network
        except ValueError:
            return False
        return inside and self.port in (0, port)


def service_name(url: str) -> str:
    """`http://stage-0.default.svc.cluster.local` → `stage-0`."""
    return (urlsplit(url).hostname or "").partition(".")[0]


def endpoints_of(slices: Iterable[_Slice], pods: PodNetwork) -> list[Endpoint]:
    """All that may be followed, one for each address and port. A slice's fields default as Kubernetes says they do."""
    found: dict[str, Endpoint] = {}
    for each in slices:
        port = _port(each.ports or ())
        for address in each.endpoints or ():
            for host in address.addresses[:1]:
                if port is None or not pods.admits(host, port):
                    _log.warning("%s: %s port %s is not followed: not one of %s", each.metadata.name, host, port, pods)
                    continue
                endpoint = _endpoint(host, port, each, address.conditions)
                known = found.get(endpoint.url)
                if known is None or (endpoint.ready and not known.ready):
                    found[endpoint.url] = endpoint
    return list(found.values())


def _endpoint(host: str, port: int, each: _Slice, conditions: _Conditions) -> Endpoint:
    return Endpoint(
        url=f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}",
        revision=(each.metadata.labels or {}).get(REVISION_LABEL, ""),
        ready=conditions.ready is not False,
        terminating=bool(conditions.terminating),
    )


def _port(ports: Sequence[_Port]) -> int | None:
    """The one named http, else the only one."""
    named = [port for port in ports if port.name == "http"] or ports
    return named[0].port if len(named) == 1 else None


class KubernetesAPI:
    """Lists and watches EndpointSlices of one namespace."""

    def __init__(self, api: str, namespace: str) -> None:
        """api: base URL, or `cluster` for the pod's own ServiceAccount."""
        self._in_cluster = api == IN_CLUSTER
        base = CLUSTER_API if self._in_cluster else api
        self._url = f"{base}/apis/discovery.k8s.io/v1/namespaces/{namespace}/endpointslices"
        authority = str(SERVICE_ACCOUNT / "ca.crt") if self._in_cluster else None
        self._pool = urllib3.PoolManager(maxsize=32, retries=False, ca_certs=authority)

    def list(self, service: str) -> _SliceList:
        timeout = urllib3.Timeout(connect=_CONNECT_SECONDS, read=_LIST_SECONDS)
        response = self._pool.request("GET", self._address(service), headers=self._headers(), timeout=timeout)
        _check(response)
        return _read_list(response.data)

    def watch(self, service: str, resource_version: str) -> urllib3.BaseHTTPResponse:
        """The open stream of changes; the caller closes it."""
        address = self._address(
            service, watch="1", resourceVersion=resource_version, allowWatchBookmarks="true", timeoutSeconds=str(_WATCH_SECONDS)
        )
        timeout = urllib3.Timeout(connect=_CONNECT_SECONDS, read=_WATCH_SECONDS + 30.0)
        response = self._pool.request("GET", address, headers=self._headers(), timeout=timeout, preload_content=False)
        if response.status != 200:
            response.read(cache_content=True)
            _check(response)
        return response

    def _address(self, service: str, **parameters: str) -> str:
        selector = f"{SERVICE_LABEL}={service},{SERVICE_TYPE_LABEL}=Private"
        return f"{self._url}?{urlencode({'labelSelector': selector, **parameters})}"

    def _headers(self) -> dict[str, str]:
        """The token is read anew each time: Kubernetes rotates it."""
        if not self._in_cluster:
            return {}
        return {"Authorization": f"Bearer {(SERVICE_ACCOUNT / 'token').read_text().strip()}"}


class EndpointsWatch:
    """Tells `on_change` what instances each stage has, from a thread per stage."""

    def __init__(self, api: KubernetesAPI, services: Sequence[str], pods: PodNetwork, on_change: OnChange) -> None:
        """services: per stage, the name of its Knative Service."""
        self._followers = [_Follower(api, stage, service, pods, on_change) for stage, service in enumerate(services)]

    def start(self) -> None:
        for follower in self._followers:
            follower.thread.start()

    def stop(self) -> None:
        for follower in self._followers:
            follower.stop()
        for follower in self._followers:
            follower.thread.join(_CONNECT_SECONDS)


class _Follower:
    """List and watch of one stage."""

    def __init__(self, api: KubernetesAPI, stage: int, service: str, pods: PodNetwork, on_change: OnChange) -> None:
        self._api = api
        self._stage = stage
        self._service = service
        self._pods = pods
        self._on_change = on_change
        self._slices: dict[str, _Slice] = {}
        self._resource_version = ""
        self._knows = False
        """It has listed once: what it knows is better than nothing while the API is away."""
        self._stopped = threading.Event()
        self._stream: urllib3.BaseHTTPResponse | None = None
        self.thread = threading.Thread(target=self._run, name=f"endpoints-{service}", daemon=True)

    def stop(self) -> None:
        self._stopped.set()
        stream = self._stream
        if stream is not None:
            stream.shutdown()

    def _run(self) -> None:
        pause = _FIRST_PAUSE_SECONDS
        while not self._stopped.is_set():
            try:
                if not self._resource_version:
                    self._list()
                self._follow()
                pause = _FIRST_PAUSE_SECONDS
                self._stopped.wait(_FIRST_PAUSE_SECONDS)
            except _Expired:
                self._resource_version = ""
            except (_Refused, urllib3.exceptions.HTTPError, OSError, ValueError) as error:
                if self._stopped.is_set():
                    return
                _log.warning("watching the instances of %s failed, trying again: %s", self._service, error)
                if not self._knows or (isinstance(error, _Refused) and error.without_right):
                    self._on_change(self._stage, None)
                self._resource_version = ""
                self._stopped.wait(pause * random.uniform(0.75, 1.25))
                pause = min(_LONGEST_PAUSE_SECONDS, 2 * pause)

    def _list(self) -> None:
        found = self._api.list(self._service)
        self._slices = {each.metadata.name: each for each in found.items}
        self._resource_version = found.metadata.resource_version
        self._knows = True
        self._tell()

    def _follow(self) -> None:
        """Until the server ends the watch."""
        stream = self._api.watch(self._service, self._resource_version)
        self._stream = stream
        try:
            lines = _lines(stream)
            while not self._stopped.is_set() and (line := next(lines, None)) is not None:
                self._apply(_read_event(line))
        finally:
            self._stream = None
            stream.close()

    def _apply(self, event: _WatchEvent) -> None:
        if event.type == "ERROR":
            status = _read_status(event.object)
            raise _Expired if status.code == _GONE else _Refused(status.code, status.message)
        each = _read_slice(event.object)
        self._resource_version = each.metadata.resource_version or self._resource_version
        if event.type == "BOOKMARK":
            return
        if event.type == "DELETED":
            self._slices.pop(each.metadata.name, None)
        else:
            self._slices[each.metadata.name] = each
        self._tell()

    def _tell(self) -> None:
        self._on_change(self._stage, endpoints_of(self._slices.values(), self._pods))


def _check(response: urllib3.BaseHTTPResponse) -> None:
    if response.status == _GONE:
        raise _Expired
    if response.status != 200:
        raise _Refused(response.status, response.data[:200].decode("utf-8", "replace"))


def _lines(stream: urllib3.BaseHTTPResponse) -> Iterator[bytes]:
    """Whole lines as they come. A connection cut within one ends quietly: what it said is said again."""
    rest = b""
    while part := stream.read1(2**16):
        *lines, rest = (rest + part).split(b"\n")
        yield from filter(None, lines)
        if len(rest) > _MAX_LINE_BYTES:
            raise _Refused(200, f"a line of more than {_MAX_LINE_BYTES} bytes")
