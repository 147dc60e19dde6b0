"""A canary gets a part of the requests; then all, or none."""

import pytest

from knative.cluster.client import Cluster
from knative.cluster.deployer import Deployer
from knative.cluster.errors import DeployFailed, FieldConflict, NothingServes, Rejected
from knative.cluster.history import History
from knative.cluster.objects import traffic_of
from knative.cluster.status import cluster_status, status_lines, status_rows
from knative.webhook.check import validate, warnings
from tests.support.knative.deployments import GATEWAY, objects, other, services, stage_name, traffic
from tests.support.knative.knative_controllers import crash_loops
from tests.support.knative.kubernetes_api import KubernetesApi

SPLIT = [{"revisionName": "chat-00001", "percent": 90}, {"latestRevision": True, "percent": 10}]
ALL = [{"latestRevision": True, "percent": 100}]


def routed(api: KubernetesApi) -> dict[str, int]:
    return traffic_of(api.objects[GATEWAY])


def outcomes(cluster: Cluster) -> list[str]:
    return [str(version.outcome) for version in History(cluster, "default", "chat").versions()]


def test_requests_are_split_between_two_gateways_with_stages_of_their_own(
    api: KubernetesApi, cluster: Cluster, deployer: Deployer
) -> None:
    old, new = objects(), other()
    deployer.deploy(old)
    assert deployer.canary(new, 10) == "http://chat.default.example"
    assert traffic(api) == SPLIT
    assert routed(api) == {"chat-00001": 90, "chat-00002": 10}
    assert set(api.named("services")) == set(services(old)) | set(services(new))
    assert outcomes(cluster) == ["served", "canary"]
    assert validate(api.objects[GATEWAY] | {"metadata": {"name": "chat"}}) == []
    assert list(warnings(api.objects[GATEWAY] | {"metadata": {"name": "chat"}})) == []


def test_a_second_canary_deploy_changes_the_share(api: KubernetesApi, deployer: Deployer) -> None:
    deployer.deploy(objects())
    deployer.canary(other(), 10)
    deployer.canary(other(), 50)
    assert routed(api) == {"chat-00001": 50, "chat-00002": 50}


def test_status_shows_both_revisions_of_the_gateway(api: KubernetesApi, cluster: Cluster, deployer: Deployer) -> None:
    old, new = objects(), other()
    deployer.deploy(old)
    api.lingering_gateways = 1000
    deployer.canary(new, 10)
    status = cluster_status(cluster, "default", "chat")
    rows = [row for row in status_rows(status) if row[0] == "chat"]
    fingerprints = [each["metadata"]["labels"]["lamina.dev/pipeline"] for each in (old[-1], new[-1])]
    assert [(row[7], row[8], row[9]) for row in rows] == [
        ("chat-00001", "90 %", fingerprints[0]),
        ("chat-00002", "10 %", fingerprints[1]),
    ]
    assert any(line.endswith("canary, 10 % of the requests") for line in status_lines(status))
    assert not any("that Lamina did not make" in line for line in status_lines(status))


def test_a_promoted_canary_gets_all_requests_and_the_old_pipeline_is_deleted(
    api: KubernetesApi, cluster: Cluster, deployer: Deployer
) -> None:
    new = other()
    deployer.deploy(objects())
    deployer.canary(new, 10)
    deployer.promote("chat")
    assert traffic(api) == ALL
    assert routed(api) == {"chat-00002": 100}, "a third revision was made"
    assert api.named("services") == services(new)
    assert outcomes(cluster) == ["served", "served"]
    deployer.rollback("chat")
    assert api.named("services") == services(objects())


def test_an_aborted_canary_gets_no_request_at_once_and_is_deleted(
    api: KubernetesApi, cluster: Cluster, deployer: Deployer
) -> None:
    """No request reaches it while the gateway's old template is rolled out again."""
    deployer.deploy(objects())
    deployer.canary(other(), 10)
    seen: list[dict[str, int]] = []
    api.on_change = lambda key: seen.append(routed(api)) if key == GATEWAY else None
    deployer.abort("chat")
    first = seen.index({"chat-00001": 100})
    assert all("chat-00002" not in each for each in seen[first:])
    assert traffic(api) == ALL
    assert api.named("services") == services(objects())
    assert outcomes(cluster) == ["served", "aborted", "served"]


def test_a_rollback_aborts_the_canary(api: KubernetesApi, cluster: Cluster, deployer: Deployer) -> None:
    deployer.deploy(objects())
    deployer.canary(other(), 10)
    deployer.rollback("chat")
    assert api.named("services") == services(objects())
    assert outcomes(cluster) == ["served", "aborted", "served"]


def test_a_canary_that_fails_gets_no_request(api: KubernetesApi, cluster: Cluster, deployer: Deployer) -> None:
    new = other()
    deployer.deploy(objects())
    api.behaviours["chat"] = crash_loops
    with pytest.raises(DeployFailed, match="CrashLoopBackOff"):
        deployer.canary(new, 10)
    assert routed(api) == {"chat-00001": 100}
    assert outcomes(cluster) == ["served", "failed"]
    del api.behaviours["chat"]
    deployer.rollback("chat")
    assert api.named("services") == services(objects())
    assert traffic(api) == ALL


def test_a_canary_needs_a_serving_pipeline_with_other_stages_and_no_second_canary(
    api: KubernetesApi, deployer: Deployer
) -> None:
    with pytest.raises(NothingServes, match="deploy it without --canary"):
        deployer.canary(objects(), 10)
    deployer.deploy(objects())
    with pytest.raises(NothingServes, match="no canary of chat"):
        deployer.promote("chat")
    with pytest.raises(Rejected, match="a canary needs another model, dtype or cut"):
        deployer.canary(objects(kv_cache="1Gi"), 10)
    deployer.canary(other(), 10)
    with pytest.raises(Rejected, match="is a canary already"):
        deployer.canary(objects(digest="f" * 64), 10)
    with pytest.raises(Rejected, match="`promote` or `abort` it"):
        deployer.deploy(objects(digest="f" * 64))


@pytest.mark.usefixtures("eventing")
def test_eventing_and_network_stay_with_the_serving_pipeline(api: KubernetesApi, deployer: Deployer) -> None:
    section = {"eventing": {"dead_letter_sink": "dead-letters"}}
    old = objects(spec=section)
    deployer.deploy(old)
    before = {key: each for key, each in api.objects.items() if key[1] in ("triggers", "sequences", "networkpolicies")}
    deployer.canary(other(**section), 10)
    assert {key: api.objects[key] for key in before} == before
    assert not [name for name in api.named("services") if name.endswith("-ev") and name not in services(old)]
    deployer.promote("chat")
    assert api.named("sequences") == [each["metadata"]["name"] for each in other(**section) if each["kind"] == "Sequence"]


def test_fields_of_another_manager_are_a_conflict(api: KubernetesApi, deployer: Deployer) -> None:
    deployer.deploy(objects())
    path = ("spec", "template", "metadata", "annotations", "autoscaling.knative.dev/max-scale")
    api.edit(GATEWAY, "kubectl-edit", path, "99")
    with pytest.raises(FieldConflict, match="kubectl-edit"):
        deployer.canary(other(), 10)
    assert stage_name(objects(), 0) in api.named("services")
