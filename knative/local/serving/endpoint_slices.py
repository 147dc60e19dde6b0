"""EndpointSlices of the revisions' private Services: list and watch as the Kubernetes API serves them.

One slice per pod, with Knative's labels and port name, so that a watcher needs no other code here than on a cluster.
"""

import asyncio
import json
import re
from collections import deque
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Final

from knative.local.http.messages import HttpError

Slice = dict[str, Any]

_HISTORY: Final = 1000  # changes that a watch can catch up on
_BOOKMARK_SECONDS: Final = 30.0
_API_VERSION: Final = "discovery.k8s.io/v1"


def endpoint_slice(
    service: str, revision: str, namespace: str, pod: str, conditions: Mapping[str, bool], port: int, tls_port: int = 0
) -> Slice:
    """conditions: ready, serving (it answers requests, also while it is terminating) and terminating.

    port, tls_port: of the pod's queue-proxy, on 127.0.0.1; 0: there is none.
    """
    labels = {
        "kubernetes.io/service-name": f"{revision}-private",
        "endpointslice.kubernetes.io/managed-by": "endpointslice-controller.k8s.io",
        "networking.internal.knative.dev/serverlessservice": revision,
        "networking.internal.knative.dev/serviceType": "Private",
        "serving.knative.dev/revision": revision,
        "serving.knative.dev/service": service,
    }
    target = {"kind": "Pod", "name": pod, "namespace": namespace}
    ports = (("http", port), ("https", tls_port))
    return {
        "apiVersion": _API_VERSION,
        "kind": "EndpointSlice",
        "metadata": {"name": f"{pod}-private", "namespace": namespace, "labels": labels},
        "addressType": "IPv4",
        "endpoints": [{"addresses": ["127.0.0.1"], "conditions": dict(conditions), "targetRef": target}],
        "ports": [{"name": name, "protocol": "TCP", "port": number} for name, number in ports if number],
    }


@dataclass(frozen=True, slots=True)
class _Event:
    version: int
    kind: str
    object: Slice


class WatchedObjects:
    """The current objects of one kind and the last changes to them. Not thread-safe."""

    def __init__(self, kind: str = "EndpointSlice", api_version: str = _API_VERSION) -> None:
        self._kind = kind
        self._api_version = api_version
        self._slices: dict[tuple[str, str], Slice] = {}
        self._history: deque[_Event] = deque(maxlen=_HISTORY)
        self._version = 0
        self._changed = asyncio.Event()

    def get(self, namespace: str, name: str) -> Slice | None:
        return self._slices.get((namespace, name))

    def all(self) -> list[Slice]:
        """All objects, in the order of their namespaces and names."""
        return [found for _, found in sorted(self._slices.items())]

    def put(self, found: Slice) -> None:
        """Adds or changes an object. Putting an equal one is no change."""
        key = (found["metadata"]["namespace"], found["metadata"]["name"])
        known = self._slices.get(key)
        if known is not None:
            unversioned = {name: value for name, value in known["metadata"].items() if name != "resourceVersion"}
            if {**known, "metadata": unversioned} == found:
                return
        self._record("ADDED" if known is None else "MODIFIED", found)
        self._slices[key] = self._history[-1].object

    def remove(self, found: Slice) -> None:
        known = self._slices.pop((found["metadata"]["namespace"], found["metadata"]["name"]), None)
        if known is not None:
            self._record("DELETED", known)

    def list(self, namespace: str, selector: str) -> dict[str, Any]:
        """The objects of a namespace that match a label selector ("": all), as a list of Kubernetes.

        Raises HttpError 400 for a selector that cannot be read.
        """
        matches = _selector(selector)
        items = [found for (where, _), found in sorted(self._slices.items()) if where == namespace and matches(_labels(found))]
        metadata = {"resourceVersion": str(self._version)}
        return {"kind": f"{self._kind}List", "apiVersion": self._api_version, "metadata": metadata, "items": items}

    def watch(self, namespace: str, selector: str, since: str, bookmarks: bool) -> AsyncGenerator[bytes, None]:
        """Yields changes as lines of JSON, as a watch of Kubernetes does. It ends only if `since` is too old.

        since: a resourceVersion, the changes after which are sent; empty or 0: the current slices come first, as ADDED.
        bookmarks: whether a time without changes is marked by a BOOKMARK. Raises HttpError 400 for a selector or version that
        cannot be read.
        """
        if since in ("", "0"):
            present = [_line("ADDED", found) for found in self.list(namespace, selector)["items"]]
            return self._changes(namespace, _selector(selector), self._version, bookmarks, present)
        if not since.isdigit():
            raise HttpError(HTTPStatus.BAD_REQUEST, f"resourceVersion: {since!r} is none")
        return self._changes(namespace, _selector(selector), int(since), bookmarks, [])

    async def _changes(
        self, namespace: str, matches: Callable[[dict[str, str]], bool], seen: int, bookmarks: bool, first: Sequence[bytes]
    ) -> AsyncGenerator[bytes, None]:
        for line in first:
            yield line
        while True:
            if self._history and seen < self._history[0].version - 1:
                message = f"too old resource version: {seen} ({self._history[0].version})"
                status = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "message": message}
                yield _line("ERROR", {**status, "reason": "Expired", "code": 410})
                return
            for event in [event for event in self._history if event.version > seen]:
                seen = event.version
                if event.object["metadata"]["namespace"] == namespace and matches(_labels(event.object)):
                    yield _line(event.kind, event.object)
            try:
                async with asyncio.timeout(_BOOKMARK_SECONDS):
                    while seen == self._version:
                        await self._changed.wait()
            except TimeoutError:
                if bookmarks:
                    metadata = {"resourceVersion": str(seen)}
                    yield _line("BOOKMARK", {"kind": self._kind, "apiVersion": self._api_version, "metadata": metadata})

    def _record(self, kind: str, found: Slice) -> None:
        self._version += 1
        metadata = {**found["metadata"], "resourceVersion": str(self._version)}
        self._history.append(_Event(self._version, kind, {**found, "metadata": metadata}))
        self._changed.set()
        self._changed = asyncio.Event()


def _selector(text: str) -> Callable[[dict[str, str]], bool]:
    """Turns a label selector into a function that tells whether labels match.

    It may hold `a=b`, `a!=b`, `a in (b,c)`, `a notin (b,c)`, `a` and `!a`, joined by commas. Raises HttpError 400.
    """
    requirements = [_requirement(part.strip()) for part in re.split(r",(?![^(]*\))", text) if part.strip()]
    return lambda labels: all(requirement(labels) for requirement in requirements)


def _requirement(text: str) -> Callable[[dict[str, str]], bool]:
    key = r"[A-Za-z0-9][-A-Za-z0-9_./]*"
    if match := re.fullmatch(rf"({key})\s+(in|notin)\s+\(([^()]*)\)", text):
        values = {value.strip() for value in match[3].split(",")}
        name, wanted = match[1], match[2] == "in"
        return lambda labels: (labels.get(name) in values) is wanted
    if match := re.fullmatch(rf"({key})\s*(==|=|!=)\s*([-A-Za-z0-9_.]*)", text):
        name, wanted, value = match[1], match[2] != "!=", match[3]
        return lambda labels: (labels.get(name) == value) is wanted
    if match := re.fullmatch(rf"(!?)({key})", text):
        name, wanted = match[2], not match[1]
        return lambda labels: (name in labels) is wanted
    raise HttpError(HTTPStatus.BAD_REQUEST, f"unable to parse requirement of labelSelector: {text!r}")


def _line(kind: str, found: dict[str, Any]) -> bytes:
    return json.dumps({"type": kind, "object": found}, separators=(",", ":")).encode() + b"\n"


def _labels(found: Slice) -> dict[str, str]:
    labels: dict[str, str] = found["metadata"].get("labels") or {}
    return labels
