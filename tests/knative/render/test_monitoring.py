"""Panels, alerts and docs/operating.md use metrics that functions export, compared with /metrics of real processes."""

import json
import re
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from functions.gateway.fleet.overview import FleetCollector, fleet_metrics
from functions.gateway.jobs.worker import BatchMetrics
from knative.render.dashboard import dashboard
from knative.render.monitoring import ALERTS, monitoring_objects, rule_groups
from knative.render.rendering import render
from knative.render.resolved_pipeline import ResolvedPipeline
from knative.render.services import METRICS_PORT
from tests.support.functions.functions import gateway_environment, running, stage_environment
from tests.support.functions.metrics import member_state
from tests.support.knative.manifests import resolved_pipeline
from tests.support.knative.promql import used_metrics
from tests.support.paths import ROOT
from tests.support.storage.published import published_model

CUT = ((0, 6),)
OF_THE_POD = {"namespace", "pipeline", "fingerprint", "component", "service", "revision", "pod"}
OF_A_FLEET = {"model"}  # its gateway adds it to the metrics of each member
"""Labels that the PodMonitor and the operator add to every series."""
KNATIVE = {
    name: {"k8s_namespace_name", "kn_service_name", "kn_configuration_name", "kn_revision_name"}
    for name in (
        "kn_revision_pods_desired",
        "kn_revision_pods_count",
        "kn_revision_concurrency_stable",
        "kn_revision_concurrency_panic",
        "kn_revision_concurrency_target",
        "kn_serving_queue_depth",
    )
}
"""From Knative's page on its metrics (Serving metrics, OpenTelemetry), as Prometheus writes them."""
SUFFIXES = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count"), "gauge": ("",)}

Metrics = dict[str, set[str] | None]
"""Name → labels; None: there is no series yet, so the labels are not known."""


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Metrics]:
    """Metrics of a stage and a gateway that have answered a question, and of a fleet's gateway."""
    with (
        published_model(tmp_path_factory.mktemp("published")) as published,
        running([stage_environment(published, 0, CUT)]) as (stage,),
        running([gateway_environment(published, [stage.url], CUT)]) as (gateway,),
    ):
        body = json.dumps({"model": "tiny", "prompt": "the", "max_tokens": 3}).encode()
        request = urllib.request.Request(f"{gateway.url}/v1/completions", body, {"Content-Type": "application/json"})
        urllib.request.urlopen(request, timeout=60).close()
        page = gateway.get("/metrics")[1]
        yield {**_metrics(stage.get("/metrics")[1]), **_metrics(page), **_of_a_fleet(page)}


class _Page(Collector):
    def __init__(self, page: str) -> None:
        self._page = page

    def collect(self) -> Iterator[Metric]:
        return text_string_to_metric_families(self._page)


def _of_a_fleet(page: str) -> Metrics:
    """Metrics of the gateway of a fleet with one member, whose part has this page."""
    member, registry = CollectorRegistry(), CollectorRegistry()
    member.register(_Page(page))
    fleet = lambda: fleet_metrics({"loaded": 1}, 0, [member_state("tiny")])  # noqa: E731
    registry.register(FleetCollector(CollectorRegistry(), lambda: [("tiny", member)], fleet))
    return _metrics(generate_latest(registry).decode())


def _metrics(page: str) -> Metrics:
    found: Metrics = {}
    for family in text_string_to_metric_families(page):
        for suffix in SUFFIXES[family.type]:
            name = family.name + suffix
            samples = [sample for sample in family.samples if sample.name == name]
            found[name] = set().union(*(sample.labels for sample in samples)) if samples else None
    return {name: labels for name, labels in found.items() if not name.endswith("_created")}


def panel_queries() -> Iterator[tuple[str, str, str]]:
    """Panel, query as Grafana sends it, legend."""
    for panel in dashboard()["panels"]:
        for target in panel.get("targets", []):
            expression = target["expr"].replace("$__rate_interval", "5m").replace("$namespace", "n").replace("$pipeline", "p")
            yield panel["title"], expression, target["legendFormat"]


def _hold(expression: str, exported: Metrics) -> None:
    for each in used_metrics(expression):
        assert each.metric in exported or each.metric in KNATIVE, f"no function exports {each.metric}: {expression}"
        labels = exported.get(each.metric, KNATIVE.get(each.metric))
        missing = each.labels - OF_THE_POD - OF_A_FLEET - (labels or set()) if labels is not None else set()
        assert not missing, f"{each.metric} has no label {missing}: {expression}"


@pytest.mark.slow
def test_every_panel_uses_exported_metrics(exported: Metrics) -> None:
    queries = list(panel_queries())
    assert len(queries) > 30
    for _, expression, legend in queries:
        assert "$" not in expression
        _hold(expression, exported)
        labels = (
            set().union(*(each.labels for each in used_metrics(expression))) | OF_THE_POD | KNATIVE["kn_revision_pods_count"]
        )
        assert set(re.findall(r"{{(\w+)}}", legend)) <= labels, expression


def test_knatives_metrics_are_those_of_one_pipeline() -> None:
    """Grafana inserts the pipeline's name into a regular expression, which Prometheus anchors."""
    seen = 0
    named = pipeline()
    own = [named.spec.name, named.stage_name(0), named.stage_name(11), named.events_gateway_name]
    others = ["chat2", "chat-2", "chat-2-0123abcd-s0", "my-chat", "chat2-0123abcd-s0", "chat-0123abcd-s0-extra"]
    for panel in dashboard()["panels"]:
        for target in panel.get("targets", []):
            for pattern in re.findall(r'kn_service_name=~"([^"]*)"', target["expr"]):
                seen += 1
                services = re.compile(pattern.replace("$pipeline", "chat"))
                assert all(services.fullmatch(name) for name in own)
                assert not any(services.fullmatch(name) for name in others)
    assert seen >= 5


def test_every_alert_uses_exported_metrics(exported: Metrics) -> None:
    for matchers in ("", 'namespace="models",pipeline="chat"'):
        for rule in rule_groups(matchers)[0]["rules"]:
            _hold(rule["expr"], exported)
            assert all({"namespace", "pipeline"} <= each.labels for each in used_metrics(rule["expr"]) if matchers)


def test_operating_md_explains_every_metric(exported: Metrics) -> None:
    page = (ROOT / "docs" / "operating.md").read_text()
    explained = set(re.findall(r"^\| `((?:lamina|gen_ai)_\w+)` \|", page, re.MULTILINE))
    others = CollectorRegistry()  # of gateways with batches
    BatchMetrics(others)
    families = {re.sub("_(bucket|sum|count)$", "", name) for name in (*exported, *_metrics(generate_latest(others).decode()))}
    assert explained == families


def test_operating_md_has_a_section_for_every_alert() -> None:
    page = (ROOT / "docs" / "operating.md").read_text()
    assert [alert.name for alert in ALERTS] == re.findall(r"^### (Lamina\w+)$", page, re.MULTILINE)


def test_panels_have_unique_ids_and_do_not_overlap() -> None:
    model = dashboard()
    panels = model["panels"]
    assert [panel["id"] for panel in panels] == list(range(1, len(panels) + 1))
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {(x, y) for x in range(place["x"], place["x"] + place["w"]) for y in range(place["y"], place["y"] + place["h"])}
        assert not cells & taken, f"{panel['title']} lies over another panel"
        assert place["x"] + place["w"] <= 24
        taken |= cells
    names = {variable["name"] for variable in model["templating"]["list"]}
    assert names == {"datasource", "namespace", "pipeline"}


def pipeline(**monitoring: Any) -> ResolvedPipeline:
    return resolved_pipeline(
        namespace="models", model={"name": "tiny", "digest": "d" * 64}, cut="0:3,3:6", monitoring=monitoring
    )


def _relabelled(endpoint: dict[str, Any], address: str) -> str:
    """The address that Prometheus scrapes, of one that it found; its regular expressions hold for the whole value."""
    for rule in endpoint["relabelings"]:
        if rule["targetLabel"] == "__address__" and (match := re.fullmatch(rule["regex"], address)):
            address = match.expand(rule["replacement"].replace("$", "\\"))
    return address


def test_the_pod_monitor_scrapes_the_metrics_ports() -> None:
    rendered = render(pipeline(labels={"release": "prometheus"}, queue_proxy_metrics=True))
    monitor, rules = rendered["monitoring.yaml"]
    assert (monitor["kind"], rules["kind"]) == ("PodMonitor", "PrometheusRule")
    endpoints = monitor["spec"]["podMetricsEndpoints"]
    assert [(each["port"], each["path"]) for each in endpoints] == [("user-port", "/metrics"), ("http-usermetric", "/metrics")]
    put_on = {each["targetLabel"] for each in endpoints[0]["relabelings"]}
    assert put_on - {"__address__"} | {"namespace", "pod"} == OF_THE_POD
    assert [_relabelled(endpoint, "10.1.2.3:8080") for endpoint in endpoints] == [f"10.1.2.3:{METRICS_PORT}", "10.1.2.3:8080"]
    assert _relabelled(endpoints[0], "[fd00::7]:8080") == f"[fd00::7]:{METRICS_PORT}"
    for service in ("stage-0.yaml", "gateway.yaml"):
        labels = rendered[service][0]["spec"]["template"]["metadata"]["labels"]
        assert monitor["spec"]["selector"]["matchLabels"].items() <= labels.items()
    for each in (monitor, rules):
        assert each["metadata"]["labels"]["release"] == "prometheus"
        assert each["metadata"]["labels"]["app.kubernetes.io/managed-by"] == "lamina"


def test_monitoring_follows_the_spec() -> None:
    assert [each["kind"] for each in monitoring_objects(pipeline(alerts=False))] == ["PodMonitor"]
    (endpoint,) = monitoring_objects(pipeline(interval_seconds=30))[0]["spec"]["podMetricsEndpoints"]
    assert endpoint["interval"] == "30s"
    assert "monitoring.yaml" not in render(resolved_pipeline())
