"""Alert rules, by the metrics that functions export alone: they hold on a cluster whose Knative exports nothing.

docs/operating.md has a section for each, which says what to do.
"""

from dataclasses import dataclass
from string import Template
from typing import Any, Final

_OF_PIPELINE: Final = "sum by (namespace, pipeline)"
_NO_FAILURES: Final = (
    "stop|length|cancelled|invalid-request|context-length-exceeded|malformed-event|unauthorized|unknown-event-type|event-expired|"
    "event-too-large|unsupported-media-type|wrong-pipeline|wrong-layer|rate-limited"
)
"""Answers that ended well, and refusals of what a client asked for."""
_RUNBOOK: Final = "docs/operating.md#"


@dataclass(frozen=True, slots=True)
class Alert:
    """expression: PromQL, with `$of` where matchers of one pipeline go; a comma may stand behind the last matcher."""

    name: str
    expression: str
    for_minutes: int
    severity: str
    summary: str


ALERTS: Final = (
    Alert(
        "LaminaStuck",
        f"{_OF_PIPELINE} (lamina_gateway_waiting_sequences{{$of}} + lamina_gateway_running_sequences{{$of}}) > 0"
        f" and {_OF_PIPELINE} (rate(lamina_gateway_drawn_tokens_total{{$of}}[5m])) == 0",
        5,
        "critical",
        "Requests wait, and no token has come for five minutes",
    ),
    Alert(
        "LaminaAnswersFail",
        f'{_OF_PIPELINE} (rate(lamina_gateway_answers_total{{outcome!~"{_NO_FAILURES}",$of}}[5m]))'
        f" / {_OF_PIPELINE} (rate(lamina_gateway_answers_total{{$of}}[5m])) > 0.05",
        5,
        "critical",
        "More than one answer in twenty ends with an error",
    ),
    Alert(
        "LaminaFirstTokenSlow",
        "histogram_quantile(0.95, sum by (namespace, pipeline, le)"
        " (rate(lamina_gateway_time_to_first_token_seconds_bucket{$of}[5m]))) > 30",
        10,
        "warning",
        "One answer in twenty begins after more than 30 seconds",
    ),
    Alert(
        "LaminaQueueLong",
        f"{_OF_PIPELINE} (lamina_gateway_waiting_sequences{{$of}}) > 0.25 * {_OF_PIPELINE} (lamina_gateway_queue_limit{{$of}})",
        10,
        "warning",
        "For ten minutes, more than a quarter of the requests that may wait have been waiting",
    ),
    Alert(
        "LaminaReplays",
        f"{_OF_PIPELINE} (rate(lamina_gateway_replays_total{{$of}}[10m]))"
        f" / {_OF_PIPELINE} (rate(lamina_gateway_answers_total{{$of}}[10m])) > 0.5",
        10,
        "warning",
        "Every second answer is computed anew somewhere: routes break or keys and values are lost",
    ),
    Alert(
        "LaminaStageFails",
        'sum by (namespace, pipeline, service) (rate(lamina_stage_events_total{status="500",$of}[5m]))'
        " / sum by (namespace, pipeline, service) (rate(lamina_stage_events_total{$of}[5m])) > 0.01",
        5,
        "critical",
        "A stage fails with more than one event in a hundred",
    ),
    Alert(
        "LaminaStageMemoryFull",
        f"{_OF_PIPELINE} (lamina_gateway_hungry_sequences{{$of}}) > 0",
        10,
        "warning",
        "Requests wait because a stage has no room for their keys and values",
    ),
    Alert(
        "LaminaPodNetworkWrong",
        "max by (namespace, pipeline, stage) (lamina_gateway_refused_addresses{$of}) > 0",
        2,
        "warning",
        "Pods of a stage are outside of the network that the gateway follows: requests go by the Service URL, or to fewer pods",
    ),
    Alert(
        "LaminaNotReady",
        "max by (namespace, pipeline, service) (max_over_time(lamina_ready{$of}[3m])) == 0",
        5,
        "critical",
        "A Service has pods, and none has become ready for five minutes",
    ),
    Alert(
        "LaminaPodNotReady",
        "max by (namespace, pipeline, service, pod) (max_over_time(lamina_ready{$of}[3m])) == 0",
        15,
        "warning",
        "A pod has not become ready for fifteen minutes, however often it began anew",
    ),
)


def rule_groups(matchers: str = "") -> list[dict[str, Any]]:
    """Prometheus' rule groups, for all pipelines or, with matchers such as `pipeline="chat"`, for one."""
    return [{"name": "lamina", "rules": [_rule(alert, matchers) for alert in ALERTS]}]


def _rule(alert: Alert, matchers: str) -> dict[str, Any]:
    return {
        "alert": alert.name,
        "expr": Template(alert.expression).substitute(of=matchers),
        "for": f"{alert.for_minutes}m",
        "labels": {"severity": alert.severity},
        "annotations": {"summary": alert.summary, "runbook": _RUNBOOK + alert.name.lower()},
    }
