"""The history records the outcome of every version, and `rollback` deploys the last that served."""

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


def test_a_rollback_deploys_the_previous_version_again(api: KubernetesApi, cluster: Cluster, deployer: Deployer) -> None:
    deployer.deploy(objects())
    deployer.deploy(other())
    deployer.rollback("chat")
    assert api.named("services") == services(objects())
    assert outcomes(cluster) == [(1, "served"), (2, "served"), (3, "served")]
    deployer.rollback("chat")
    assert api.named("services") == services(other())


def test_a_rollback_after_a_failure_keeps_the_serving_version_and_deletes_the_rest(
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


def test_a_rollback_restores_the_settings_before_a_failed_change(api: KubernetesApi, deployer: Deployer) -> None:
    """The Services are the same; Knative still serves their previous revisions."""
    first = objects()
    deployer.deploy(first)
    fail(api, deployer, objects(kv_cache="1Gi"))
    del api.behaviours[stage_name(first, 1)]
    deployer.rollback("chat")
    stage = api.objects["serving.knative.dev/v1", "services", "default", stage_name(first, 1)]
    applied = next(each for each in first if each["metadata"]["name"] == stage_name(first, 1))
    assert stage["spec"]["template"] == applied["spec"]["template"]
    assert stage["status"]["latestReadyRevisionName"] == f"{stage_name(first, 1)}-00003"


def test_a_rollback_fails_if_no_version_has_served(api: KubernetesApi, cluster: Cluster, deployer: Deployer) -> None:
    fail(api, deployer, objects())
    assert outcomes(cluster) == [(1, "failed")]
    with pytest.raises(NothingServes, match=r"known are 1 \(failed\); `delete` removes"):
        deployer.rollback("chat")


def test_many_failures_in_a_row_keep_the_version_that_served(cluster: Cluster, deployer: Deployer) -> None:
    served = objects()
    deployer.deploy(served)
    history = History(cluster, "default", "chat")
    for count in range(KEPT_VERSIONS + 2):
        history.begin(objects(digest=f"{count:064}"))
    known = history.versions()
    assert [version.number for version in known] == [1, *range(4, KEPT_VERSIONS + 4)]
    assert history.to_go_back_to(None).number == 1


def test_the_first_line_of_a_failure_is_recorded(api: KubernetesApi, cluster: Cluster, deployer: Deployer) -> None:
    fail(api, deployer, objects())
    newest = History(cluster, "default", "chat").versions()[-1]
    assert "CrashLoopBackOff" in newest.reason
    assert "\n" not in newest.reason


def test_the_same_objects_after_a_failure_are_the_same_version(
    api: KubernetesApi, cluster: Cluster, deployer: Deployer
) -> None:
    rendered = objects()
    fail(api, deployer, rendered)
    api.behaviours.clear()
    deployer.deploy(rendered)
    assert outcomes(cluster) == [(1, "served")]


def test_an_interrupted_deploy_does_not_count_as_served(api: KubernetesApi, cluster: Cluster, deployer: Deployer) -> None:
    deployer.deploy(objects())
    History(cluster, "default", "chat").begin(other())  # and then Ctrl-C
    assert outcomes(cluster)[-1] == (2, "started")
    deployer.rollback("chat")
    assert api.named("services") == services(objects())


def test_versions_of_older_releases_without_an_outcome_have_served(
    api: KubernetesApi, cluster: Cluster, deployer: Deployer
) -> None:
    deployer.deploy(objects())
    key = ("v1", "configmaps", "default", "chat-v1")
    del api.objects[key]["metadata"]["annotations"]["lamina.dev/outcome"]
    assert outcomes(cluster) == [(1, "served")]
    assert list(yaml.safe_load_all(api.objects[key]["data"]["manifests.yaml"])) == objects()


def test_a_rollback_without_a_target_names_the_known_versions(deployer: Deployer) -> None:
    with pytest.raises(ClusterError, match="deploy it first"):
        deployer.rollback("chat")
    deployer.deploy(objects())
    with pytest.raises(ClusterError, match="nothing to go back to"):
        deployer.rollback("chat")
    with pytest.raises(ClusterError, match=r"version 7 is not known; known are 1 \(served\)"):
        deployer.rollback("chat", 7)
