"""Deployments over real HTTP against a stand-in for the Kubernetes API; the deployer does not know that it is one."""

import threading

import pytest

from knative.cluster.client import Cluster
from knative.cluster.deployer import Deployer
from knative.cluster.errors import DeployFailed, FieldConflict, NotPermitted, Rejected
from knative.cluster.history import History
from knative.cluster.objects import gateway_of
from knative.spec.kubernetes_object import KubernetesObject
from tests.support.knative.deployments import GATEWAY, objects, other, stage_name
from tests.support.knative.kubernetes_api import KubernetesApi

MAX_SCALE = ("spec", "template", "metadata", "annotations", "autoscaling.knative.dev/max-scale")
WITH_EVENTING = {"eventing": {"dead_letter_sink": "dead-letters"}}


def test_stages_come_before_the_gateway_whose_url_is_returned(api: KubernetesApi, deployer: Deployer, said: list[str]) -> None:
    rendered = objects()
    assert deployer.deploy(rendered) == "http://chat.default.example"
    services = [name for name in api.applied if name in api.named("services")]
    assert services == [*(stage_name(rendered, k) for k in range(3)), "chat"]
    assert "chat-pipeline" in api.named("secrets"), "the pipeline's token is created"
    assert any("version 1" in line for line in said)


def test_a_second_deploy_changes_nothing(api: KubernetesApi, cluster: Cluster, deployer: Deployer) -> None:
    deployer.deploy(objects())
    before = {key: each["metadata"].get("generation") for key, each in api.objects.items()}
    deployer.deploy(objects())
    assert {key: each["metadata"].get("generation") for key, each in api.objects.items()} == before
    assert [version.number for version in History(cluster, "default", "chat").versions()] == [1]


def test_old_stages_are_pruned_when_their_sequences_have_ended(api: KubernetesApi, deployer: Deployer, said: list[str]) -> None:
    new = objects(((0, 15), (15, 30)))
    deployer.deploy(objects())
    api.lingering_gateways = 3
    deployer.deploy(new)
    assert api.named("services") == sorted([stage_name(new, 0), stage_name(new, 1), "chat"])
    finishing = next(k for k, line in enumerate(said) if "still finish their answers" in line)
    assert finishing < next(k for k, line in enumerate(said) if "pruned" in line)


def test_old_stages_stay_while_an_old_gateway_lives(api: KubernetesApi, cluster: Cluster, said: list[str]) -> None:
    impatient = Deployer(cluster, "default", said.append, timeout_seconds=0.2)
    old = objects()
    impatient.deploy(old)
    api.lingering_gateways = 10_000
    impatient.deploy(other())
    assert stage_name(old, 0) in api.named("services")
    assert any("next deploy prunes" in line for line in said)


def test_objects_that_the_spec_no_longer_needs_are_deleted(api: KubernetesApi, deployer: Deployer) -> None:
    deployer.deploy(objects())
    assert len(api.named("networkpolicies")) == 2
    deployer.deploy([each for each in objects() if each["kind"] != "NetworkPolicy"])
    assert api.named("networkpolicies") == []
    assert {"chat-pipeline", "lamina-store"} <= set(api.named("secrets"))
    assert len(api.named("services")) == 4


def test_diff_is_the_clusters_own_dry_run(api: KubernetesApi, deployer: Deployer) -> None:
    deployer.deploy(objects())
    assert list(deployer.diff(objects())) == []
    before = dict(api.objects)
    lines = list(deployer.diff(objects(kv_cache="1Gi")))
    assert any(line.startswith("-") and "536870912" in line for line in lines)
    assert any(line.startswith("+") and "1073741824" in line for line in lines)
    assert api.objects == before


def test_fields_of_another_manager_are_taken_over_only_by_force(api: KubernetesApi, deployer: Deployer) -> None:
    deployer.deploy(objects())
    api.edit(GATEWAY, "kubectl-edit", MAX_SCALE, "99")
    with pytest.raises(FieldConflict, match=r"kubectl-edit.*max-scale.*--force-conflicts"):
        deployer.deploy(objects())
    deployer.deploy(objects(), force=True)
    annotations = api.objects[GATEWAY]["spec"]["template"]["metadata"]["annotations"]
    assert annotations["autoscaling.knative.dev/max-scale"] == "3"


def test_the_webhooks_rejection_names_the_field(deployer: Deployer) -> None:
    rendered = objects()
    gateway_of(rendered)["spec"]["template"]["spec"]["timeoutSeconds"] = 601
    with pytest.raises(Rejected, match=r"timeoutSeconds"):
        deployer.deploy(rendered)


def test_an_exceeded_quota_is_named_with_what_to_do(api: KubernetesApi, deployer: Deployer) -> None:
    api.quota_message = "cpu: requested 3, limited 2"
    with pytest.raises(Rejected, match=r"exceeded quota: cpu.*lower the resources"):
        deployer.deploy(objects())


def test_a_missing_right_to_read_is_reported_and_one_to_write_is_an_error(
    api: KubernetesApi, deployer: Deployer, said: list[str]
) -> None:
    api.forbidden.add(("get", "deployments"))
    deployer.deploy(objects())
    assert any("not checked" in line for line in said)
    api.forbidden.add(("patch", "services"))
    with pytest.raises(NotPermitted, match="ask for a Role"):
        deployer.deploy(other())


def test_an_object_that_is_being_deleted_is_waited_for(api: KubernetesApi, deployer: Deployer, said: list[str]) -> None:
    deployer.deploy(objects())
    held = {"deletionTimestamp": "2026-01-01T00:00:00Z", "finalizers": ["example.com/hold"]}
    api.put({**api.objects[GATEWAY], "metadata": {**api.objects[GATEWAY]["metadata"], **held}})
    with pytest.raises(DeployFailed, match=r"example\.com/hold"):
        deployer.deploy(objects())
    timer = threading.Timer(0.5, api.finish_deletion, [GATEWAY])
    timer.start()
    deployer.deploy(objects())
    timer.join()
    assert any("being deleted" in line for line in said)


# -- Eventing ---------------------------------------------------------------------------------------------------------


def names(rendered: list[KubernetesObject], kind: str) -> list[str]:
    return sorted(each["metadata"]["name"] for each in rendered if each["kind"] == kind)


@pytest.mark.usefixtures("eventing")
def test_triggers_come_last_and_lead_to_the_new_sequence(api: KubernetesApi, deployer: Deployer) -> None:
    rendered = objects(spec=WITH_EVENTING)
    deployer.deploy(rendered)
    order = api.applied
    last_service = max(order.index(name) for name in names(rendered, "Service"))
    sequence = names(rendered, "Sequence")[0]
    assert last_service < order.index(sequence) < min(order.index(name) for name in ("chat-generate", "chat-score"))


@pytest.mark.usefixtures("eventing")
def test_eventing_objects_of_the_old_pipeline_are_deleted_with_it(api: KubernetesApi, deployer: Deployer) -> None:
    old, new = objects(spec=WITH_EVENTING), other(**WITH_EVENTING)
    deployer.deploy(old)
    deployer.deploy(new)
    sinks = {"dead-letters", "answers"}
    for kind, plural in (("Service", "services"), ("Sequence", "sequences"), ("Broker", "brokers"), ("Trigger", "triggers")):
        assert [name for name in api.named(plural) if name not in sinks] == names(new, kind)
    assert names(old, "Sequence") != names(new, "Sequence")
    trigger = api.objects["eventing.knative.dev/v1", "triggers", "default", "chat-score"]
    assert [trigger["spec"]["subscriber"]["ref"]["name"]] == names(new, "Sequence")
    deployer.delete("chat")
    assert set(api.named("services")) == sinks
    assert api.named("sequences") == api.named("brokers") == api.named("triggers") == []
