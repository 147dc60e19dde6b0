"""The autoscaler's metrics in Prometheus' text format, under Knative's own names."""

from collections.abc import Callable, Iterable
from typing import Final

from prometheus_client import CollectorRegistry, Gauge, generate_latest

from knative.local.kubelet.pods import Phase
from knative.local.serving.revisions import Revision
from knative.local.serving.services import LocalService

_LABELS: Final = ("kn_revision_name", "kn_service_name", "kn_configuration_name", "k8s_namespace_name")

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
_UNITS: Final = {"concurrency": "Requests in flight", "rps": "Requests per second"}
"""By what a revision scales on: it has the one or the other."""


def render_metrics(services: Iterable[LocalService]) -> bytes:
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
