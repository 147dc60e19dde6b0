"""The rendered Role of a deployer has the rights that the commands use, and no others."""

import pytest

from knative.cluster.cost import usage_since_start
from knative.cluster.garbage import OWN_KINDS
from knative.cluster.lease import deploy_lease
from knative.cluster.status import pipelines
from knative.render.access import deployer_role, gateway_access
from tests.support.functions.functions import wait_until
from tests.support.knative.knative_controllers import crash_loops
from tests.support.knative.kubernetes_api import EVENTING
from tests.support.knative.manifests import MONITORING, OF_CHAT, objects, other, resolved_pipeline, resource
from tests.support.knative.site import Site

SECTIONS = {"eventing": {"dead_letter_sink": "dead-letters"}, "monitoring": {"labels": {}}}
OTHER_NAMESPACE = ("get", "apps", "deployments")  # Knative's version; without the right it is reported as not checked
LEASE = ("coordination.k8s.io/v1", "leases", "default", "chat-deploy")
NEVER_APPLIED_HERE = ("policy", "poddisruptionbudgets")


def granted() -> set[tuple[str, str, str]]:
    return {
        (verb, rule["apiGroups"][0], resource)
        for rule in deployer_role("default")["rules"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }


def run_every_command(site: Site) -> None:
    everything = {**SECTIONS, "gateway": {"jobs": "jobs"}}
    site.deployer.deploy(objects(**everything))
    list(site.deployer.diff(objects(**everything)))
    for broken in (objects("f" * 64, **everything), objects(**everything, log_level="debug")):
        site.fail(broken, crash_loops)
        site.api.behaviours.clear()
        site.deployer.rollback("chat")
    site.deployer.rotate_token("chat")
    for end in (site.deployer.abort, site.deployer.promote):
        site.deployer.canary(other(**SECTIONS), 10)
        end("chat")
    site.api.put(resource("ServiceAccount", "ours"))
    site.deployer.deploy(objects(gateway={"service_account": "ours"}, network={"policies": False}))
    with deploy_lease(site.cluster, "default", "chat", lambda _: None, duration_seconds=0.4):
        first = dict(site.api.objects[LEASE])
        wait_until(lambda: site.api.objects[LEASE] != first)
    site.status()
    pipelines(site.cluster, "default", lambda _: None)
    usage_since_start(site.cluster, "default", "chat")
    site.api.put(resource("Job", "prune", "batch/v1", labels=OF_CHAT))
    site.deployer.delete("chat")


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_the_role_has_the_rights_that_all_commands_use(site: Site) -> None:
    site.api.kinds |= EVENTING | MONITORING
    site.api.put(resource("Service", "dead-letters", "serving.knative.dev/v1", spec={"template": {}}))
    run_every_command(site)
    asked = {(verb, group, plural) for verb, group, plural, _ in site.api.calls} - {OTHER_NAMESPACE}
    allowed = granted()
    assert sorted(asked - allowed) == [], "used and not granted"
    unused = {each for each in allowed - asked if each[1:] != NEVER_APPLIED_HERE and each[2] != "endpointslices"}
    unused -= {("patch", "coordination.k8s.io", "leases")}  # of fleets with `max_devices`
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


def test_no_right_outside_the_namespace_is_needed(site: Site) -> None:
    site.api.forbidden.add(("get", "deployments"))
    site.deployer.deploy(objects())
    namespaces = {namespace for *_, plural, namespace in site.api.calls if plural != "deployments"}
    assert namespaces == {"default"}
