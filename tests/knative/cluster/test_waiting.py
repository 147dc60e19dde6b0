"""`deploy` ends when everything is Ready; it fails only for objects of its own, and names the cause."""

import threading

import pytest

from knative.cluster.deployer import Deployer
from knative.cluster.errors import DeployFailed
from knative.cluster.history import Outcome
from knative.cluster.objects import readiness
from knative.cluster.status import status_lines
from knative.cluster.waiting import ReadinessWait
from tests.support.knative.knative_controllers import (
    BROKER,
    Behaviour,
    become_ready,
    broker_fails,
    crash_loops,
    image_pull_fails,
    never_ready,
    revision_fails,
    slow_to_configure,
    slow_to_look,
)
from tests.support.knative.manifests import objects, other, resource, stage_name
from tests.support.knative.site import GATEWAY, Site

WITH_EVENTING = {"eventing": {"dead_letter_sink": "dead-letters", "reply_sink": "answers"}}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("behaviour", "expected"),
    [
        (
            image_pull_fails,
            ["does not become ready", "ImagePullBackOff", "registry.example/lamina:missing", "next: check the image's"],
        ),
        (crash_loops, ["CrashLoopBackOff", "ended with 1", "bucket 'lamina' does not exist", "next: the last log lines"]),
        (revision_fails, ["initial scale was never achieved", "FailedCreate", "exceeded quota", "next: lower the resources"]),
    ],
)
def test_a_failed_stage_is_explained_and_the_gateway_stays_as_it_was(
    serving: Site, behaviour: Behaviour, expected: list[str]
) -> None:
    broken = other()
    before = serving.api.objects[GATEWAY]["spec"]
    message = serving.fail(broken, behaviour)
    assert [text for text in (stage_name(broken, 1), *expected) if text not in message] == []
    assert serving.api.objects[GATEWAY]["spec"] == before


@pytest.mark.slow
def test_a_stage_that_never_becomes_ready_fails_at_the_timeout(site: Site) -> None:
    rendered = objects()
    site.api.behaviours[stage_name(rendered, 2)] = never_ready
    with pytest.raises(DeployFailed, match=r"not ready after 0\.5 s"):
        site.deployer_for(0.5).deploy(rendered)


@pytest.mark.usefixtures("eventing")
def test_when_deploy_returns_broker_sequence_and_triggers_are_ready(site: Site) -> None:
    site.deployer.deploy(objects(**WITH_EVENTING))
    found = [each for key, each in site.api.objects.items() if key[1] in ("brokers", "sequences", "triggers")]
    assert len(found) == 8
    assert [each["metadata"]["name"] for each in found if not readiness(each).ready] == []


@pytest.mark.slow
@pytest.mark.usefixtures("eventing")
def test_a_broker_that_stays_unready_is_a_failure_with_its_reason(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("knative.cluster.waiting._EVENTING_SETTLES_SECONDS", 0.5)
    site.api.behaviours["chat"] = broker_fails
    message = site.fail(objects(**WITH_EVENTING))
    assert "Broker chat does not become ready: BrokerClass: no controller" in message
    assert "IngressReady" in message
    assert site.history.versions()[-1].outcome is Outcome.FAILED
    lines = status_lines(site.status())
    assert any(line.startswith("Broker chat: NOT ready, BrokerClass: no controller") for line in lines)


@pytest.mark.usefixtures("eventing")
def test_a_condition_that_is_false_for_a_moment_is_waited_for(site: Site) -> None:
    """A Broker's filter comes up after its ingress."""
    broker = resource("Broker", "chat", BROKER[0], labels={"app.kubernetes.io/instance": "chat"}, spec={})
    site.cluster.apply(broker)
    ReadinessWait(site.cluster, "default", site.said.append, 10).await_ready([broker])
    assert site.said[-1] == "Broker chat is ready"


@pytest.mark.slow
@pytest.mark.parametrize("knative", [become_ready, slow_to_look, slow_to_configure])
def test_the_fixed_revision_of_a_crash_loop_is_judged_by_its_own_pods(serving: Site, knative: Behaviour) -> None:
    broken, fixed = objects(stage={"kv_cache": "1Gi"}), objects(stage={"kv_cache": "768Mi"})
    stage = stage_name(broken, 1)
    assert "CrashLoopBackOff" in serving.fail(broken, crash_loops)
    serving.api.behaviours[stage] = knative
    serving.deployer.deploy(fixed)


def test_the_same_deploy_works_once_the_cause_is_fixed(site: Site) -> None:
    """Knative has given that revision up, and would never try it again."""
    rendered = objects()
    stage = stage_name(rendered, 0)
    assert "initial scale" in site.fail(rendered, revision_fails, stage=0)
    del site.api.behaviours[stage]
    site.deployer.deploy(rendered)
    assert f"deleted Service default/{stage}, because none of its revisions ever ran, to create it again" in site.said


@pytest.mark.slow
def test_pods_that_crashed_before_get_another_try(serving: Site) -> None:
    """The cause was outside, such as a missing bucket: the same spec works at the kubelet's next restart."""
    changed = objects(stage={"kv_cache": "1Gi"})
    stage = stage_name(changed, 1)
    assert "CrashLoopBackOff" in serving.fail(changed, crash_loops)
    del serving.api.behaviours[stage]
    restart = threading.Timer(1, serving.api.controllers.reconcile, [("serving.knative.dev/v1", "services", "default", stage)])
    restart.start()
    serving.deployer.deploy(changed)
    restart.join()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("behaviour", "forbidden", "expected"),
    [
        (
            crash_loops,
            {("list", "events"), ("get", "revisions"), ("get", "pods/log")},
            ["CrashLoopBackOff", "ended with 1", "not looked at: events: ", "next: the last log lines"],
        ),
        (revision_fails, {("list", "pods"), ("list", "events")}, ["initial scale was never achieved"]),
    ],
)
def test_missing_rights_hide_no_reason_that_may_be_read(
    site: Site, behaviour: Behaviour, forbidden: set[tuple[str, str]], expected: list[str]
) -> None:
    site.api.forbidden |= forbidden
    message = site.fail(objects(), behaviour)
    assert [text for text in expected if text not in message] == []


def test_a_gateway_that_only_the_cluster_can_reach_is_a_warning(site: Site) -> None:
    """Knative without a config-domain: the ingress answers 404 for such names."""
    site.api.domain = "svc.cluster.local"
    site.deployer.deploy(objects())
    assert [line for line in site.said if "config-domain" in line and "port-forward" in line]
    assert any("config-domain" in line for line in status_lines(site.status()))


@pytest.mark.slow
def test_requests_that_another_split_pins_elsewhere_are_a_warning(serving: Site) -> None:
    serving.api.edit(GATEWAY, "kn", ("spec", "traffic"), [{"revisionName": "chat-00001", "percent": 100}])
    serving.deployer.deploy(other())
    assert any(line.startswith("warning: requests do not all go to chat-00002") for line in serving.said)


@pytest.mark.slow
@pytest.mark.parametrize("right", ["may read them", "may not read them"])
def test_a_rollback_right_after_promote_waits_for_what_kubernetes_still_deletes(serving: Site, right: str) -> None:
    """A new Service is NotOwned beside the Route of a deleted one of its name, and uses that one's Revision until it goes."""
    serving.deployer.canary(other(), 10)
    serving.api.collection_held = True
    serving.deployer.promote("chat")
    if right == "may not read them":
        serving.api.forbidden |= {("get", "routes"), ("get", "configurations"), ("get", "revisions"), ("list", "revisions")}
    stage = stage_name(objects(), 0)
    expected = {
        "may read them": f"waiting until Route default/{stage} is gone, which belongs to a deleted Service",
        "may not read them": f"{stage}: waiting until Kubernetes has deleted what an earlier Service of that name left",
    }
    waited = []

    def say(line: str) -> None:
        if line.startswith(expected[right]):
            waited.append(line)
            serving.api.collection_held = False

    Deployer(serving.cluster, "default", say, 20).rollback("chat")
    assert len(waited) == 1
    (configuration,) = serving.api.found("configurations", {"serving.knative.dev/service": stage})
    (revision,) = serving.api.found("revisions", {"serving.knative.dev/service": stage})
    assert revision["metadata"]["ownerReferences"][0]["uid"] == configuration["metadata"]["uid"]


@pytest.mark.slow
def test_a_route_of_somebody_else_is_a_failure(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("knative.cluster.waiting._NOT_OWNED_SECONDS", 0.5)
    stage = stage_name(objects(), 1)
    site.api.put(resource("Route", stage, "serving.knative.dev/v1", spec={}))
    message = site.fail(objects())
    assert f'{stage} does not become ready: NotOwned: There is an existing Route "{stage}" that we do not own' in message
    assert "next: delete it, or give the pipeline another name" in message
