"""The history records the outcome of every version, and `rollback` deploys the last that served."""

import pytest
import yaml

from knative.cluster.errors import ClusterError, NothingServes
from knative.cluster.history import KEPT_VERSIONS
from tests.support.knative.knative_controllers import crash_loops
from tests.support.knative.manifests import names_of, objects, other, stage_name
from tests.support.knative.site import Site


@pytest.mark.slow
def test_a_rollback_deploys_the_previous_version_again(serving: Site) -> None:
    serving.deployer.deploy(other())
    serving.deployer.rollback("chat")
    assert serving.api.named("services") == names_of(objects())
    assert serving.outcomes() == [(1, "served"), (2, "served"), (3, "served")]
    serving.deployer.rollback("chat")
    assert serving.api.named("services") == names_of(other())


@pytest.mark.slow
def test_a_rollback_after_a_failure_keeps_the_serving_version_and_deletes_the_rest(site: Site) -> None:
    first, second = objects(), other()
    site.deployer.deploy(first)
    site.deployer.deploy(second)
    site.fail(objects("f" * 64), crash_loops)
    assert len(site.api.named("services")) == 7
    site.deployer.rollback("chat")
    assert site.api.named("services") == names_of(second)
    assert site.outcomes() == [(1, "served"), (2, "served"), (3, "failed"), (4, "served")]
    site.deployer.rollback("chat")
    assert site.api.named("services") == names_of(first)


@pytest.mark.slow
def test_a_rollback_restores_the_settings_before_a_failed_change(site: Site) -> None:
    """The Services are the same; Knative still serves their previous revisions."""
    first = objects()
    site.deployer.deploy(first)
    site.fail(objects(stage={"kv_cache": "1Gi"}), crash_loops)
    del site.api.behaviours[stage_name(first, 1)]
    site.deployer.rollback("chat")
    stage = site.api.objects["serving.knative.dev/v1", "services", "default", stage_name(first, 1)]
    applied = next(each for each in first if each["metadata"]["name"] == stage_name(first, 1))
    assert stage["spec"]["template"] == applied["spec"]["template"]
    assert stage["status"]["latestReadyRevisionName"] == f"{stage_name(first, 1)}-00003"


@pytest.mark.slow
def test_a_failure_is_recorded_with_its_first_line_and_there_is_nothing_to_roll_back_to(site: Site) -> None:
    site.fail(objects(), crash_loops)
    assert site.outcomes() == [(1, "failed")]
    newest = site.history.versions()[-1]
    assert "CrashLoopBackOff" in newest.reason
    assert "\n" not in newest.reason
    with pytest.raises(NothingServes, match=r"known are 1 \(failed\); `delete` removes"):
        site.deployer.rollback("chat")


@pytest.mark.slow
def test_many_failures_in_a_row_keep_the_version_that_served(site: Site) -> None:
    served = objects()
    site.deployer.deploy(served)
    for count in range(KEPT_VERSIONS + 2):
        site.history.begin(objects(f"{count:064}"))
    known = site.history.versions()
    assert [version.number for version in known] == [1, *range(4, KEPT_VERSIONS + 4)]
    assert site.history.to_go_back_to(None).number == 1


@pytest.mark.slow
def test_the_same_objects_after_a_failure_are_the_same_version(site: Site) -> None:
    rendered = objects()
    site.fail(rendered, crash_loops)
    site.api.behaviours.clear()
    site.deployer.deploy(rendered)
    assert site.outcomes() == [(1, "served")]


@pytest.mark.slow
def test_an_interrupted_deploy_does_not_count_as_served(serving: Site) -> None:
    serving.history.begin(other())  # and then Ctrl-C
    assert serving.outcomes()[-1] == (2, "started")
    serving.deployer.rollback("chat")
    assert serving.api.named("services") == names_of(objects())


def test_versions_of_older_releases_without_an_outcome_have_served(serving: Site) -> None:
    key = ("v1", "configmaps", "default", "chat-v1")
    del serving.api.objects[key]["metadata"]["annotations"]["lamina.dev/outcome"]
    assert serving.outcomes() == [(1, "served")]
    assert list(yaml.safe_load_all(serving.api.objects[key]["data"]["manifests.yaml"])) == objects()


def test_a_rollback_without_a_target_names_the_known_versions(site: Site) -> None:
    with pytest.raises(ClusterError, match="deploy it first"):
        site.deployer.rollback("chat")
    site.deployer.deploy(objects())
    with pytest.raises(ClusterError, match="nothing to go back to"):
        site.deployer.rollback("chat")
    with pytest.raises(ClusterError, match=r"version 7 is not known; known are 1 \(served\)"):
        site.deployer.rollback("chat", 7)
