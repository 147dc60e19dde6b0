"""The Grafana dashboard of pipelines, as JSON: answers, stages, prefix cache, trouble, and Knative's own metrics.

Labels are those that knative/render/monitoring.py adds. Knative exports its metrics only if config-observability says so.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

_OF: Final = 'namespace="$namespace",pipeline="$pipeline"'
# Matches the Services that knative/render/services.py names after a pipeline, but none of a pipeline `$pipeline-2`.
_KNATIVE_OF: Final = 'k8s_namespace_name="$namespace",kn_service_name=~"$pipeline(-[0-9a-f]{8}-(s[0-9]+|ev))?"'
_RATE: Final = "[$__rate_interval]"
_WIDTH, _HEIGHT, _COLUMNS = 8, 8, 24
_DATASOURCE: Final = {"type": "prometheus", "uid": "${datasource}"}
_VARIABLES: Final = {
    "namespace": "label_values(lamina_ready, namespace)",
    "pipeline": 'label_values(lamina_ready{namespace="$namespace"}, pipeline)',
}


@dataclass(frozen=True, slots=True)
class Panel:
    title: str
    unit: str  # as Grafana names it
    description: str
    queries: Sequence[tuple[str, str]]  # PromQL, legend


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
        Panel("Answers", "ops", "By outcome: stop, length, cancelled, or the name of a problem.",
              [_rate("lamina_gateway_answers_total", "outcome")]),
        Panel("Time to first token", "s", "From the request to its first token, queueing and cold start included.",
              _quantiles("lamina_gateway_time_to_first_token_seconds")),
        Panel("Inter-token latency", "s", "From one token of an answer to its next.",
              _quantiles("lamina_gateway_inter_token_latency_seconds")),
        Panel("Tokens", "short", "Per second: generated, and prompt tokens sent, replays included.",
              [(f"sum (rate(lamina_gateway_drawn_tokens_total{{{_OF}}}{_RATE}))", "generated"),
               (f"sum (rate(lamina_gateway_sent_prompt_tokens_total{{{_OF}}}{_RATE}))", "prompt")]),
        Panel("Sequences", "short", "Running, queued, and of the queued those that wait for a stage's memory.",
              [(f"sum (lamina_gateway_running_sequences{{{_OF}}})", "running"),
               (f"sum (lamina_gateway_waiting_sequences{{{_OF}}})", "waiting"),
               (f"sum (lamina_gateway_memory_backlog_sequences{{{_OF}}})", "for memory")]),
        Panel("Micro-batches", "short", "Existing ones, and events in flight. Fewer events than stages leave a stage idle.",
              [(f"sum (lamina_gateway_micro_batches{{{_OF}}})", "micro-batches"),
               (f"sum (lamina_gateway_events_in_flight{{{_OF}}})", "events in flight")]),
    ),
    "Stages": (
        Panel("Ready pods", "short", "By Service; none: scaled to zero.",
              [(f"sum by (service) (lamina_ready{{{_OF}}})", "{{service}}")]),
        Panel("Step as the gateway sees it", "s", "Mean time of an event at a stage: network, queueing and compute.",
              [(f"sum by (stage) (rate(lamina_gateway_stage_seconds_total{{{_OF}}}{_RATE}))"
                f" / sum by (stage) (rate(lamina_gateway_stage_steps_total{{{_OF}}}{_RATE}))", "{{stage}}")]),
        Panel("Forward pass", "s", "Through the layers of a stage.", _quantiles("lamina_stage_compute_seconds", "service")),
        Panel("Queueing in the stage", "s", "Time until an event's forward pass begins; longest at the bottleneck.",
              _quantiles("lamina_stage_queue_seconds", "service")),
        Panel("Busy", "percentunit", "Share of time in which a pod computes.",
              [(f"sum by (service, pod) (rate(lamina_stage_compute_seconds_sum{{{_OF}}}{_RATE}))", "{{pod}}")]),
        Panel("Events in flight", "short", "Of all pods of a Service: the number that Knative's autoscaler uses.",
              [(f"sum by (service) (lamina_stage_events_in_flight{{{_OF}}})", "{{service}}")]),
        Panel("Tokens through the layers", "short", "Per second, prompts and answers.",
              [_rate("lamina_stage_tokens_total", "service")]),
        Panel("Free memory for keys and values", "short", "Tokens that the fullest pod can still reserve.",
              [(f"min by (service) (lamina_stage_free_tokens{{{_OF}}})", "{{service}}")]),
        Panel("Sequences that hold memory", "short", "By pod.",
              [(f"sum by (pod) (lamina_stage_sequences{{{_OF}}})", "{{pod}}")]),
    ),
    "Prefix cache": (
        Panel("Prompt tokens not computed", "percentunit", "Share of prompt tokens that were cached at every stage.",
              [(f"sum (rate(lamina_gateway_cached_prompt_tokens_total{{{_OF}}}{_RATE}))"
                f" / sum (rate(lamina_gateway_prompt_tokens_total{{{_OF}}}{_RATE}))", "cached")]),
        Panel("Cache hits", "short", "Tokens per second that a stage found, by tier.",
              [_rate("lamina_stage_kv_tokens_total", "tier")]),
        Panel("Seconds saved", "s", "Compute seconds saved per second, by tier.",
              [_rate("lamina_stage_kv_saved_seconds_total", "tier")]),
        Panel("Reservations with a cache hit", "ops", "By tier.",
              [_rate("lamina_stage_kv_hits_total", "tier")]),
        Panel("Cached tokens", "short", "Tokens of ended sequences, by pod; their memory counts as free.",
              [(f"sum by (pod) (lamina_stage_kv_remembered_tokens{{{_OF}}})", "{{pod}}")]),
    ),
    "Trouble": (
        Panel("Replays", "ops", "Sequences that were computed again, by cause.",
              [_rate("lamina_gateway_replays_total", "cause")]),
        Panel("Migrations", "ops", "Micro-batches that moved to another pod, by cause.",
              [_rate("lamina_gateway_migrations_total", "cause")]),
        Panel("Wake-ups", "ops", "Warm-up events to stages that were scaled to zero.",
              [(f"sum (rate(lamina_gateway_wake_ups_total{{{_OF}}}{_RATE}))", "wake-ups")]),
        Panel("Events refused", "ops", "By status. 503 is normal while a pod starts or terminates.",
              [_rate("lamina_stage_events_total", "status", 'status!="200",')]),
        Panel("Rows that failed", "ops", "By status: stale, miss, full, invalid.",
              [_rate("lamina_stage_rows_total", "status", 'status!="ok",')]),
        Panel("Start-up", "s", "From the start of the process to the end of each phase, slowest pod.",
              [(f"max by (service, phase) (lamina_startup_phase_seconds{{{_OF}}})", "{{service}} {{phase}}")]),
        Panel("Weights loaded", "percentunit", "Share of the weights that a pod has read from the store.",
              [(f"lamina_stage_loaded_bytes{{{_OF}}} / lamina_stage_weights_bytes{{{_OF}}}", "{{pod}}")]),
        Panel("Codec", "s", "Decoding and encoding an event.", _quantiles("lamina_stage_codec_seconds", "service")),
    ),
    "Adapters": (
        Panel("Tokens with adapters", "short", "Per second, by adapter.",
              [_rate("lamina_gateway_adapter_tokens_total", "adapter")]),
        Panel("Adapters in memory", "short", "Of the pod that has most, by Service.",
              [(f"max by (service) (lamina_stage_adapters{{{_OF}}})", "{{service}}")]),
        Panel("Adapters loaded", "ops", "From the store, by outcome. Many loads of few adapters: raise `adapters`.",
              [_rate("lamina_stage_adapter_loads_total", "outcome")]),
    ),
    "Fleet (the pipeline is the fleet's name)": (
        Panel("Members", "short", "By state at a gateway: asleep (no part is loaded), loading, loaded, failed.",
              [(f"sum by (state) (lamina_fleet_members{{{_OF}}})", "{{state}}")]),
        Panel("Tokens by model", "short", "Per second, generated.", [_rate("lamina_gateway_drawn_tokens_total", "model")]),
        Panel("Pods by model", "short", "Of all stages; none: at zero.",
              [(f"max by (model) (lamina_fleet_pods{{{_OF}}}) > 0", "{{model}}")]),
        Panel("Cost by model", "short", "Pods on average over the time shown in one step.",
              [(f"max by (model) (rate(lamina_fleet_pod_seconds_total{{{_OF}}}{_RATE})) > 0", "{{model}}")]),
        Panel("Waiting for a device", "s", "Age of the oldest request, by model.",
              [(f"max by (model) (lamina_fleet_device_wait_seconds{{{_OF}}}) > 0", "{{model}}")]),
        Panel("Members given up", "ops", "For memory, while they were idle.",
              [(f"sum (rate(lamina_fleet_evictions_total{{{_OF}}}{_RATE}))", "given up")]),
    ),
    "Knative (if config-observability exports it)": (
        Panel("Pods desired and existing", "short", "By revision.",
              [(f"kn_revision_pods_desired{{{_KNATIVE_OF}}}", "{{kn_revision_name}} desired"),
               (f"kn_revision_pods_count{{{_KNATIVE_OF}}}", "{{kn_revision_name}}")]),
        Panel("Concurrency per pod", "short", "Over the stable and the panic window, and the target.",
              [(f"kn_revision_concurrency_stable{{{_KNATIVE_OF}}}", "{{kn_revision_name}} stable"),
               (f"kn_revision_concurrency_panic{{{_KNATIVE_OF}}}", "{{kn_revision_name}} panic"),
               (f"kn_revision_concurrency_target{{{_KNATIVE_OF}}}", "{{kn_revision_name}} target")]),
        Panel("In queue-proxy", "short", "Requests as of each pod's last arrival; needs `queue_proxy_metrics`.",
              [(f"sum by (service) (kn_serving_queue_depth{{{_OF}}})", "{{service}}")]),
    ),
}  # fmt: skip


def dashboard() -> dict[str, Any]:
    """The dashboard as a document that Grafana can import or provision."""
    return {
        "uid": "lamina",
        "title": "Lamina pipelines",
        "tags": ["lamina", "knative"],
        "schemaVersion": 39,
        "version": 1,
        "editable": True,
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "templating": {
            "list": [
                {"type": "datasource", "name": "datasource", "label": "Data source", "query": "prometheus"},
                *(
                    {"type": "query", "name": name, "datasource": _DATASOURCE, "query": query, "refresh": 2, "sort": 1}
                    for name, query in _VARIABLES.items()
                ),
            ]
        },
        "panels": list(_panels()),
    }


def _panels() -> Iterator[dict[str, Any]]:
    number, top = 1, 0
    for row, panels in ROWS.items():
        position = {"x": 0, "y": top, "w": _COLUMNS, "h": 1}
        yield {"id": number, "type": "row", "title": row, "collapsed": False, "gridPos": position, "panels": []}
        number, top = number + 1, top + 1
        for index, panel in enumerate(panels):
            line, column = divmod(index, _COLUMNS // _WIDTH)
            yield {
                "id": number,
                "type": "timeseries",
                "title": panel.title,
                "description": panel.description,
                "datasource": _DATASOURCE,
                "gridPos": {"x": column * _WIDTH, "y": top + line * _HEIGHT, "w": _WIDTH, "h": _HEIGHT},
                "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0}, "overrides": []},
                "options": {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}},
                "targets": [
                    {"refId": chr(ord("A") + target), "datasource": _DATASOURCE, "expr": query, "legendFormat": legend}
                    for target, (query, legend) in enumerate(panel.queries)
                ],
            }
            number += 1
        top += _HEIGHT * -(-len(panels) * _WIDTH // _COLUMNS)
