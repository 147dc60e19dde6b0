"""The platform's admin port: EndpointSlices, ConfigMaps and Leases as the Kubernetes API serves them, status, and metrics."""

import asyncio
import contextlib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from http import HTTPStatus
from typing import Any, Final
from urllib.parse import parse_qs, unquote, urlsplit

from prometheus_client import CollectorRegistry, Gauge, generate_latest

from knative.local.http.messages import HttpError
from knative.local.http.server import Exchange, HttpServer, read_body
from knative.local.kubelet.pods import LocalPod, Phase
from knative.local.kubelet.processes import memory_bytes
from knative.local.serving.endpoint_slices import WatchedObjects
from knative.local.serving.revisions import Revision
from knative.local.serving.services import LocalService

_OBJECTS: Final = re.compile("/(api/v1|apis/discovery.k8s.io/v1)/namespaces/([^/]+)/([a-z]+)")
_LEASE: Final = re.compile("/apis/coordination.k8s.io/v1/namespaces/([^/]+)/leases/([^/]+)")
_MAX_LEASE_BYTES: Final = 2**20
_JSON: Final = b"application/json"
_LABELS: Final = ("kn_revision_name", "kn_service_name", "kn_configuration_name", "k8s_namespace_name")

# Knative's name of a metric → help text, value.
_METRICS: Final[dict[str, tuple[str, Callable[[Revision], float]]]] = {
    "kn_revision_pods_desired": ("Pods that the autoscaler wants", lambda r: max(0, r.autoscaler.desired_scale)),
    "kn_revision_pods_requested": ("Pods asked for", lambda r: len(r.staying_pods)),
    "kn_revision_pods_count": ("Pods that are ready", lambda r: len(r.ready_pods)),
    "kn_revision_pods_not_ready_count": (
        "Pods that are not ready",
        lambda r: sum(pod.phase in (Phase.NOT_READY, Phase.BACK_OFF) for pod in r.pods),
    ),
    "kn_revision_pods_pending_count": ("Pods that start", lambda r: sum(pod.phase is Phase.STARTING for pod in r.pods)),
    "kn_revision_pods_terminating_count": ("Pods that leave", lambda r: sum(pod.leaving for pod in r.pods)),
    "kn_revision_panic_mode": ("1 while the revision panics", lambda r: r.autoscaler.panicking),
    "kn_revision_capacity_excess": (
        "Requests that fit beyond load and target burst",
        lambda r: r.autoscaler.excess_burst_capacity,
    ),
}
_LOADS: Final[dict[str, tuple[str, Callable[[Revision], float]]]] = {
    "stable": ("over the stable window", lambda r: r.autoscaler.last_decision.stable if r.autoscaler.last_decision else 0.0),
    "panic": ("over the panic window", lambda r: r.autoscaler.last_decision.panic if r.autoscaler.last_decision else 0.0),
    "target": ("that one pod is meant for", lambda r: r.autoscaler.settings.decider.target_value),
}
_UNITS: Final = {"concurrency": "Requests in flight", "rps": "Requests per second"}  # a revision scales on one of them


class Admin:
    """HTTP server on a port of 127.0.0.1: EndpointSlices, ConfigMaps and Leases at Kubernetes' paths, `/status`, `/metrics`.

    watched: the objects by the plural of their kind. leases: are read and replaced. status: returns what `/status` answers as
    JSON. metrics: returns the body of `/metrics`.
    """

    def __init__(
        self,
        watched: Mapping[str, WatchedObjects],
        leases: WatchedObjects,
        status: Callable[[], dict[str, Any]],
        metrics: Callable[[], bytes],
    ) -> None:
        self._watched = watched
        self._leases = leases
        self._status = status
        self._metrics = metrics
        self.server = HttpServer(self._serve)

    async def _serve(self, exchange: Exchange) -> None:
        parts = urlsplit(exchange.target.decode("latin-1"))
        if (lease := _LEASE.fullmatch(parts.path)) is not None and exchange.method in (b"GET", b"PUT"):
            await _serve_lease(self._leases, exchange, unquote(lease[1]), unquote(lease[2]))
            return
        if exchange.method != b"GET":
            raise HttpError(HTTPStatus.METHOD_NOT_ALLOWED, "only GET is served here")
        named = _OBJECTS.fullmatch(parts.path)
        if parts.path == "/status":
            exchange.respond(HTTPStatus.OK, json.dumps(self._status()).encode(), _JSON)
        elif parts.path == "/metrics":
            exchange.respond(HTTPStatus.OK, self._metrics(), b"text/plain; version=0.0.4; charset=utf-8")
        elif named is not None and named[3] in self._watched:
            query = {key: values[-1] for key, values in parse_qs(parts.query).items()}
            await _serve_objects(self._watched[named[3]], exchange, unquote(named[2]), query)
        else:
            raise HttpError(HTTPStatus.NOT_FOUND, f"{parts.path} is not served here")


async def _serve_objects(watched: WatchedObjects, exchange: Exchange, namespace: str, query: dict[str, str]) -> None:
    selector = query.get("labelSelector", "")
    if query.get("watch", "") not in ("1", "true"):
        exchange.respond(HTTPStatus.OK, json.dumps(watched.list(namespace, selector)).encode(), _JSON)
        return
    since, bookmarks = query.get("resourceVersion", ""), query.get("allowWatchBookmarks", "") in ("1", "true")
    seconds = query.get("timeoutSeconds", "")
    async with contextlib.aclosing(watched.watch(namespace, selector, since, bookmarks)) as lines:
        exchange.write(exchange.start(200, b"OK", [(b"Content-Type", _JSON)]))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(int(seconds) if seconds.isdigit() and int(seconds) else None):
                async for line in lines:
                    exchange.write(exchange.framed(line))
    exchange.end()


async def _serve_lease(leases: WatchedObjects, exchange: Exchange, namespace: str, name: str) -> None:
    if (found := leases.get(namespace, name)) is None:
        raise HttpError(HTTPStatus.NOT_FOUND, f'leases "{name}" not found')
    if exchange.method == b"PUT":
        wanted = json.loads(await read_body(exchange, _MAX_LEASE_BYTES, "the Lease is too long"))
        found = leases.get(namespace, name) or found
        if wanted["metadata"].pop("resourceVersion", None) != found["metadata"]["resourceVersion"]:
            raise HttpError(
                HTTPStatus.CONFLICT, "the object has been modified; please apply your changes to the latest version"
            )
        leases.put(wanted)
        found = leases.get(namespace, name) or found
    exchange.respond(HTTPStatus.OK, json.dumps(found).encode(), _JSON)


def render_metrics(services: Iterable[LocalService]) -> bytes:
    """The autoscaler's metrics for all revisions of `services` in Prometheus' text format, under Knative's own names."""
    registry = CollectorRegistry()
    gauges = [(Gauge(name, text, _LABELS, registry=registry), read, "") for name, (text, read) in _METRICS.items()]
    gauges += [
        (Gauge(f"kn_revision_{metric}_{name}", f"{unit} {text}", _LABELS, registry=registry), read, metric)
        for metric, unit in _UNITS.items()
        for name, (text, read) in _LOADS.items()
    ]
    for service in services:
        for revision in service.revisions:
            labels = (revision.name.revision, service.name, service.name, service.namespace)
            for gauge, read, metric in gauges:
                if metric in ("", revision.autoscaler.settings.metric):
                    gauge.labels(*labels).set(read(revision))
    return generate_latest(registry)


def service_status(service: LocalService) -> dict[str, Any]:
    percent = {target.revision.name.revision: target.percent for target in service.traffic}
    revisions = [_revision_status(revision, percent.get(revision.name.revision, 0)) for revision in service.revisions]
    return {"name": service.name, "namespace": service.namespace, "url": service.server.url, "revisions": revisions}


def _revision_status(revision: Revision, percent: int) -> dict[str, Any]:
    decision = revision.autoscaler.last_decision
    return {
        "name": revision.name.revision,
        "percent": percent,
        "activity": revision.autoscaler.status.activity.value,
        "desired_scale": max(0, revision.autoscaler.desired_scale),
        "concurrency": round(revision.concurrency, 3),
        "stable": round(decision.stable, 3) if decision else 0.0,
        "panic": round(decision.panic, 3) if decision else 0.0,
        "panicking": revision.autoscaler.panicking,
        "waiting": len(revision.activator.waiting),
        "activator_in_path": revision.activator.in_path,
        "failure": revision.failure,
        "pods": [_pod_status(pod) for pod in revision.pods],
    }


def _pod_status(pod: LocalPod) -> dict[str, Any]:
    try:
        readiness = json.loads(pod.readiness)  # Lamina's functions answer their readiness probe with JSON
    except ValueError:
        readiness = pod.readiness
    return {
        "name": pod.name,
        "phase": pod.phase.value,
        "pid": pod.pid,
        "port": pod.proxy.port,
        "function_port": pod.proxy.function_port,
        "metrics_port": pod.metrics_port,
        "in_flight": pod.proxy.all.in_flight,
        "restarts": pod.restarts,
        "trouble": pod.trouble,
        "last_end": pod.last_end,
        "readiness": readiness,
        "memory_bytes": memory_bytes(pod.pid) if pod.pid else 0,
        "log": str(pod.log),
    }
