"""The rendered Role of a deployer has the rights that the commands use, and no others."""

import contextlib

import pytest

from knative.cluster.client import Cluster
from knative.cluster.cost import usage_since_start
from knative.cluster.deployer import Deployer
from knative.cluster.errors import DeployFailed
from knative.cluster.garbage import OWN_KINDS
from knative.cluster.lease import deploy_lease
from knative.cluster.status import cluster_status, pipelines
from knative.render.access import deployer_role, gateway_access
from tests.support.knative.deployments import account, objects, other, sink, stage_name, until
from tests.support.knative.knative_controllers import crash_loops
from tests.support.knative.kubernetes_api import EVENTING, KubernetesApi
from tests.support.knative.pipelines import resolved_pipeline

SECTIONS = {"eventing": {"dead_letter_sink": "dead-letters"}, "monitoring": {"labels": {}}}
OTHER_NAMESPACE = ("get", "apps", "deployments")  # Knative's version; without the right it is reported as not checked
NEVER_APPLIED_HERE = ("policy", "poddisruptionbudgets")


def granted() -> set[tuple[str, str, str]]:
    return {
        (verb, rule["apiGroups"][0], resource)
        for rule in deployer_role("default")["rules"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }


def run_every_command(api: KubernetesApi, cluster: Cluster, deployer: Deployer) -> None:
    everything = {**SECTIONS, "gateway": {}}
    deployer.deploy(objects(spec=everything))
    list(deployer.diff(objects(spec=everything)))
    broken = objects(digest="f" * 64, spec=everything)
    api.behaviours[stage_name(broken, 0)] = crash_loops
    with contextlib.suppress(DeployFailed):
        deployer.deploy(broken)
    deployer.rollback("chat")
    deployer.rotate_token("chat")
    for end in (deployer.abort, deployer.promote):
        deployer.canary(other(**SECTIONS), 10)
        end("chat")
    api.put(account("ours"))
    deployer.deploy(objects(spec={"gateway": {"service_account": "ours"}, "network": {"policies": False}}))
    with deploy_lease(cluster, "default", "chat", lambda _: None, duration_seconds=0.4):
        first = dict(api.objects["coordination.k8s.io/v1", "leases", "default", "chat-deploy"])
        until(lambda: api.objects["coordination.k8s.io/v1", "leases", "default", "chat-deploy"] != first)
    cluster_status(cluster, "default", "chat")
    pipelines(cluster, "default", lambda _: None)
    usage_since_start(cluster, "default", "chat")
    labels = {"app.kubernetes.io/instance": "chat", "app.kubernetes.io/managed-by": "lamina"}
    api.put({"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "prune", "namespace": "default", "labels": labels}})
    deployer.delete("chat")


@pytest.mark.timeout(120)
def test_the_role_has_the_rights_that_all_commands_use(api: KubernetesApi, cluster: Cluster, deployer: Deployer) -> None:
    api.kinds |= EVENTING | {"monitoring.coreos.com/v1": {"PodMonitor": "podmonitors", "PrometheusRule": "prometheusrules"}}
    api.put(sink("dead-letters"))
    run_every_command(api, cluster, deployer)
    asked = {(verb, group, resource) for verb, group, resource, _ in api.calls} - {OTHER_NAMESPACE}
    allowed = granted()
    assert sorted(asked - allowed) == [], "used and not granted"
    unused = {each for each in allowed - asked if each[1:] != NEVER_APPLIED_HERE and each[2] != "endpointslices"}
    assert sorted(unused) == [], "granted and never used"


def test_a_deployer_may_grant_the_gateways_rights() -> None:
    """Kubernetes rejects a Role with rights that its creator lacks."""
    role = next(each for each in gateway_access(resolved_pipeline()) if each["kind"] == "Role")
    for rule in role["rules"]:
        for verb in rule["verbs"]:
            assert (verb, rule["apiGroups"][0], rule["resources"][0]) in granted()


def test_a_deployer_may_delete_every_kind_of_a_pipeline() -> None:
    deleted = {(group, resource) for verb, group, resource in granted() if verb == "delete"}
    for api_version, kind in OWN_KINDS:
        group = api_version.split("/")[0] if "/" in api_version else ""
        plural = "networkpolicies" if kind == "NetworkPolicy" else f"{kind.lower()}s"
        assert (group, plural) in deleted


def test_no_right_outside_the_namespace_is_needed(api: KubernetesApi, deployer: Deployer) -> None:
    api.forbidden.add(("get", "deployments"))
    deployer.deploy(objects())
    namespaces = {namespace for *_, resource, namespace in api.calls if resource != "deployments"}
    assert namespaces == {"default"}
