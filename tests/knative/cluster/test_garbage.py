"""Objects that a deployment or `delete` removes, keeps because they are in use, or waits for."""

import time
from typing import Any

import pytest

from knative.cluster.errors import DeployFailed
from tests.support.knative.knative_controllers import add_pod, image_pull_fails
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
    assert counts(site) == dict.fromkeys(PLURALS, 1) | {"triggers": 3, "networkpolicies": 2}
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
    assert counts(site) == dict.fromkeys(PLURALS, 1) | {"triggers": 3, "networkpolicies": 2}
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


@pytest.fixture
def hpa(site: Site) -> dict[str, Any]:
    """Knative's HPA extension and a metrics server are installed. Returns a pipeline's sections with the class hpa."""
    site.api.put(resource("Deployment", "autoscaler-hpa", "apps/v1", namespace="knative-serving"))
    site.api.kinds["metrics.k8s.io/v1"] = {"PodMetrics": "pods"}
    scaling = {"autoscaling": {"class": "hpa", "min_scale": 1}}
    return {"stage": scaling, "gateway": scaling}


def with_pods(site: Site) -> set[str]:
    """Revisions that have a pod."""
    return {each["metadata"]["labels"]["serving.knative.dev/revision"] for each in site.api.found("pods", {})}


def current(site: Site) -> set[str]:
    """The revisions that the pipeline's Services made last."""
    return {each["status"]["latestCreatedRevisionName"] for each in site.api.found("services", OF_CHAT)}


@pytest.mark.slow
@pytest.mark.parametrize("digest", ["d" * 64, "e" * 64], ids=["the same stages", "another model"])
def test_old_revisions_of_class_hpa_are_deleted(site: Site, hpa: dict[str, Any], digest: str) -> None:
    """An HPA keeps one pod of each for ever; another model's stages waited for the gateway's."""
    site.deployer.deploy(objects(**hpa))
    new = objects(digest, **hpa, log_level="debug")
    site.deployer.deploy(new)
    assert site.api.named("services") == names_of(new), "old stages are pruned: no pod of an old gateway stays"
    assert with_pods(site) == current(site)
    assert set(site.api.named("revisions")) == current(site)
    assert "deleted Revision default/chat-00001, which gets no requests and would keep a pod" in site.said


@pytest.mark.slow
def test_a_revision_of_class_hpa_that_another_route_uses_stays(
    site: Site, hpa: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("knative.cluster.garbage._UNROUTED_SECONDS", 0.5)
    site.deployer.deploy(objects(**hpa))
    site.api.routed_elsewhere.add("chat-00001")
    site.deployer.deploy(objects(**hpa, log_level="debug"))
    assert "chat-00001" in site.api.named("revisions")
    assert "Revision default/chat-00001 stays with its pods: a Route still sends requests to it" in site.said


@pytest.mark.slow
@pytest.mark.parametrize("where", ["a stage", "the gateway"])
def test_a_rollback_deletes_the_revision_that_failed(serving: Site, where: str) -> None:
    """Its pods would wait for their image until Knative's progress deadline."""
    service = "chat" if where == "the gateway" else stage_name(objects(), 1)
    serving.api.behaviours[service] = image_pull_fails
    with pytest.raises(DeployFailed, match="ImagePullBackOff"):
        serving.deployer.deploy(objects(image="registry.example/lamina:missing"))
    del serving.api.behaviours[service]
    assert f"{service}-00002" in with_pods(serving)
    serving.deployer.rollback("chat")
    assert with_pods(serving) == current(serving)
    assert f"deleted Revision default/{service}-00002, which gets no requests and is not Ready" in serving.said


@pytest.mark.slow
def test_revisions_that_may_not_be_deleted_stay_and_old_stages_do_not(serving: Site) -> None:
    """The Role of an earlier release lacks the right."""
    serving.api.forbidden.add(("delete", "revisions"))
    serving.fail(objects(image="registry.example/lamina:missing"), image_pull_fails)
    serving.api.behaviours.clear()
    serving.deployer.rollback("chat")
    serving.deployer.deploy(other())
    assert any(line.startswith("did not delete revisions that get no requests: ") for line in serving.said)
    assert serving.api.named("services") == names_of(other())
