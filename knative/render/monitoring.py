"""The Prometheus operator's objects of a pipeline whose spec has a `monitoring` section: what to scrape, and when to alert."""

from typing import Any, Final

from knative.render.alerts import rule_groups
from knative.render.resolved_pipeline import ResolvedPipeline, labels
from knative.render.services import METRICS_PORT
from knative.spec.kubernetes_object import KubernetesObject
from knative.spec.pipeline_spec import Monitoring

_API: Final = "monitoring.coreos.com/v1"
_FUNCTION_PORT: Final = "user-port"
"""Knative's name for the function's port, whatever the Service calls it. It is how Prometheus finds the pod; metrics are at
another port, which no Service may declare."""
_QUEUE_PROXY_PORT: Final = "http-usermetric"
"""9091: queue-proxy's own, once config-observability has `request-metrics-protocol: prometheus`."""
_POD_LABELS: Final = {
    "app_kubernetes_io_instance": "pipeline",
    "lamina_dev_pipeline": "fingerprint",
    "app_kubernetes_io_component": "component",
    "serving_knative_dev_service": "service",
    "serving_knative_dev_revision": "revision",
}
"""Label of a pod, as Prometheus writes it → label of its metrics."""


def monitoring_objects(pipeline: ResolvedPipeline) -> list[KubernetesObject]:
    """PodMonitor and, unless the spec declines them, PrometheusRule; none without the section."""
    monitoring = pipeline.spec.monitoring
    if monitoring is None:
        return []
    matchers = f'namespace="{pipeline.spec.namespace}",pipeline="{pipeline.spec.name}"'
    objects = [_object(pipeline, monitoring, "PodMonitor", _pod_monitor(pipeline, monitoring))]
    if monitoring.alerts:
        objects.append(_object(pipeline, monitoring, "PrometheusRule", {"groups": rule_groups(matchers)}))
    return objects


def _pod_monitor(pipeline: ResolvedPipeline, monitoring: Monitoring) -> dict[str, Any]:
    ports = [_FUNCTION_PORT, *([_QUEUE_PROXY_PORT] if monitoring.queue_proxy_metrics else [])]
    own = labels(pipeline, "")
    selecting = ("app.kubernetes.io/instance", "app.kubernetes.io/managed-by")
    return {
        "selector": {"matchLabels": {key: own[key] for key in selecting}},
        "podMetricsEndpoints": [_endpoint(port, monitoring.interval_seconds) for port in ports],
    }


def _endpoint(port: str, interval_seconds: int) -> dict[str, Any]:
    relabelings: list[dict[str, Any]] = [
        {"sourceLabels": [f"__meta_kubernetes_pod_label_{label}"], "targetLabel": target}
        for label, target in _POD_LABELS.items()
    ]
    if port == _FUNCTION_PORT:
        # The address as Prometheus writes it, in brackets where it is IPv6.
        relabelings.append(
            {
                "sourceLabels": ["__address__"],
                "regex": r"(.+):\d+",
                "replacement": f"$1:{METRICS_PORT}",
                "targetLabel": "__address__",
            }
        )
    return {"port": port, "path": "/metrics", "interval": f"{interval_seconds}s", "relabelings": relabelings}


def _object(pipeline: ResolvedPipeline, monitoring: Monitoring, kind: str, spec: dict[str, Any]) -> KubernetesObject:
    metadata = {
        "name": pipeline.spec.name,
        "namespace": pipeline.spec.namespace,
        "labels": {**monitoring.labels, **labels(pipeline, "monitoring")},
    }
    return {"apiVersion": _API, "kind": kind, "metadata": metadata, "spec": spec}
