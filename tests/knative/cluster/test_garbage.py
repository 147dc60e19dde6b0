"""Objects that a deployment or `delete` removes, keeps because they are in use, or waits for."""

import time

import pytest

from knative.cluster.deployer import Deployer
from tests.support.knative.deployments import GATEWAY, account, objects, other, secret, services, stage_name
from tests.support.knative.knative_controllers import add_pod
from tests.support.knative.kubernetes_api import KubernetesApi
from tests.support.knative.pipelines import rendered_pipeline

MONITORING = {"PodMonitor": "podmonitors", "PrometheusRule": "prometheusrules"}
SECTIONS = {"eventing": {"dead_letter_sink": "dead-letters"}, "monitoring": {"labels": {}}}
PLURALS = ("brokers", "triggers", "sequences", "podmonitors", "prometheusrules", "networkpolicies")


@pytest.fixture
def everything(api: KubernetesApi, eventing: None) -> None:
    api.kinds |= {"monitoring.coreos.com/v1": dict(MONITORING)}


def counts(api: KubernetesApi) -> dict[str, int]:
    return {plural: len(api.named(plural)) for plural in PLURALS if api.named(plural)}


def test_delete_removes_everything_it_made_and_nothing_else(api: KubernetesApi, deployer: Deployer) -> None:
    deployer.deploy(objects())
    api.put(secret("of-another-owner", "token"))
    assert deployer.delete("chat") > 0
    assert {key[3] for key in api.objects} == {"default", "lamina-store", "of-another-owner"}
    assert deployer.delete("chat") == 0


@pytest.mark.usefixtures("everything")
@pytest.mark.parametrize("digest", ["d" * 64, "e" * 64], ids=["the same pipeline", "another model"])
def test_objects_of_removed_sections_are_deleted(api: KubernetesApi, deployer: Deployer, digest: str) -> None:
    deployer.deploy(objects(spec=SECTIONS))
    assert counts(api) == dict.fromkeys(PLURALS, 1) | {"triggers": 2, "networkpolicies": 2}
    bare = objects(digest=digest, spec={"network": {"policies": False}})
    deployer.deploy(bare)
    assert counts(api) == {}
    assert [name for name in api.named("services") if name not in ("answers", "dead-letters")] == services(bare)


@pytest.mark.usefixtures("everything")
def test_a_rollback_removes_sections_and_restores_them(api: KubernetesApi, deployer: Deployer) -> None:
    deployer.deploy(objects(spec=SECTIONS))
    deployer.deploy(other(network={"policies": False}))
    deployer.rollback("chat")
    assert counts(api) == dict.fromkeys(PLURALS, 1) | {"triggers": 2, "networkpolicies": 2}
    deployer.rollback("chat")
    assert counts(api) == {}


def test_stages_that_a_pinned_gateway_drives_stay(api: KubernetesApi, deployer: Deployer, said: list[str]) -> None:
    """Even if the gateway is scaled to zero."""
    old, new = objects(), other()
    deployer.deploy(old)
    api.edit(GATEWAY, "kn", ("spec", "traffic"), [{"revisionName": "chat-00001", "percent": 100}])
    api.remove("v1", "pods", "default", "chat-00001-pod")
    deployer.deploy(new)
    assert set(services(old)) | set(services(new)) == set(api.named("services"))
    assert any("stay: chat-00001 still gets requests" in line for line in said)
    api.edit(GATEWAY, "kn", ("spec", "traffic"), [{"latestRevision": True, "percent": 100}])
    api.controllers.reconcile(GATEWAY)
    deployer.deploy(new)
    assert api.named("services") == services(new)


@pytest.mark.parametrize("phase", ["Failed", "Succeeded"])
def test_ended_pods_delay_no_deployment(api: KubernetesApi, deployer: Deployer, phase: str) -> None:
    """Kubernetes keeps evicted pods for hours."""
    old, new = objects(), other()
    deployer.deploy(old)
    add_pod(api, {**api.objects[GATEWAY], "metadata": {**api.objects[GATEWAY]["metadata"]}}, "chat-00000", {}, phase)
    api.lingering_gateways = 1
    began = time.monotonic()
    deployer.deploy(new)
    assert time.monotonic() - began < 4, "not its limit of 5 s"
    assert stage_name(old, 0) not in api.named("services")


def test_the_gateways_account_stays_while_a_pod_runs_as_it(api: KubernetesApi, deployer: Deployer, said: list[str]) -> None:
    deployer.deploy(objects())
    own = objects(spec={"gateway": {"service_account": "ours"}})
    api.put(account("ours"))
    api.lingering_gateways = 1000
    deployer.deploy(own)
    assert api.named("serviceaccounts") == ["chat-gateway", "ours"]
    assert any("stays while a pod runs as chat-gateway" in line for line in said)
    api.lingering_gateways = 1
    deployer.deploy(own)
    assert (api.named("serviceaccounts"), api.named("roles"), api.named("rolebindings")) == (["ours"], [], [])


def test_each_pipeline_has_its_own_token_which_is_created_once(api: KubernetesApi, deployer: Deployer) -> None:
    deployer.deploy(objects())
    token = dict(api.objects["v1", "secrets", "default", "chat-pipeline"]["data"])
    deployer.deploy(rendered_pipeline(name="draft"))
    deployer.deploy(other())
    assert api.objects["v1", "secrets", "default", "chat-pipeline"]["data"] == token
    assert "draft-pipeline" in api.named("secrets")
    deployer.delete("chat")
    assert api.named("secrets") == ["draft-pipeline", "lamina-store"]
    assert api.named("services") == services(rendered_pipeline(name="draft"))


def test_a_token_that_two_pipelines_share_stays_with_the_second(
    api: KubernetesApi, deployer: Deployer, said: list[str]
) -> None:
    deployer.deploy(objects(spec={"pipeline_token_secret": "shared"}))
    deployer.deploy(rendered_pipeline(name="draft", pipeline_token_secret="shared"))
    deployer.delete("chat")
    assert "shared" in api.named("secrets")
    assert "kept Secret default/shared: pipeline draft uses it, too" in said


def test_an_existing_token_stays_as_it_is(api: KubernetesApi, deployer: Deployer) -> None:
    api.put(secret("chat-pipeline", "token"))
    deployer.deploy(objects())
    assert api.objects["v1", "secrets", "default", "chat-pipeline"]["data"] == {"token": "eA=="}
    deployer.delete("chat")
    assert "chat-pipeline" in api.named("secrets"), "Lamina did not create it"


def test_the_pruning_job_of_gitops_is_deleted_with_its_pipeline(api: KubernetesApi, deployer: Deployer) -> None:
    deployer.deploy(objects())
    labels = {"app.kubernetes.io/instance": "chat", "app.kubernetes.io/managed-by": "lamina"}
    metadata = {"name": "chat-prune", "namespace": "default", "labels": labels}
    api.put({"apiVersion": "batch/v1", "kind": "Job", "metadata": metadata})
    deployer.delete("chat")
    assert api.named("jobs") == []


def test_objects_that_may_not_be_listed_stay_and_the_deploy_succeeds(
    api: KubernetesApi, deployer: Deployer, said: list[str]
) -> None:
    deployer.deploy(objects())
    api.forbidden.add(("list", "networkpolicies"))
    assert deployer.deploy(other()) == "http://chat.default.example"
    assert any(line.startswith("did not look for objects that the spec no longer needs") for line in said)
