"""Lists and watches EndpointSlices by the Kubernetes API, over plain urllib3.

Importing the kubernetes client takes half a second. `knative/local` serves the same API, so the same code runs everywhere.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, TypeVar
from urllib.parse import urlencode

import msgspec
import urllib3

SERVICE_LABEL: Final = "serving.knative.dev/service"
REVISION_LABEL: Final = "serving.knative.dev/revision"
SERVICE_TYPE_LABEL: Final = "networking.internal.knative.dev/serviceType"
SERVICE_ACCOUNT: Final = Path("/var/run/secrets/kubernetes.io/serviceaccount")
CLUSTER_API: Final = "https://kubernetes.default.svc"
IN_CLUSTER: Final = "cluster"

WATCH_SECONDS: Final = 20.0  # length of one watch; the server ends it with a bookmark from which the next one goes on
SILENCE_SECONDS: Final = 5.0  # a dead connection is noticed so long after the server should have ended the watch
CONNECT_SECONDS: Final = 5.0
_LIST_SECONDS: Final = 30.0
GONE: Final = 410
_MAX_LINE_BYTES: Final = 16 * 2**20


class Metadata(msgspec.Struct, rename="camel"):
    name: str = ""
    resource_version: str = ""
    labels: dict[str, str] | None = None


class Conditions(msgspec.Struct, frozen=True):
    ready: bool | None = None
    terminating: bool | None = None


class Address(msgspec.Struct):
    addresses: tuple[str, ...] = ()
    conditions: Conditions = Conditions()


class Port(msgspec.Struct):
    port: int | None = None
    name: str | None = None


class Slice(msgspec.Struct):
    metadata: Metadata
    endpoints: tuple[Address, ...] | None = None
    ports: tuple[Port, ...] | None = None


class SliceList(msgspec.Struct):
    metadata: Metadata
    items: tuple[Slice, ...] = ()


class WatchEvent(msgspec.Struct):
    type: str
    object: msgspec.Raw


class _Status(msgspec.Struct):
    code: int = 0
    message: str = ""


S = TypeVar("S", SliceList, WatchEvent, Slice, _Status)


class Unreadable(ValueError):
    """The API's reply is not JSON, or not of the expected type."""


def _reader(type: type[S]) -> Callable[[bytes | msgspec.Raw], S]:
    decode = msgspec.json.Decoder(type).decode

    def read(data: bytes | msgspec.Raw) -> S:
        try:
            return decode(data)
        except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
            raise Unreadable(f"no {type.__name__}: {error}: {bytes(data[:100])!r}") from error

    return read


read_list: Final = _reader(SliceList)
read_event: Final = _reader(WatchEvent)
read_slice: Final = _reader(Slice)
read_status: Final = _reader(_Status)


class Expired(Exception):
    """Kubernetes has no changes since this resourceVersion any more (410). The watch has to begin with a new list."""


class KubernetesError(Exception):
    """The API answered with an error. 401 and 403: this gateway may not watch."""

    def __init__(self, status: int, detail: str) -> None:
        super().__init__(f"the Kubernetes API answered {status}: {detail}")
        self.without_right = status in (401, 403)


class KubernetesAPI:
    """Lists and watches EndpointSlices of one namespace."""

    def __init__(
        self, api: str, namespace: str, watch_seconds: float = WATCH_SECONDS, silence_seconds: float = SILENCE_SECONDS
    ) -> None:
        """api: base URL, or `cluster` for the cluster's API with the pod's own ServiceAccount.

        watch_seconds: length of a watch. silence_seconds: how long after it a silent connection counts as dead.
        """
        self._watch_seconds = watch_seconds
        self._silence_seconds = silence_seconds
        self._in_cluster = api == IN_CLUSTER
        base = CLUSTER_API if self._in_cluster else api
        self._url = f"{base}/apis/discovery.k8s.io/v1/namespaces/{namespace}/endpointslices"
        authority = str(SERVICE_ACCOUNT / "ca.crt") if self._in_cluster else None
        self._pool = urllib3.PoolManager(maxsize=32, retries=False, ca_certs=authority)

    def list(self, service: str) -> SliceList:
        timeout = urllib3.Timeout(connect=CONNECT_SECONDS, read=_LIST_SECONDS)
        response = self._pool.request("GET", self._address(service), headers=self._headers(), timeout=timeout)
        _check(response)
        return read_list(response.data)

    def watch(self, service: str, resource_version: str) -> urllib3.BaseHTTPResponse:
        """Opens a stream of the changes after `resource_version`; the caller closes it. Raises KubernetesError or Expired."""
        lasts = f"{max(1.0, self._watch_seconds):.0f}"
        address = self._address(
            service, watch="1", resourceVersion=resource_version, allowWatchBookmarks="true", timeoutSeconds=lasts
        )
        timeout = urllib3.Timeout(connect=CONNECT_SECONDS, read=self._watch_seconds + self._silence_seconds)
        response = self._pool.request("GET", address, headers=self._headers(), timeout=timeout, preload_content=False)
        if response.status != 200:
            response.read(cache_content=True)
            _check(response)
        return response

    def _address(self, service: str, **parameters: str) -> str:
        selector = f"{SERVICE_LABEL}={service},{SERVICE_TYPE_LABEL}=Private"
        return f"{self._url}?{urlencode({'labelSelector': selector, **parameters})}"

    def _headers(self) -> dict[str, str]:
        """The Authorization header. The token is read for each request, because Kubernetes rotates it."""
        if not self._in_cluster:
            return {}
        return {"Authorization": f"Bearer {(SERVICE_ACCOUNT / 'token').read_text().strip()}"}


def _check(response: urllib3.BaseHTTPResponse) -> None:
    if response.status == GONE:
        raise Expired
    if response.status != 200:
        raise KubernetesError(response.status, response.data[:200].decode("utf-8", "replace"))


def lines_of(stream: urllib3.BaseHTTPResponse) -> Iterator[bytes]:
    """Yields complete lines as they arrive.

    A line that is cut off by the connection's end is dropped: the next watch repeats it.
    """
    begun, length = [], 0
    while part := stream.read1(2**16):
        first, *others = part.split(b"\n")
        begun.append(first)
        length += len(first)
        if length > _MAX_LINE_BYTES:
            raise KubernetesError(200, f"a line of more than {_MAX_LINE_BYTES} bytes")
        if others:
            yield from filter(None, [b"".join(begun), *others[:-1]])
            begun, length = [others[-1]], len(others[-1])
