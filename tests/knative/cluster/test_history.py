"""Versions keep what became of them, and `rollback` goes to what last served."""

import pytest
import yaml

from knative.cluster.client import Cluster
from knative.cluster.deployer import Deployer
from knative.cluster.errors import ClusterError, DeployFailed, NothingServes
from knative.cluster.history import KEPT_VERSIONS, History
from knative.spec.kubernetes_object import KubernetesObject
from tests.support.knative.deployments import objects, other, services, stage_name
from tests.support.knative.knative_controllers import crash_loops
from tests.support.knative.kubernetes_api import KubernetesApi


def outcomes(cluster: Cluster) -> list[tuple[int, str]]:
    return [(version.number, str(version.outcome)) for version in History(cluster, "default", "chat").versions()]


def fail(api: KubernetesApi, deployer: Deployer, rendered: list[KubernetesObject]) -> None:
    api.behaviours[stage_name(rendered, 1)] = crash_loops
    with pytest.raises(DeployFailed):
        deployer.deploy(rendered)


def test_a_rollback_after_a_failure_goes_to_what_serves_and_takes_the_rest_away(
    api: KubernetesApi, cluster: Cluster, deployer: Deployer
) -> None:
    first, second = objects(), other()
    deployer.deploy(first)
    deployer.deploy(second)
    fail(api, deployer, objects(digest="f" * 64))
    assert len(api.named("services")) == 7
    deployer.rollback("chat")
    assert api.named("services") == services(second)
    assert outcomes(cluster) == [(1, "served"), (2, "served"), (3, "failed"), (4, "served")]
    deployer.rollback("chat")
    assert api.named("services") == services(first)


def test_a_rollback_of_a_failed_change_of_settings(api: KubernetesApi, deployer: Deployer) -> None:
    """The same Services: what Knative still serves is what was before."""
    first = objects()
    deployer.deploy(first)
    fail(api, deployer, objects(kv_cache="1Gi"))
    del api.behaviours[stage_name(first, 1)]
    deployer.rollback("chat")
    stage = api.objects["serving.knative.dev/v1", "services", "default", stage_name(first, 1)]
    applied = next(each for each in first if each["metadata"]["name"] == stage_name(first, 1))
    assert stage["spec"]["template"] == applied["spec"]["template"]
    assert stage["status"]["latestReadyRevisionName"] == f"{stage_name(first, 1)}-00003"


def test_where_nothing_served_a_rollback_says_so(api: KubernetesApi, cluster: Cluster, deployer: Deployer) -> None:
    fail(api, deployer, objects())
    assert outcomes(cluster) == [(1, "failed")]
    with pytest.raises(NothingServes, match=r"known are 1 \(failed\); `delete`"):
        deployer.rollback("chat")


def test_many_failures_in_a_row_leave_what_served(api: KubernetesApi, cluster: Cluster, deployer: Deployer) -> None:
    served = objects()
    deployer.deploy(served)
    history = History(cluster, "default", "chat")
    for count in range(KEPT_VERSIONS + 2):
        history.begin(objects(digest=f"{count:064}"))
    known = history.versions()
    assert [version.number for version in known] == [1, *range(4, KEPT_VERSIONS + 4)]
    assert history.to_go_back_to(None).number == 1


def test_what_a_failure_said_is_kept(api: KubernetesApi, cluster: Cluster, deployer: Deployer) -> None:
    fail(api, deployer, objects())
    newest = History(cluster, "default", "chat").versions()[-1]
    assert "CrashLoopBackOff" in newest.reason
    assert "\n" not in newest.reason


def test_the_same_again_after_a_failure_is_the_same_version(api: KubernetesApi, cluster: Cluster, deployer: Deployer) -> None:
    rendered = objects()
    fail(api, deployer, rendered)
    api.behaviours.clear()
    deployer.deploy(rendered)
    assert outcomes(cluster) == [(1, "served")]


def test_an_interrupted_deploy_is_not_taken_for_one_that_served(
    api: KubernetesApi, cluster: Cluster, deployer: Deployer
) -> None:
    deployer.deploy(objects())
    History(cluster, "default", "chat").begin(other())  # and then Ctrl-C, or the laptop was shut
    assert outcomes(cluster)[-1] == (2, "started")
    deployer.rollback("chat")
    assert api.named("services") == services(objects())


def test_versions_from_before_there_were_outcomes_have_served(api: KubernetesApi, cluster: Cluster, deployer: Deployer) -> None:
    deployer.deploy(objects())
    key = ("v1", "configmaps", "default", "chat-v1")
    del api.objects[key]["metadata"]["annotations"]["lamina.dev/outcome"]
    assert outcomes(cluster) == [(1, "served")]
    assert list(yaml.safe_load_all(api.objects[key]["data"]["manifests.yaml"])) == objects()


def test_rollback_to_a_number_says_which_are_known(deployer: Deployer) -> None:
    deployer.deploy(objects())
    with pytest.raises(ClusterError, match=r"version 7 is not known; known are 1 \(served\)"):
        deployer.rollback("chat", 7)
