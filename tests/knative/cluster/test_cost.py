"""Resources that a pipeline used, from a Prometheus or from running pods."""

import json
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from knative.cluster.cost import NotCounted, usage_from_prometheus, usage_since_start
from tests.support.http_server import Exchange, serving
from tests.support.knative.manifests import objects, stage_name
from tests.support.knative.promql import used_metrics
from tests.support.knative.site import Site

NOW = datetime(2026, 1, 1, 0, 10, tzinfo=UTC)  # ten minutes after the start of the stand-in's pods


class Prometheus:
    """Answers every query_range with the same series."""

    def __init__(self) -> None:
        self.url = ""
        self.series: list[dict[str, Any]] = []
        self.seen: dict[str, list[str]] = {}  # the newest query

    def respond(self, exchange: Exchange) -> None:
        self.seen = parse_qs(urlsplit(exchange.path).query)
        found = {"status": "success", "data": {"resultType": "matrix", "result": self.series}}
        exchange.answer(200, json.dumps(found).encode())


@pytest.fixture
def prometheus() -> Iterator[Prometheus]:
    found = Prometheus()
    with serving(found.respond) as server:
        found.url = server.url.rstrip("/")
        yield found


def test_running_pods_count_since_their_start(site: Site) -> None:
    rendered = objects()
    site.deployer.deploy(rendered)
    key = ("v1", "pods", "default", "chat-00001-pod")
    evicted = {**site.api.objects[key], "metadata": {**site.api.objects[key]["metadata"], "name": "evicted"}}
    site.api.put({**evicted, "status": {**evicted["status"], "phase": "Failed"}})
    usage = {each.revision: each for each in usage_since_start(site.cluster, "default", "chat", NOW)}
    assert {each.replica_seconds for each in usage.values()} == {600.0}
    assert usage["chat-00001"].seconds_of("memory") == 600 * 512 * 2**20
    assert usage["chat-00001"].seconds_of("cpu") == 300
    assert usage[f"{stage_name(rendered, 0)}-00001"].seconds_of("memory") == 600 * 2 * 2**30
    assert usage["chat-00001"].seconds_of("nvidia.com/gpu") == 0


def test_counts_of_a_prometheus_are_added_up(serving: Site, prometheus: Prometheus) -> None:
    labels = {"kn_service_name": "chat", "k8s_namespace_name": "default"}
    prometheus.series = [
        {"metric": {**labels, "kn_revision_name": "chat-00001"}, "values": [[0, "1"], [15, "3"], [30, "0"]]},
        {"metric": {**labels, "kn_revision_name": "chat-00000"}, "values": [[0, "2"]]},
    ]
    usage = usage_from_prometheus(serving.cluster, "default", "chat", prometheus.url, 3600, 7200.0)
    assert [(each.revision, each.replica_seconds) for each in usage] == [("chat-00000", 30.0), ("chat-00001", 60.0)]
    assert usage[0].seconds_of("memory") is None, "the revision is gone, so its requests are unknown"
    assert usage[1].seconds_of("memory") == 60 * 512 * 2**20
    assert (prometheus.seen["start"], prometheus.seen["end"], prometheus.seen["step"]) == (["3615.0"], ["7200.0"], ["15"])
    (metric,) = used_metrics(prometheus.seen["query"][0])
    assert (metric.metric, metric.labels) == ("kn_revision_pods_count", {"k8s_namespace_name", "kn_service_name"})


def test_a_long_window_has_longer_steps(serving: Site, prometheus: Prometheus) -> None:
    prometheus.series = [{"metric": {}, "values": [[0, "1"]]}]
    (usage,) = usage_from_prometheus(serving.cluster, "default", "chat", prometheus.url, 30 * 86_400.0, 1e9)
    assert usage.replica_seconds == pytest.approx(259.2)


def test_a_prometheus_without_the_gauge_or_without_a_reply_is_an_error(site: Site, prometheus: Prometheus) -> None:
    with pytest.raises(NotCounted, match=r"has no kn_revision_pods_count of chat.*metrics-protocol: prometheus"):
        usage_from_prometheus(site.cluster, "default", "chat", prometheus.url, 3600, 7200.0)
    with pytest.raises(NotCounted, match="does not answer as a Prometheus does"):
        usage_from_prometheus(site.cluster, "default", "chat", "http://127.0.0.1:1", 3600, 7200.0)
