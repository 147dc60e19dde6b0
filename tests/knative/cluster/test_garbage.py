"""Objects that a deployment or `delete` removes, keeps because they are in use, or waits for."""

import time

import pytest

from tests.support.knative.knative_controllers import add_pod
from tests.support.knative.manifests import MONITORING, OF_CHAT, names_of, objects, other, resource, secret, stage_name
from tests.support.knative.site import GATEWAY, Site

SECTIONS = {"eventing": {"dead_letter_sink": "dead-letters"}, "monitoring": {"labels": {}}}
PLURALS = ("brokers", "triggers", "sequences", "podmonitors", "prometheusrules", "networkpolicies")


@pytest.fixture
def everything(site: Site, eventing: None) -> None:
    site.api.kinds |= MONITORING


def counts(site: Site) -> dict[str, int]:
    return {plural: len(site.api.named(plural)) for plural in PLURALS if site.api.named(plural)}


def test_delete_removes_everything_it_made_and_nothing_else(serving: Site) -> None:
    serving.api.put(secret("of-another-owner", "token"))
    serving.api.put(resource("Job", "chat-prune", "batch/v1", labels=OF_CHAT))  # of GitOps
    assert serving.deployer.delete("chat") > 0
    assert {key[3] for key in serving.api.objects} == {"default", "lamina-store", "of-another-owner"}
    assert serving.deployer.delete("chat") == 0


@pytest.mark.slow
@pytest.mark.usefixtures("everything")
@pytest.mark.parametrize("digest", ["d" * 64, "e" * 64], ids=["the same pipeline", "another model"])
def test_objects_of_removed_sections_are_deleted(site: Site, digest: str) -> None:
    site.deployer.deploy(objects(**SECTIONS))
    assert counts(site) == dict.fromkeys(PLURALS, 1) | {"triggers": 2, "networkpolicies": 2}
    bare = objects(digest, network={"policies": False})
    site.deployer.deploy(bare)
    assert counts(site) == {}
    assert [name for name in site.api.named("services") if name not in ("answers", "dead-letters")] == names_of(bare)
    assert {"chat-pipeline", "lamina-store"} <= set(site.api.named("secrets"))


@pytest.mark.slow
@pytest.mark.usefixtures("everything")
def test_a_rollback_removes_sections_and_restores_them(site: Site) -> None:
    site.deployer.deploy(objects(**SECTIONS))
    site.deployer.deploy(other(network={"policies": False}))
    site.deployer.rollback("chat")
    assert counts(site) == dict.fromkeys(PLURALS, 1) | {"triggers": 2, "networkpolicies": 2}
    site.deployer.rollback("chat")
    assert counts(site) == {}


@pytest.mark.slow
def test_stages_that_a_pinned_gateway_drives_stay(site: Site) -> None:
    """Even if the gateway is scaled to zero."""
    old, new = objects(), other()
    site.deployer.deploy(old)
    site.api.edit(GATEWAY, "kn", ("spec", "traffic"), [{"revisionName": "chat-00001", "percent": 100}])
    site.api.remove("v1", "pods", "default", "chat-00001-pod")
    site.deployer.deploy(new)
    assert set(names_of(old)) | set(names_of(new)) == set(site.api.named("services"))
    assert any("stay: chat-00001 still gets requests" in line for line in site.said)
    site.api.edit(GATEWAY, "kn", ("spec", "traffic"), [{"latestRevision": True, "percent": 100}])
    site.api.controllers.reconcile(GATEWAY)
    site.deployer.deploy(new)
    assert site.api.named("services") == names_of(new)


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["Failed", "Succeeded"])
def test_ended_pods_delay_no_deployment(site: Site, phase: str) -> None:
    """Kubernetes keeps evicted pods for hours."""
    old, new = objects(), other()
    site.deployer.deploy(old)
    add_pod(site.api, site.api.objects[GATEWAY], "chat-00000", {}, phase)
    site.api.lingering_gateways = 1
    began = time.monotonic()
    site.deployer.deploy(new)
    assert time.monotonic() - began < 4, "not its limit of 5 s"
    assert stage_name(old, 0) not in site.api.named("services")


@pytest.mark.slow
def test_the_gateways_account_stays_while_a_pod_runs_as_it(serving: Site) -> None:
    own = objects(gateway={"service_account": "ours"})
    serving.api.put(resource("ServiceAccount", "ours"))
    serving.api.lingering_gateways = 1000
    serving.deployer.deploy(own)
    assert serving.api.named("serviceaccounts") == ["chat-gateway", "ours"]
    assert any("stays while a pod runs as chat-gateway" in line for line in serving.said)
    serving.api.lingering_gateways = 1
    serving.deployer.deploy(own)
    assert (serving.api.named("serviceaccounts"), serving.api.named("roles"), serving.api.named("rolebindings")) == (
        ["ours"],
        [],
        [],
    )


@pytest.mark.slow
def test_each_pipeline_has_its_own_token_which_is_created_once(serving: Site) -> None:
    token = dict(serving.api.objects["v1", "secrets", "default", "chat-pipeline"]["data"])
    serving.deployer.deploy(objects(name="draft"))
    serving.deployer.deploy(other())
    assert serving.api.objects["v1", "secrets", "default", "chat-pipeline"]["data"] == token
    assert "draft-pipeline" in serving.api.named("secrets")
    serving.deployer.delete("chat")
    assert serving.api.named("secrets") == ["draft-pipeline", "lamina-store"]
    assert serving.api.named("services") == names_of(objects(name="draft"))


@pytest.mark.slow
def test_a_token_that_two_pipelines_share_stays_with_the_second(site: Site) -> None:
    site.deployer.deploy(objects(pipeline_token_secret="shared"))
    site.deployer.deploy(objects(name="draft", pipeline_token_secret="shared"))
    site.deployer.delete("chat")
    assert "shared" in site.api.named("secrets")
    assert "kept Secret default/shared: pipeline draft uses it, too" in site.said


def test_an_existing_token_stays_as_it_is(site: Site) -> None:
    site.api.put(secret("chat-pipeline", "token"))
    site.deployer.deploy(objects())
    assert site.api.objects["v1", "secrets", "default", "chat-pipeline"]["data"] == {"token": "eA=="}
    site.deployer.delete("chat")
    assert "chat-pipeline" in site.api.named("secrets"), "Lamina did not create it"


@pytest.mark.slow
def test_objects_that_may_not_be_listed_stay_and_the_deploy_succeeds(serving: Site) -> None:
    serving.api.forbidden.add(("list", "networkpolicies"))
    assert serving.deployer.deploy(other()) == "http://chat.default.example"
    assert any(line.startswith("did not look for objects that the spec no longer needs") for line in serving.said)
