"""A platform's state as JSON, for `status` and whoever asks its admin port."""

import json
from collections.abc import Iterable
from typing import Any

from knative.local.kubelet.pods import Pod
from knative.local.kubelet.processes import memory_bytes
from knative.local.serving.revisions import Revision
from knative.local.serving.services import LocalService


def platform_status(pid: int, services: Iterable[LocalService]) -> dict[str, Any]:
    return {"pid": pid, "services": [_service(service) for service in services]}


def _service(service: LocalService) -> dict[str, Any]:
    percent = {route.revision.name.revision: route.percent for route in service.routes}
    revisions = [_revision(revision, percent.get(revision.name.revision, 0)) for revision in service.revisions]
    return {"name": service.name, "namespace": service.namespace, "url": service.url, "revisions": revisions}


def _revision(revision: Revision, percent: int) -> dict[str, Any]:
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
        "waiting": revision.activator.waiting,
        "activator_in_path": revision.activator.in_path,
        "failure": revision.failure,
        "pods": [_pod(pod) for pod in revision.pods],
    }


def _pod(pod: Pod) -> dict[str, Any]:
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
        "readiness": _parsed(pod.readiness),
        "memory_bytes": memory_bytes(pod.pid) if pod.pid else 0,
        "log": str(pod.log),
    }


def _parsed(text: str) -> Any:
    """Functions answer their readiness probe with JSON."""
    try:
        return json.loads(text)
    except ValueError:
        return text
