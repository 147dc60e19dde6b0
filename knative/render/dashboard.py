"""The Grafana dashboard of pipelines, as JSON: what a person looks at first, then stage by stage, then what went wrong.

Labels are those that knative/render/monitoring.py puts on. The last row reads Knative's own metrics, which a cluster exports
only when its config-observability says so.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

_OF: Final = 'namespace="$namespace",pipeline="$pipeline"'
_KNATIVE_OF: Final = 'k8s_namespace_name="$namespace",kn_service_name=~"$pipeline(-[0-9a-f]{8}-(s[0-9]+|ev))?"'
"""The Services that knative/render/services.py names after a pipeline, and none of `$pipeline-2`."""
_RATE: Final = "[$__rate_interval]"
_WIDTH, _HEIGHT, _COLUMNS = 8, 8, 24


@dataclass(frozen=True, slots=True)
class Panel:
    """unit: Grafana's name of it. queries: PromQL and its legend."""

    title: str
    unit: str
    description: str
    queries: Sequence[tuple[str, str]]


def _quantiles(metric: str, by: str = "") -> list[tuple[str, str]]:
    legend = f"{{{{{by}}}}} " if by else ""
    labels = f"le,{by}" if by else "le"
    return [
        (f"histogram_quantile({quantile}, sum by ({labels}) (rate({metric}_bucket{{{_OF}}}{_RATE})))", f"{legend}p{percent}")
        for quantile, percent in ((0.5, 50), (0.95, 95))
    ]


def _rate(metric: str, by: str, matchers: str = "") -> tuple[str, str]:
    return f"sum by ({by}) (rate({metric}{{{matchers}{_OF}}}{_RATE}))", f"{{{{{by}}}}}"


ROWS: Final[dict[str, tuple[Panel, ...]]] = {
    "Answers": (
        Panel("Answers", "ops", "By how they ended: stop, length, cancelled, or a problem's name.",
              [_rate("lamina_gateway_answers_total", "outcome")]),
        Panel("Time to first token", "s", "From the request to its first token, waiting and cold start included.",
              _quantiles("lamina_gateway_time_to_first_token_seconds")),
        Panel("Inter-token latency", "s", "From one token of an answer to its next.",
              _quantiles("lamina_gateway_inter_token_latency_seconds")),
        Panel("Tokens", "short", "Per second: drawn by the last stage, and prompt tokens sent, replays included.",
              [(f"sum (rate(lamina_gateway_drawn_tokens_total{{{_OF}}}{_RATE}))", "drawn"),
               (f"sum (rate(lamina_gateway_sent_prompt_tokens_total{{{_OF}}}{_RATE}))", "prompt")]),
        Panel("Sequences", "short", "Being answered, and waiting for their turn; of those, for a stage's memory.",
              [(f"sum (lamina_gateway_running_sequences{{{_OF}}})", "running"),
               (f"sum (lamina_gateway_waiting_sequences{{{_OF}}})", "waiting"),
               (f"sum (lamina_gateway_hungry_sequences{{{_OF}}})", "for memory")]),
        Panel("Micro-batches", "short", "That exist, and events on their way; fewer events than stages leave a stage idle.",
              [(f"sum (lamina_gateway_micro_batches{{{_OF}}})", "micro-batches"),
               (f"sum (lamina_gateway_events_in_flight{{{_OF}}})", "events in flight")]),
    ),
    "Stages": (
        Panel("Ready pods", "short", "By Service; none: at zero.",
              [(f"sum by (service) (lamina_ready{{{_OF}}})", "{{service}}")]),
        Panel("Step as the gateway sees it", "s", "Mean time of an event at a stage: way, wait and compute.",
              [(f"sum by (stage) (rate(lamina_gateway_stage_seconds_total{{{_OF}}}{_RATE}))"
                f" / sum by (stage) (rate(lamina_gateway_stage_steps_total{{{_OF}}}{_RATE}))", "{{stage}}")]),
        Panel("Pass", "s", "One pass through a stage's layers.", _quantiles("lamina_stage_compute_seconds", "service")),
        Panel("Wait in the stage", "s", "Of an event, before its pass begins: the bottleneck is where it is long.",
              _quantiles("lamina_stage_queue_seconds", "service")),
        Panel("Busy", "percentunit", "Share of time that a pod computes.",
              [(f"sum by (service, pod) (rate(lamina_stage_compute_seconds_sum{{{_OF}}}{_RATE}))", "{{pod}}")]),
        Panel("Events in flight", "short", "At each Service, all pods together: what Knative's autoscaler goes by.",
              [(f"sum by (service) (lamina_stage_events_in_flight{{{_OF}}})", "{{service}}")]),
        Panel("Tokens through the layers", "short", "Per second, prompts and answers.",
              [_rate("lamina_stage_tokens_total", "service")]),
        Panel("Room for keys and values", "short", "Tokens that can still be reserved, in the fullest pod.",
              [(f"min by (service) (lamina_stage_free_tokens{{{_OF}}})", "{{service}}")]),
        Panel("Sequences that hold memory", "short", "By pod.",
              [(f"sum by (pod) (lamina_stage_sequences{{{_OF}}})", "{{pod}}")]),
    ),
    "Keys and values that are remembered": (
        Panel("Prompt tokens not computed", "percentunit", "Share of the prompts' tokens that every stage held already.",
              [(f"sum (rate(lamina_gateway_cached_prompt_tokens_total{{{_OF}}}{_RATE}))"
                f" / sum (rate(lamina_gateway_prompt_tokens_total{{{_OF}}}{_RATE}))", "held")]),
        Panel("Found", "short", "Tokens per second that a stage found, by tier.",
              [_rate("lamina_stage_kv_tokens_total", "tier")]),
        Panel("Seconds saved", "s", "Of computing, per second, by tier.",
              [_rate("lamina_stage_kv_saved_seconds_total", "tier")]),
        Panel("Reservations that found something", "ops", "By tier.",
              [_rate("lamina_stage_kv_hits_total", "tier")]),
        Panel("Remembered", "short", "Tokens of ended sequences, by pod; they count as free.",
              [(f"sum by (pod) (lamina_stage_kv_remembered_tokens{{{_OF}}})", "{{pod}}")]),
    ),
    "Trouble": (
        Panel("Replays", "ops", "Sequences computed anew, by cause.",
              [_rate("lamina_gateway_replays_total", "cause")]),
        Panel("Moves", "ops", "Micro-batches that went over to another pod, by cause.",
              [_rate("lamina_gateway_moves_total", "cause")]),
        Panel("Wakes", "ops", "Warm-ups of sleeping stages.",
              [(f"sum (rate(lamina_gateway_wakes_total{{{_OF}}}{_RATE}))", "wakes")]),
        Panel("Events refused", "ops", "By status; 503 while a pod starts or leaves is as it should be.",
              [_rate("lamina_stage_events_total", "status", 'status!="200",')]),
        Panel("Rows that failed", "ops", "By status: stale, miss, full, invalid.",
              [_rate("lamina_stage_rows_total", "status", 'status!="ok",')]),
        Panel("Start-up", "s", "From the start of the process to the end of each phase, slowest pod.",
              [(f"max by (service, phase) (lamina_startup_phase_seconds{{{_OF}}})", "{{service}} {{phase}}")]),
        Panel("Weights loaded", "percentunit", "Of what the stage reads from the store, pod by pod.",
              [(f"lamina_stage_loaded_bytes{{{_OF}}} / lamina_stage_weights_bytes{{{_OF}}}", "{{pod}}")]),
        Panel("Codec", "s", "Decoding and encoding of an event.", _quantiles("lamina_stage_codec_seconds", "service")),
    ),
    "Knative (where config-observability exports it)": (
        Panel("Pods wanted and there", "short", "By revision.",
              [(f"kn_revision_pods_desired{{{_KNATIVE_OF}}}", "{{kn_revision_name}} desired"),
               (f"kn_revision_pods_count{{{_KNATIVE_OF}}}", "{{kn_revision_name}}")]),
        Panel("Concurrency per pod", "short", "Over the stable and the panic window, against the target.",
              [(f"kn_revision_concurrency_stable{{{_KNATIVE_OF}}}", "{{kn_revision_name}} stable"),
               (f"kn_revision_concurrency_panic{{{_KNATIVE_OF}}}", "{{kn_revision_name}} panic"),
               (f"kn_revision_concurrency_target{{{_KNATIVE_OF}}}", "{{kn_revision_name}} target")]),
        Panel("In queue-proxy", "short", "Running and waiting, each as of its pod's last arrival; with `queue_proxy_metrics`.",
              [(f"sum by (service) (kn_serving_queue_depth{{{_OF}}})", "{{service}}")]),
    ),
}  # fmt: skip


def dashboard() -> dict[str, Any]:
    """Grafana's dashboard model, for import or provisioning."""
    return {
        "uid": "lamina",
        "title": "Lamina pipelines",
        "tags": ["lamina", "knative"],
        "schemaVersion": 39,
        "version": 1,
        "editable": True,
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "templating": {"list": _variables()},
        "panels": list(_panels()),
    }


def _variables() -> list[dict[str, Any]]:
    source = {"type": "datasource", "name": "datasource", "label": "Data source", "query": "prometheus"}
    return [
        source,
        _variable("namespace", "label_values(lamina_ready, namespace)"),
        _variable("pipeline", 'label_values(lamina_ready{namespace="$namespace"}, pipeline)'),
    ]


def _variable(name: str, query: str) -> dict[str, Any]:
    return {"type": "query", "name": name, "datasource": _source(), "query": query, "refresh": 2, "sort": 1}


def _panels() -> Iterator[dict[str, Any]]:
    number, top = 1, 0
    for row, panels in ROWS.items():
        position = {"x": 0, "y": top, "w": _COLUMNS, "h": 1}
        yield {"id": number, "type": "row", "title": row, "collapsed": False, "gridPos": position, "panels": []}
        number, top = number + 1, top + 1
        for index, panel in enumerate(panels):
            line, column = divmod(index, _COLUMNS // _WIDTH)
            place = {"x": column * _WIDTH, "y": top + line * _HEIGHT, "w": _WIDTH, "h": _HEIGHT}
            yield _panel(number, panel, place)
            number += 1
        top += _HEIGHT * -(-len(panels) * _WIDTH // _COLUMNS)


def _panel(number: int, panel: Panel, place: dict[str, int]) -> dict[str, Any]:
    targets = [
        {"refId": chr(ord("A") + index), "datasource": _source(), "expr": query, "legendFormat": legend}
        for index, (query, legend) in enumerate(panel.queries)
    ]
    return {
        "id": number,
        "type": "timeseries",
        "title": panel.title,
        "description": panel.description,
        "datasource": _source(),
        "gridPos": place,
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0}, "overrides": []},
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}},
        "targets": targets,
    }


def _source() -> dict[str, str]:
    return {"type": "prometheus", "uid": "${datasource}"}
