"""`status` of a pipeline on a cluster."""

import json

from knative.cluster.client import Cluster
from knative.cluster.deployer import Deployer
from knative.cluster.errors import ClusterError
from knative.cluster.status import COLUMNS, cluster_status, status_lines, status_rows
from tests.support.knative.deployments import objects, other, stage_name
from tests.support.knative.knative_controllers import crash_loops
from tests.support.knative.kubernetes_api import KubernetesApi


def rows(cluster: Cluster) -> list[dict[str, str]]:
    return [dict(zip(COLUMNS, row, strict=True)) for row in status_rows(cluster_status(cluster, "default", "chat"))]


def lines(cluster: Cluster) -> list[str]:
    return status_lines(cluster_status(cluster, "default", "chat"))


def fail(api: KubernetesApi, deployer: Deployer) -> str:
    broken = objects(digest="e" * 64)
    api.behaviours[stage_name(broken, 1)] = crash_loops
    try:
        deployer.deploy(broken)
    except ClusterError:
        return stage_name(broken, 1)
    raise AssertionError("it worked")


def test_pods_are_counted_by_phase(api: KubernetesApi, cluster: Cluster, deployer: Deployer) -> None:
    deployer.deploy(objects())
    pod = api.objects["v1", "pods", "default", "chat-00001-pod"]
    for name, change, status in (
        ("leaving", {"deletionTimestamp": "2026-01-01T00:00:00Z"}, {}),
        ("starting", {}, {"containerStatuses": [{"name": "function", "ready": False, "restartCount": 2}]}),
        ("evicted", {}, {"phase": "Failed", "reason": "Evicted"}),
    ):
        api.put({**pod, "metadata": {**pod["metadata"], "name": name, **change}, "status": {**pod["status"], **status}})
    gateway = rows(cluster)[0]
    assert [gateway[key] for key in ("service", "ready", "pods", "starting", "leaving")] == ["chat", "yes", "1", "1", "1"]
    assert [gateway[key] for key in ("desired", "restarts", "revision", "traffic")] == ["1", "2", "chat-00001", "100 %"]
    assert gateway["url"] == "http://chat.default.example"


def test_a_failure_is_shown_with_its_reason_and_the_serving_version(
    api: KubernetesApi, cluster: Cluster, deployer: Deployer
) -> None:
    deployer.deploy(objects())
    broken = fail(api, deployer)
    said = lines(cluster)
    assert said[0].startswith("version 1 serves, pipeline ")
    assert said[1].startswith("version 2, pipeline ")
    assert "failed, " in said[1]
    assert "CrashLoopBackOff" in said[1]
    assert any(line.startswith(f"Pod {broken}-00001-pod, container user-container: waiting, Crash") for line in said)
    assert {row["service"]: row["ready"] for row in rows(cluster)}[broken] == "not yet"


def test_a_pipeline_at_zero_is_ready_and_has_no_pods(api: KubernetesApi, cluster: Cluster, deployer: Deployer) -> None:
    deployer.deploy(objects())
    for pod in api.found("pods", {}):
        api.remove(*api.key_of(pod))
    assert {(row["ready"], row["pods"], row["traffic"]) for row in rows(cluster)} == {("yes", "0", "100 %")}


def test_a_missing_right_removes_only_its_own_part(api: KubernetesApi, cluster: Cluster, deployer: Deployer) -> None:
    deployer.deploy(objects())
    api.forbidden |= {("list", "podautoscalers"), ("list", "configmaps")}
    assert [row["desired"] for row in rows(cluster)] == ["-"] * 4
    assert any(line.startswith("versions not looked at") for line in lines(cluster))


def test_the_status_is_a_json_document(api: KubernetesApi, cluster: Cluster, deployer: Deployer) -> None:
    deployer.deploy(objects())
    deployer.deploy(other())
    document = json.loads(json.dumps(cluster_status(cluster, "default", "chat")))
    assert sorted(document) == ["eventing", "notes", "services", "troubles"]
    assert document["troubles"] == []
