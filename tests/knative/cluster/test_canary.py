"""A canary gets a part of the requests; then all, or none."""

import pytest

from knative.cluster.errors import DeployFailed, FieldConflict, NothingServes, Rejected
from knative.cluster.objects import traffic_of
from knative.cluster.status import status_lines, status_rows
from knative.webhook.check import validate, warnings
from tests.support.knative.knative_controllers import crash_loops
from tests.support.knative.manifests import names_of, objects, other, stage_name
from tests.support.knative.site import GATEWAY, Site

SPLIT = [{"revisionName": "chat-00001", "percent": 90}, {"latestRevision": True, "percent": 10}]
ALL = [{"latestRevision": True, "percent": 100}]


def routed(site: Site) -> dict[str, int]:
    return traffic_of(site.api.objects[GATEWAY])


@pytest.mark.slow
def test_requests_are_split_between_two_gateways_with_stages_of_their_own(site: Site) -> None:
    old, new = objects(), other()
    site.deployer.deploy(old)
    assert site.deployer.canary(new, 10) == "http://chat.default.example"
    assert site.api.objects[GATEWAY]["spec"]["traffic"] == SPLIT
    assert routed(site) == {"chat-00001": 90, "chat-00002": 10}
    assert set(site.api.named("services")) == set(names_of(old)) | set(names_of(new))
    assert site.outcomes() == [(1, "served"), (2, "canary")]
    assert validate(site.api.objects[GATEWAY] | {"metadata": {"name": "chat"}}) == []
    assert list(warnings(site.api.objects[GATEWAY] | {"metadata": {"name": "chat"}})) == []


@pytest.mark.slow
def test_a_second_canary_deploy_changes_the_share(serving: Site) -> None:
    serving.deployer.canary(other(), 10)
    serving.deployer.canary(other(), 50)
    assert routed(serving) == {"chat-00001": 50, "chat-00002": 50}


@pytest.mark.slow
def test_status_shows_both_revisions_of_the_gateway(site: Site) -> None:
    old, new = objects(), other()
    site.deployer.deploy(old)
    site.api.lingering_gateways = 1000
    site.deployer.canary(new, 10)
    status = site.status()
    rows = [row for row in status_rows(status) if row[0] == "chat"]
    fingerprints = [each["metadata"]["labels"]["lamina.dev/pipeline"] for each in (old[-1], new[-1])]
    assert [(row[7], row[8], row[9]) for row in rows] == [
        ("chat-00001", "90 %", fingerprints[0]),
        ("chat-00002", "10 %", fingerprints[1]),
    ]
    assert any(line.endswith("canary, 10 % of the requests") for line in status_lines(status))
    assert not any("that Lamina did not make" in line for line in status_lines(status))


@pytest.mark.slow
def test_a_promoted_canary_gets_all_requests_and_the_old_pipeline_is_deleted(site: Site) -> None:
    new = other()
    site.deployer.deploy(objects())
    site.deployer.canary(new, 10)
    site.deployer.promote("chat")
    assert site.api.objects[GATEWAY]["spec"]["traffic"] == ALL
    assert routed(site) == {"chat-00002": 100}, "a third revision was made"
    assert site.api.named("services") == names_of(new)
    assert site.outcomes() == [(1, "served"), (2, "served")]
    site.deployer.rollback("chat")
    assert site.api.named("services") == names_of(objects())


@pytest.mark.slow
def test_an_aborted_canary_gets_no_request_at_once_and_is_deleted(serving: Site) -> None:
    """No request reaches it while the gateway's old template is rolled out again."""
    serving.deployer.canary(other(), 10)
    seen: list[dict[str, int]] = []
    serving.api.on_change = lambda key: seen.append(routed(serving)) if key == GATEWAY else None
    serving.deployer.abort("chat")
    first = seen.index({"chat-00001": 100})
    assert all("chat-00002" not in each for each in seen[first:])
    assert serving.api.objects[GATEWAY]["spec"]["traffic"] == ALL
    assert serving.api.named("services") == names_of(objects())
    assert serving.outcomes() == [(1, "served"), (2, "aborted"), (3, "served")]


@pytest.mark.slow
def test_a_rollback_aborts_the_canary(serving: Site) -> None:
    serving.deployer.canary(other(), 10)
    serving.deployer.rollback("chat")
    assert serving.api.named("services") == names_of(objects())
    assert serving.outcomes() == [(1, "served"), (2, "aborted"), (3, "served")]


@pytest.mark.slow
def test_a_canary_that_fails_gets_no_request(site: Site) -> None:
    new = other()
    site.deployer.deploy(objects())
    site.api.behaviours["chat"] = crash_loops
    with pytest.raises(DeployFailed, match="CrashLoopBackOff"):
        site.deployer.canary(new, 10)
    assert routed(site) == {"chat-00001": 100}
    assert site.outcomes() == [(1, "served"), (2, "failed")]
    del site.api.behaviours["chat"]
    site.deployer.rollback("chat")
    assert site.api.named("services") == names_of(objects())
    assert site.api.objects[GATEWAY]["spec"]["traffic"] == ALL


@pytest.mark.slow
def test_a_canary_needs_a_serving_pipeline_with_other_stages_and_no_second_canary(site: Site) -> None:
    with pytest.raises(NothingServes, match="deploy it without --canary"):
        site.deployer.canary(objects(), 10)
    site.deployer.deploy(objects())
    with pytest.raises(NothingServes, match="no canary of chat"):
        site.deployer.promote("chat")
    with pytest.raises(Rejected, match="a canary needs another model, dtype or cut"):
        site.deployer.canary(objects(stage={"kv_cache": "1Gi"}), 10)
    site.deployer.canary(other(), 10)
    with pytest.raises(Rejected, match="is a canary already"):
        site.deployer.canary(objects("f" * 64), 10)
    with pytest.raises(Rejected, match="`promote` or `abort` it"):
        site.deployer.deploy(objects("f" * 64))


@pytest.mark.slow
@pytest.mark.usefixtures("eventing")
def test_eventing_and_network_stay_with_the_serving_pipeline(site: Site) -> None:
    section = {"eventing": {"dead_letter_sink": "dead-letters"}}
    old = objects(**section)
    site.deployer.deploy(old)
    before = {key: each for key, each in site.api.objects.items() if key[1] in ("triggers", "sequences", "networkpolicies")}
    site.deployer.canary(other(**section), 10)
    assert {key: site.api.objects[key] for key in before} == before
    assert not [name for name in site.api.named("services") if name.endswith("-ev") and name not in names_of(old)]
    site.deployer.promote("chat")
    assert site.api.named("sequences") == [each["metadata"]["name"] for each in other(**section) if each["kind"] == "Sequence"]


def test_fields_of_another_manager_are_a_conflict(serving: Site) -> None:
    path = ("spec", "template", "metadata", "annotations", "autoscaling.knative.dev/max-scale")
    serving.api.edit(GATEWAY, "kubectl-edit", path, "99")
    with pytest.raises(FieldConflict, match="kubectl-edit"):
        serving.deployer.canary(other(), 10)
    assert stage_name(objects(), 0) in serving.api.named("services")
