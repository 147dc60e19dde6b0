"""`status` of a pipeline on a cluster."""

import json

import pytest

from knative.cluster.objects import failed_conditions
from knative.cluster.status import COLUMNS, status_lines, status_rows
from knative.cluster.traffic import traffic_warnings
from tests.support.knative.knative_controllers import crash_loops, set_conditions
from tests.support.knative.manifests import objects, other, stage_name
from tests.support.knative.site import Site


def rows(site: Site) -> list[dict[str, str]]:
    return [dict(zip(COLUMNS, row, strict=True)) for row in status_rows(site.status())]


def test_pods_are_counted_by_phase(serving: Site) -> None:
    pod = serving.api.objects["v1", "pods", "default", "chat-00001-pod"]
    for name, change, status in (
        ("leaving", {"deletionTimestamp": "2026-01-01T00:00:00Z"}, {}),
        ("starting", {}, {"containerStatuses": [{"name": "function", "ready": False, "restartCount": 2}]}),
        ("evicted", {}, {"phase": "Failed", "reason": "Evicted"}),
    ):
        serving.api.put({**pod, "metadata": {**pod["metadata"], "name": name, **change}, "status": {**pod["status"], **status}})
    gateway = rows(serving)[0]
    assert [gateway[key] for key in ("service", "ready", "pods", "starting", "leaving")] == ["chat", "yes", "1", "1", "1"]
    assert [gateway[key] for key in ("desired", "restarts", "revision", "traffic")] == ["1", "2", "chat-00001", "100 %"]
    assert gateway["url"] == "http://chat.default.example"


@pytest.mark.slow
def test_a_failure_is_shown_with_its_reason_and_the_serving_version(serving: Site) -> None:
    serving.fail(other(), crash_loops)
    broken = stage_name(other(), 1)
    said = status_lines(serving.status())
    assert said[0].startswith("version 1 serves, pipeline ")
    assert said[1].startswith("version 2, pipeline ")
    assert "failed, " in said[1]
    assert "CrashLoopBackOff" in said[1]
    assert any(line.startswith(f"Pod {broken}-00001-pod, container user-container: waiting, Crash") for line in said)
    assert {row["service"]: row["ready"] for row in rows(serving)}[broken] == "not yet"


def test_a_pipeline_at_zero_is_ready_and_has_no_pods(serving: Site) -> None:
    for pod in serving.api.found("pods", {}):
        serving.api.remove(*serving.api.key_of(pod))
    assert {(row["ready"], row["pods"], row["traffic"]) for row in rows(serving)} == {("yes", "0", "100 %")}


def test_a_stage_at_zero_is_no_trouble_before_knative_says_so(serving: Site) -> None:
    """The autoscaler writes -1 as long as it has no data. Old pods, events and logs were a diagnosis of 20 lines."""
    stage = stage_name(objects(), 1)
    for pod in serving.api.found("pods", {"serving.knative.dev/service": stage}):
        serving.api.remove(*serving.api.key_of(pod))
        serving.api.put({**pod, "metadata": {**pod["metadata"], "deletionTimestamp": "2026-01-01T00:00:00Z"}})
    for scaler in serving.api.found("podautoscalers", {"serving.knative.dev/service": stage}):
        serving.api.put({**scaler, "status": {"desiredScale": -1, "actualScale": 0}})
    service = serving.api.found("services", {"app.kubernetes.io/component": "stage"})[1]
    set_conditions(serving.api, service, f"{stage}-00001", "Unknown", "Deploying", "Waiting for the revision.")
    assert {row["service"]: row["desired"] for row in rows(serving)}[stage] == "-"
    (trouble,) = serving.status()["troubles"]
    assert trouble.startswith(f"{stage} has no pods")
    assert trouble.endswith("Deploying: Waiting for the revision.")


def test_conditions_with_the_same_message_are_one_line_and_those_for_information_none() -> None:
    conditions = [
        {"type": "Active", "status": "False", "severity": "Info", "reason": "NoTraffic", "message": "at zero"},
        *(
            {"type": each, "status": "False", "reason": "Failed", "message": "no image"}
            for each in ("ContainerHealthy", "Ready")
        ),
        {"type": "ResourcesAvailable", "status": "True"},
    ]
    assert failed_conditions({"status": {"conditions": conditions}}) == ["ContainerHealthy, Ready Failed: no image"]


def test_a_missing_right_removes_only_its_own_part(serving: Site) -> None:
    serving.api.forbidden |= {("list", "podautoscalers"), ("list", "configmaps")}
    assert [row["desired"] for row in rows(serving)] == ["-"] * 4
    assert any(line.startswith("versions not looked at") for line in status_lines(serving.status()))


@pytest.mark.slow
def test_the_status_is_a_json_document(serving: Site) -> None:
    serving.deployer.deploy(other())
    document = json.loads(json.dumps(serving.status()))
    assert sorted(document) == ["eventing", "notes", "services", "troubles"]
    assert document["troubles"] == []


@pytest.mark.parametrize(
    ("url", "environ", "warned"),
    [
        ("http://chat.prod.example", {}, False),
        ("http://chat-prod.example", {}, True),  # by a domain-template of the cluster's own
        ("http://chat-prod.example", {"LAMINA_HOSTS": "*.example"}, False),
        ("http://chat-prod.example", {"LAMINA_HOSTS": "other.example"}, True),
        ("http://chat-prod.example", {"LAMINA_API_KEY_FILES": "/keys"}, False),
        ("", {}, False),
    ],
)
def test_a_gateway_that_refuses_the_host_of_its_own_url_is_a_warning(url: str, environ: dict[str, str], warned: bool) -> None:
    env = [{"name": name, "value": value} for name, value in environ.items()]
    gateway = {
        "metadata": {"namespace": "prod", "name": "chat"},
        "spec": {"template": {"spec": {"containers": [{"env": env}]}}},
        "status": {"url": url},
    }
    assert any("gateway.hosts" in line for line in traffic_warnings(gateway)) is warned
