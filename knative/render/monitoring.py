"""Alert rules, and the Prometheus operator's objects of a pipeline with a `monitoring` section.

Alerts use only metrics that functions export, so they work if Knative exports none. docs/operating.md has a section on each.
"""

from dataclasses import dataclass
from string import Template
from typing import Any, Final

from functions.configuration.config import FLEET_LABEL
from knative.render.resolved_pipeline import ResolvedPipeline, labels
from knative.render.services import METRICS_PORT
from knative.spec.kubernetes_object import KubernetesObject, kubernetes_object

# Knative's name of the function's port, whatever the Service calls it. Prometheus finds pods by it; the metrics have another
# port, which a Knative Service cannot declare.
_FUNCTION_PORT: Final = "user-port"
_QUEUE_PROXY_PORT: Final = "http-usermetric"  # 9091, open if config-observability has `request-metrics-protocol: prometheus`
_POD_LABELS: Final = {
    "app_kubernetes_io_instance": "pipeline",
    "lamina_dev_pipeline": "fingerprint",
    "app_kubernetes_io_component": "component",
    "serving_knative_dev_service": "service",
    "serving_knative_dev_revision": "revision",
}
"""Label of a pod, as Prometheus writes it → label of its metrics."""
_FLEET_LABELS: Final = {"lamina_dev_fleet": "fleet"}

_PER_PIPELINE: Final = "sum by (namespace, pipeline, model)"  # model: of a fleet's gateway, others have none
_NO_FAILURES: Final = (
    "stop|length|cancelled|invalid-request|context-length-exceeded|malformed-event|unauthorized|unknown-event-type|event-expired|"
    "event-too-large|unsupported-media-type|wrong-pipeline|wrong-layer|rate-limited|cross-site|unknown-host|not-found|"
    "model-not-found"
)
"""Outcomes of answers that are not the pipeline's failures: complete answers, and rejections of a client's mistake."""


@dataclass(frozen=True, slots=True)
class Alert:
    """One alert of Prometheus, which fires if `expression` holds for `for_minutes`.

    expression: PromQL. In place of `$of` come the label matchers of one pipeline, or nothing: PromQL allows a comma at the end.
    """

    name: str
    expression: str
    for_minutes: int
    severity: str
    summary: str


ALERTS: Final = (
    Alert(
        "LaminaStuck",
        f"{_PER_PIPELINE} (lamina_gateway_waiting_sequences{{$of}} + lamina_gateway_running_sequences{{$of}}) > 0"
        f" and {_PER_PIPELINE} (rate(lamina_gateway_drawn_tokens_total{{$of}}[5m])) == 0",
        5, "critical", "Requests wait, and no token was generated for five minutes",
    ),
    Alert(
        "LaminaAnswersFail",
        f'{_PER_PIPELINE} (rate(lamina_gateway_answers_total{{outcome!~"{_NO_FAILURES}",$of}}[5m]))'
        f" / {_PER_PIPELINE} (rate(lamina_gateway_answers_total{{$of}}[5m])) > 0.05",
        5, "critical", "More than 5 percent of answers end with an error",
    ),
    Alert(
        "LaminaFirstTokenSlow",
        "histogram_quantile(0.95, sum by (namespace, pipeline, model, le)"
        " (rate(lamina_gateway_time_to_first_token_seconds_bucket{$of}[5m]))) > 30",
        10, "warning", "5 percent of answers begin after more than 30 seconds",
    ),
    Alert(
        "LaminaQueueLong",
        f"{_PER_PIPELINE} (lamina_gateway_waiting_sequences{{$of}})"
        f" > 0.25 * {_PER_PIPELINE} (lamina_gateway_queue_limit{{$of}})",
        10, "warning", "The queue has been more than a quarter full for ten minutes",
    ),
    Alert(
        "LaminaReplays",
        f"{_PER_PIPELINE} (rate(lamina_gateway_replays_total{{$of}}[10m]))"
        f" / {_PER_PIPELINE} (rate(lamina_gateway_answers_total{{$of}}[10m])) > 0.5",
        10, "warning", "More than one replay for every two answers: routes break, or keys and values are lost",
    ),
    Alert(
        "LaminaStageFails",
        'sum by (namespace, pipeline, service) (rate(lamina_stage_events_total{status="500",$of}[5m]))'
        " / sum by (namespace, pipeline, service) (rate(lamina_stage_events_total{$of}[5m])) > 0.01",
        5, "critical", "A stage fails on more than 1 percent of its events",
    ),
    Alert(
        "LaminaStageMemoryFull", f"{_PER_PIPELINE} (lamina_gateway_memory_backlog_sequences{{$of}}) > 0", 10, "warning",
        "Requests wait because a stage has no memory for their keys and values",
    ),
    Alert(
        "LaminaFleetDeviceWait", "max by (namespace, pipeline, model) (lamina_fleet_device_wait_seconds{$of}) > 120", 2,
        "warning", "A model of a fleet has waited for a device for more than two minutes",
    ),
    Alert(
        "LaminaPodNetworkWrong", "max by (namespace, pipeline, stage) (lamina_gateway_refused_addresses{$of}) > 0", 2,
        "warning", "Pods of a stage are outside the network that the gateway follows: it uses the Service URL, or fewer pods",
    ),
    Alert(
        "LaminaNotReady", "max by (namespace, pipeline, service) (max_over_time(lamina_ready{$of}[3m])) == 0", 5, "critical",
        "A Service has pods, and none has been ready for five minutes",
    ),
    Alert(
        "LaminaPodNotReady", "max by (namespace, pipeline, service, pod) (max_over_time(lamina_ready{$of}[3m])) == 0", 15,
        "warning", "A pod has not been ready for fifteen minutes, restarts included",
    ),
)  # fmt: skip


def rule_groups(matchers: str = "") -> list[dict[str, Any]]:
    """All alerts as Prometheus rule groups. matchers: select pipelines, such as `pipeline="chat"`; empty: all pipelines."""
    rules = [
        {
            "alert": alert.name,
            "expr": Template(alert.expression).substitute(of=matchers),
            "for": f"{alert.for_minutes}m",
            "labels": {"severity": alert.severity},
            "annotations": {"summary": alert.summary, "runbook": f"docs/operating.md#{alert.name.lower()}"},
        }
        for alert in ALERTS
    ]
    return [{"name": "lamina", "rules": rules}]


def monitoring_objects(pipeline: ResolvedPipeline) -> list[KubernetesObject]:
    """A PodMonitor and, unless the spec turns alerts off, a PrometheusRule. Empty if the spec has no `monitoring` section."""
    spec, monitoring = pipeline.spec, pipeline.spec.monitoring
    if monitoring is None:
        return []
    own = labels(pipeline, "")
    selecting, matcher = "app.kubernetes.io/instance", f'pipeline="{spec.name}"'
    if pipeline.fleet is not None:  # the gateway and all members
        selecting, matcher = FLEET_LABEL, f'fleet="{pipeline.fleet}"'
    ports = [_FUNCTION_PORT, *([_QUEUE_PROXY_PORT] if monitoring.queue_proxy_metrics else [])]
    monitor = {
        "selector": {"matchLabels": {key: own[key] for key in (selecting, "app.kubernetes.io/managed-by")}},
        "podMetricsEndpoints": [_endpoint(port, monitoring.interval_seconds, pipeline.fleet is not None) for port in ports],
    }
    objects = {"PodMonitor": monitor}
    if monitoring.alerts:
        objects["PrometheusRule"] = {"groups": rule_groups(f'namespace="{spec.namespace}",{matcher}')}
    selected = {**monitoring.labels, **labels(pipeline, "monitoring")}
    return [
        kubernetes_object("monitoring.coreos.com/v1", kind, spec.name, spec.namespace, selected, spec=fields)
        for kind, fields in objects.items()
    ]


def _endpoint(port: str, interval_seconds: int, of_fleet: bool) -> dict[str, Any]:
    relabelings: list[dict[str, Any]] = [
        {"sourceLabels": [f"__meta_kubernetes_pod_label_{label}"], "targetLabel": target}
        for label, target in (_POD_LABELS | (_FLEET_LABELS if of_fleet else {})).items()
    ]
    if port == _FUNCTION_PORT:
        relabelings.append(
            {
                "sourceLabels": ["__address__"],  # an IPv6 address is in brackets
                "regex": r"(.+):\d+",
                "replacement": f"$1:{METRICS_PORT}",
                "targetLabel": "__address__",
            }
        )
    return {"port": port, "path": "/metrics", "interval": f"{interval_seconds}s", "relabelings": relabelings}
