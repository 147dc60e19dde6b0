"""Lists, watches, reads and replaces Kubernetes objects over plain urllib3.

Importing the kubernetes client takes half a second. `knative/local` serves the same API, so the same code runs everywhere.
"""

import logging
import random
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Final, Generic, TypeVar
from urllib.parse import urlencode

import msgspec
import urllib3

_log = logging.getLogger(__name__)

SERVICE_ACCOUNT: Final = Path("/var/run/secrets/kubernetes.io/serviceaccount")
CLUSTER_API: Final = "https://kubernetes.default.svc"
IN_CLUSTER: Final = "cluster"
ENDPOINT_SLICES: Final = "apis/discovery.k8s.io/v1", "endpointslices"
CONFIG_MAPS: Final = "api/v1", "configmaps"
LEASES: Final = "apis/coordination.k8s.io/v1", "leases"

WATCH_SECONDS: Final = 20.0  # length of one watch; the server ends it with a bookmark from which the next one goes on
SILENCE_SECONDS: Final = 5.0  # a dead connection is noticed so long after the server should have ended the watch
CONNECT_SECONDS: Final = 5.0
_REPLY_SECONDS: Final = 30.0
_CONFLICT: Final = 409
_GONE: Final = 410
_MAX_LINE_BYTES: Final = 16 * 2**20
_FIRST_PAUSE_SECONDS: Final = 0.1
_LONGEST_PAUSE_SECONDS: Final = 10.0


class Metadata(msgspec.Struct, rename="camel"):
    name: str = ""
    resource_version: str = ""
    labels: dict[str, str] | None = None
    annotations: dict[str, str] | None = None


class KubernetesItem(msgspec.Struct):
    """Any object of Kubernetes; subclasses add the fields of their kind."""

    metadata: Metadata


T = TypeVar("T", bound=KubernetesItem)
V = TypeVar("V")


class ObjectList(msgspec.Struct, Generic[T]):
    metadata: Metadata
    items: tuple[T, ...] = ()


class WatchEvent(msgspec.Struct):
    type: str
    object: msgspec.Raw


class _Status(msgspec.Struct):
    code: int = 0
    message: str = ""


class Unreadable(ValueError):
    """The API's reply is not JSON, or not of the expected type."""


def reader(type_: type[V]) -> Callable[[bytes | msgspec.Raw], V]:
    """Returns a function that decodes JSON of this type and raises Unreadable if that fails."""
    decode = msgspec.json.Decoder(type_).decode

    def read(data: bytes | msgspec.Raw) -> V:
        try:
            return decode(data)
        except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
            raise Unreadable(f"no {getattr(type_, '__name__', type_)}: {error}: {bytes(data[:100])!r}") from error

    return read


read_event: Final = reader(WatchEvent)
read_status: Final = reader(_Status)


class Expired(Exception):
    """Kubernetes no longer has the changes since this resourceVersion (410). The watch has to begin with a new list."""


class KubernetesError(Exception):
    """The API answered with an error. With the status 401 or 403, this gateway may not watch."""

    def __init__(self, status: int, detail: str) -> None:
        super().__init__(f"the Kubernetes API answered {status}: {detail}")
        self.without_right = status in (401, 403)


class ReplaceConflict(Exception):
    """The object was changed since it was read (409). Read it again."""


class KubernetesAPI:
    """A client for the objects of one kind in one namespace."""

    def __init__(
        self,
        api: str,
        namespace: str,
        kind: tuple[str, str] = ENDPOINT_SLICES,
        watch_seconds: float = WATCH_SECONDS,
        silence_seconds: float = SILENCE_SECONDS,
    ) -> None:
        """`api` is the base URL, or `cluster` for the cluster's API with the pod's own ServiceAccount.

        `kind` is the path of the kind's group and version, and its plural. `watch_seconds` is the length of a watch. A
        connection that stays silent for `silence_seconds` after that counts as dead.
        """
        self._watch_seconds = watch_seconds
        self._silence_seconds = silence_seconds
        self._in_cluster = api == IN_CLUSTER
        base = CLUSTER_API if self._in_cluster else api
        group, plural = kind
        self._url = f"{base}/{group}/namespaces/{namespace}/{plural}"
        authority = str(SERVICE_ACCOUNT / "ca.crt") if self._in_cluster else None
        self._pool = urllib3.PoolManager(maxsize=4, retries=False, ca_certs=authority)

    def list(self, selector: str) -> bytes:
        """Returns the objects that `selector` matches, as JSON. Raises KubernetesError."""
        return self._request("GET", f"{self._url}?{urlencode({'labelSelector': selector})}")

    def watch(self, selector: str, resource_version: str) -> urllib3.BaseHTTPResponse:
        """Opens a stream of the changes after `resource_version`; the caller closes it. Raises KubernetesError or Expired."""
        parameters = {
            "labelSelector": selector,
            "watch": "1",
            "resourceVersion": resource_version,
            "allowWatchBookmarks": "true",
            "timeoutSeconds": f"{max(1.0, self._watch_seconds):.0f}",
        }
        timeout = urllib3.Timeout(connect=CONNECT_SECONDS, read=self._watch_seconds + self._silence_seconds)
        address = f"{self._url}?{urlencode(parameters)}"
        response = self._pool.request("GET", address, headers=self._headers(), timeout=timeout, preload_content=False)
        if response.status != 200:
            response.read(cache_content=True)
            _check(response)
        return response

    def get(self, name: str) -> bytes:
        """Returns the object as JSON. Raises KubernetesError."""
        return self._request("GET", f"{self._url}/{name}")

    def replace(self, name: str, body: bytes) -> None:
        """Replaces the object with `body`, if the object still has the resourceVersion in `body`.

        Raises ReplaceConflict if it has another one, or KubernetesError.
        """
        self._request("PUT", f"{self._url}/{name}", body)

    def _request(self, method: str, url: str, body: bytes | None = None) -> bytes:
        headers = self._headers() | ({} if body is None else {"Content-Type": "application/json"})
        timeout = urllib3.Timeout(connect=CONNECT_SECONDS, read=_REPLY_SECONDS)
        response = self._pool.request(method, url, body=body, headers=headers, timeout=timeout)
        _check(response)
        return response.data

    def _headers(self) -> dict[str, str]:
        """Returns the Authorization header, or none outside a cluster.

        The token is read for each request, because Kubernetes rotates it.
        """
        if not self._in_cluster:
            return {}
        return {"Authorization": f"Bearer {(SERVICE_ACCOUNT / 'token').read_text().strip()}"}


def _check(response: urllib3.BaseHTTPResponse) -> None:
    if response.status == _GONE:
        raise Expired
    if response.status == _CONFLICT:
        raise ReplaceConflict
    if response.status != 200:
        raise KubernetesError(response.status, response.data[:200].decode("utf-8", "replace"))


def lines_of(stream: urllib3.BaseHTTPResponse) -> Iterator[bytes]:
    """Yields complete lines as they arrive.

    Drops a line that the end of the connection cuts off. The next watch repeats the line.
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


class ObjectWatch(Generic[T]):
    """Keeps the objects that match a label selector up to date in memory, with a thread of its own.

    The thread lists the objects, then follows their changes. It lists again on 410, and reconnects with back-off.
    """

    def __init__(
        self,
        api: KubernetesAPI,
        selector: str,
        type_: type[T],
        what: str,
        on_change: Callable[[Mapping[str, T], T | None], None],
        on_unknown: Callable[[], None] = lambda: None,
    ) -> None:
        """`what` names the objects for thread and log. The thread calls `on_change` and `on_unknown`.

        `on_change` gets all objects by name, and the object that was changed or deleted, or None after a list. If it raises,
        the objects are listed and it is called again. `on_unknown` is called if the objects cannot be known: no list has
        succeeded yet, or the right to list is missing.
        """
        self._api = api
        self._selector = selector
        self._what = what
        self._on_change = on_change
        self._on_unknown = on_unknown
        self._read_list: Callable[[bytes], ObjectList[T]] = reader(ObjectList[type_])  # type: ignore[valid-type]
        self._read_item = reader(type_)
        self._items: dict[str, T] = {}
        self._resource_version = ""
        self._has_listed = False  # if it has, its objects are kept while the API is unavailable
        self._stopped = threading.Event()
        self._stream: urllib3.BaseHTTPResponse | None = None
        self._thread = threading.Thread(target=self._run, name=f"watch of {what}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        stream = self._stream
        if stream is not None:
            stream.shutdown()
        self._thread.join(CONNECT_SECONDS)

    def _run(self) -> None:
        """Runs the thread's loop, which survives all errors.

        Otherwise the gateway would go on with objects that no longer exist.
        """
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
        _log.warning("watching %s failed, trying again: %s", self._what, error, exc_info=None if expected else error)
        self._resource_version = ""
        if not self._has_listed or (isinstance(error, KubernetesError) and error.without_right):
            try:
                self._on_unknown()
            except Exception:  # noqa: BLE001 - must not end the thread
                _log.exception("nobody could be told that %s are unknown", self._what)

    def _list(self) -> None:
        found = self._read_list(self._api.list(self._selector))
        self._items = {each.metadata.name: each for each in found.items}
        self._resource_version = found.metadata.resource_version
        self._has_listed = True
        self._on_change(self._items, None)

    def _follow(self) -> None:
        """Watches and applies changes until the server ends the watch."""
        stream = self._api.watch(self._selector, self._resource_version)
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
            raise Expired if status.code == _GONE else KubernetesError(status.code, status.message)
        each = self._read_item(event.object)
        self._resource_version = each.metadata.resource_version or self._resource_version
        if event.type == "BOOKMARK":
            return
        if event.type == "DELETED":
            self._items.pop(each.metadata.name, None)
        else:
            self._items[each.metadata.name] = each
        self._on_change(self._items, each)
