"""Deployments over real HTTP against a stand-in for the Kubernetes API; the deployer does not know that it is one."""

import threading

import pytest

from knative.cluster.errors import DeployFailed, FieldConflict, NotPermitted, Rejected
from knative.cluster.objects import gateway_of
from tests.support.knative.manifests import names_of, objects, other, stage_name
from tests.support.knative.site import GATEWAY, Site

MAX_SCALE = ("spec", "template", "metadata", "annotations", "autoscaling.knative.dev/max-scale")
WITH_EVENTING = {"eventing": {"dead_letter_sink": "dead-letters"}}


def test_stages_come_before_the_gateway_whose_url_is_returned(site: Site) -> None:
    rendered = objects()
    assert site.deployer.deploy(rendered) == "http://chat.default.example"
    services = [name for name in site.api.applied if name in site.api.named("services")]
    assert services == [*(stage_name(rendered, k) for k in range(3)), "chat"]
    assert "chat-pipeline" in site.api.named("secrets"), "the pipeline's token is created"
    assert any("version 1" in line for line in site.said)


@pytest.mark.slow
def test_a_second_deploy_changes_nothing(serving: Site) -> None:
    before = {key: each["metadata"].get("generation") for key, each in serving.api.objects.items()}
    serving.deployer.deploy(objects())
    assert {key: each["metadata"].get("generation") for key, each in serving.api.objects.items()} == before
    assert [version.number for version in serving.history.versions()] == [1]


@pytest.mark.slow
def test_old_stages_are_pruned_when_their_sequences_have_ended(site: Site) -> None:
    new = objects(cut="0:15,15:30")
    site.deployer.deploy(objects())
    site.api.lingering_gateways = 3
    site.deployer.deploy(new)
    assert site.api.named("services") == sorted([stage_name(new, 0), stage_name(new, 1), "chat"])
    finishing = next(k for k, line in enumerate(site.said) if "still finish their answers" in line)
    assert finishing < next(k for k, line in enumerate(site.said) if "pruned" in line)


@pytest.mark.slow
def test_old_stages_stay_while_an_old_gateway_lives(site: Site) -> None:
    impatient = site.deployer_for(0.2)
    old = objects()
    impatient.deploy(old)
    site.api.lingering_gateways = 10_000
    impatient.deploy(other())
    assert stage_name(old, 0) in site.api.named("services")
    assert any("next deploy prunes" in line for line in site.said)


@pytest.mark.slow
def test_diff_is_the_clusters_own_dry_run(serving: Site) -> None:
    assert list(serving.deployer.diff(objects())) == []
    before = dict(serving.api.objects)
    lines = list(serving.deployer.diff(objects(stage={"kv_cache": "1Gi"})))
    assert any(line.startswith("-") and "536870912" in line for line in lines)
    assert any(line.startswith("+") and "1073741824" in line for line in lines)
    assert serving.api.objects == before


@pytest.mark.slow
def test_fields_of_another_manager_are_taken_over_only_by_force(serving: Site) -> None:
    serving.api.edit(GATEWAY, "kubectl-edit", MAX_SCALE, "99")
    with pytest.raises(FieldConflict, match=r"kubectl-edit.*max-scale.*--force-conflicts"):
        serving.deployer.deploy(objects())
    serving.deployer.deploy(objects(), force=True)
    annotations = serving.api.objects[GATEWAY]["spec"]["template"]["metadata"]["annotations"]
    assert annotations["autoscaling.knative.dev/max-scale"] == "3"


def test_the_webhooks_rejection_names_the_field(site: Site) -> None:
    rendered = objects()
    gateway_of(rendered)["spec"]["template"]["spec"]["timeoutSeconds"] = 601
    with pytest.raises(Rejected, match=r"timeoutSeconds"):
        site.deployer.deploy(rendered)


def test_an_exceeded_quota_is_named_with_what_to_do(site: Site) -> None:
    site.api.quota_message = "cpu: requested 3, limited 2"
    with pytest.raises(Rejected, match=r"exceeded quota: cpu.*lower the resources"):
        site.deployer.deploy(objects())


def test_a_missing_right_to_read_is_reported_and_one_to_write_is_an_error(site: Site) -> None:
    site.api.forbidden.add(("get", "deployments"))
    site.deployer.deploy(objects())
    assert any("not checked" in line for line in site.said)
    site.api.forbidden.add(("patch", "services"))
    with pytest.raises(NotPermitted, match="ask for a Role"):
        site.deployer.deploy(other())


@pytest.mark.slow
def test_an_object_that_is_being_deleted_is_waited_for(serving: Site) -> None:
    held = {"deletionTimestamp": "2026-01-01T00:00:00Z", "finalizers": ["example.com/hold"]}
    serving.api.put({**serving.api.objects[GATEWAY], "metadata": {**serving.api.objects[GATEWAY]["metadata"], **held}})
    with pytest.raises(DeployFailed, match=r"example\.com/hold"):
        serving.deployer.deploy(objects())
    timer = threading.Timer(0.5, serving.api.finish_deletion, [GATEWAY])
    timer.start()
    serving.deployer.deploy(objects())
    timer.join()
    assert any("being deleted" in line for line in serving.said)


# -- Eventing ---------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("eventing")
def test_triggers_come_last_and_lead_to_the_new_sequence(site: Site) -> None:
    rendered = objects(**WITH_EVENTING)
    site.deployer.deploy(rendered)
    order = site.api.applied
    last_service = max(order.index(name) for name in names_of(rendered, "Service"))
    sequence = names_of(rendered, "Sequence")[0]
    assert last_service < order.index(sequence) < min(order.index(name) for name in ("chat-generate", "chat-score"))


@pytest.mark.slow
@pytest.mark.usefixtures("eventing")
def test_eventing_objects_of_the_old_pipeline_are_deleted_with_it(site: Site) -> None:
    old, new = objects(**WITH_EVENTING), other(**WITH_EVENTING)
    site.deployer.deploy(old)
    site.deployer.deploy(new)
    sinks = {"dead-letters", "answers"}
    for kind, plural in (("Service", "services"), ("Sequence", "sequences"), ("Broker", "brokers"), ("Trigger", "triggers")):
        assert [name for name in site.api.named(plural) if name not in sinks] == names_of(new, kind)
    assert names_of(old, "Sequence") != names_of(new, "Sequence")
    trigger = site.api.objects["eventing.knative.dev/v1", "triggers", "default", "chat-score"]
    assert [trigger["spec"]["subscriber"]["ref"]["name"]] == names_of(new, "Sequence")
    site.deployer.delete("chat")
    assert set(site.api.named("services")) == sinks
    assert site.api.named("sequences") == site.api.named("brokers") == site.api.named("triggers") == []
