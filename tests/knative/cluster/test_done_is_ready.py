"""`deploy` says done when everything is Ready, and failed only for what it applied itself."""

import threading

import pytest

from knative.cluster.client import Cluster
from knative.cluster.deployer import Deployer
from knative.cluster.errors import DeployFailed
from knative.cluster.history import History, Outcome
from knative.cluster.objects import readiness
from knative.cluster.status import cluster_status, status_lines
from knative.cluster.waiting import ReadinessWait
from tests.support.knative.deployments import GATEWAY, objects, other, sink, stage_name
from tests.support.knative.knative_controllers import (
    BROKER,
    Behaviour,
    become_ready,
    broker_fails,
    crash_loops,
    revision_fails,
    slow_to_configure,
    slow_to_look,
)
from tests.support.knative.kubernetes_api import EVENTING, KubernetesApi

SECTION = {"eventing": {"dead_letter_sink": "dead-letters", "reply_sink": "answers"}}


@pytest.fixture
def eventing(api: KubernetesApi) -> None:
    api.kinds |= EVENTING
    for name in ("dead-letters", "answers"):
        api.put(sink(name))


@pytest.mark.usefixtures("eventing")
def test_when_deploy_returns_broker_sequence_and_triggers_are_ready(api: KubernetesApi, deployer: Deployer) -> None:
    deployer.deploy(objects(spec=SECTION))
    found = [each for key, each in api.objects.items() if key[1] in ("brokers", "sequences", "triggers")]
    assert len(found) == 6
    assert [each["metadata"]["name"] for each in found if not readiness(each).ready] == []


@pytest.mark.usefixtures("eventing")
def test_a_broker_that_stays_unready_is_a_failure_that_says_why(
    api: KubernetesApi, cluster: Cluster, deployer: Deployer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("knative.cluster.waiting._EVENTING_SETTLES_SECONDS", 0.5)
    api.behaviours["chat"] = broker_fails
    with pytest.raises(DeployFailed, match=r"Broker chat does not become ready: BrokerClass: no controller") as failure:
        deployer.deploy(objects(spec=SECTION))
    assert "IngressReady" in str(failure.value)
    assert History(cluster, "default", "chat").versions()[-1].outcome is Outcome.FAILED
    lines = status_lines(cluster_status(cluster, "default", "chat"))
    assert any(line.startswith("Broker chat: NOT ready, BrokerClass: no controller") for line in lines)


def test_a_condition_that_is_false_on_its_way_is_waited_for(api: KubernetesApi, cluster: Cluster, said: list[str]) -> None:
    """A Broker's filter comes up after its ingress."""
    api.kinds |= EVENTING
    broker = {
        "apiVersion": BROKER[0],
        "kind": "Broker",
        "metadata": {"name": "chat", "namespace": "default", "labels": {"app.kubernetes.io/instance": "chat"}},
        "spec": {},
    }
    cluster.apply(broker)
    ReadinessWait(cluster, "default", said.append, 10).await_ready([broker])
    assert said[-1] == "Broker chat is ready"


@pytest.mark.parametrize("knative", [become_ready, slow_to_look, slow_to_configure])
def test_the_mended_revision_of_a_crash_loop_is_judged_by_itself(
    api: KubernetesApi, deployer: Deployer, knative: Behaviour
) -> None:
    deployer.deploy(objects())
    broken, mended = objects(kv_cache="1Gi"), objects(kv_cache="768Mi")
    stage = stage_name(broken, 1)
    api.behaviours[stage] = crash_loops
    with pytest.raises(DeployFailed, match="CrashLoopBackOff"):
        deployer.deploy(broken)
    api.behaviours[stage] = knative
    deployer.deploy(mended)


def test_the_same_deploy_works_once_the_cause_of_its_failure_is_mended(
    api: KubernetesApi, deployer: Deployer, said: list[str]
) -> None:
    """Knative has given that revision up: it would never look again."""
    rendered = objects()
    stage = stage_name(rendered, 0)
    api.behaviours[stage] = revision_fails
    with pytest.raises(DeployFailed, match="initial scale"):
        deployer.deploy(rendered)
    del api.behaviours[stage]
    deployer.deploy(rendered)
    assert f"deleted Service default/{stage}, because none of its revisions ever ran, to create it again" in said


def test_pods_that_crashed_before_get_another_try(api: KubernetesApi, deployer: Deployer) -> None:
    """The cause was outside, such as a bucket: the same again, and the kubelet's next restart works."""
    deployer.deploy(objects())
    changed = objects(kv_cache="1Gi")
    stage = stage_name(changed, 1)
    api.behaviours[stage] = crash_loops
    with pytest.raises(DeployFailed, match="CrashLoopBackOff"):
        deployer.deploy(changed)
    del api.behaviours[stage]
    restart = threading.Timer(1, api.controllers.reconcile, [("serving.knative.dev/v1", "services", "default", stage)])
    restart.start()
    deployer.deploy(changed)
    restart.join()


def test_events_that_may_not_be_read_hide_no_reason(api: KubernetesApi, deployer: Deployer) -> None:
    rendered = objects()
    api.behaviours[stage_name(rendered, 1)] = crash_loops
    api.forbidden |= {("list", "events"), ("get", "revisions"), ("get", "pods/log")}
    with pytest.raises(DeployFailed) as failure:
        deployer.deploy(rendered)
    for text in ("CrashLoopBackOff", "ended with 1", "not looked at: events: ", "next: the last log lines"):
        assert text in str(failure.value)


def test_without_the_right_to_see_pods_knatives_own_reason_is_told(api: KubernetesApi, deployer: Deployer) -> None:
    rendered = objects()
    api.behaviours[stage_name(rendered, 1)] = revision_fails
    api.forbidden |= {("list", "pods"), ("list", "events")}
    with pytest.raises(DeployFailed, match="initial scale was never achieved"):
        deployer.deploy(rendered)


def test_a_gateway_inside_the_cluster_is_warned_of(
    api: KubernetesApi, cluster: Cluster, deployer: Deployer, said: list[str]
) -> None:
    """Knative without a config-domain: the ingress answers 404 for such names."""
    api.domain = "svc.cluster.local"
    deployer.deploy(objects())
    assert [line for line in said if "config-domain" in line and "port-forward" in line]
    assert any("config-domain" in line for line in status_lines(cluster_status(cluster, "default", "chat")))


def test_requests_that_somebody_pinned_elsewhere_are_told(api: KubernetesApi, deployer: Deployer, said: list[str]) -> None:
    deployer.deploy(objects())
    api.edit(GATEWAY, "kn", ("spec", "traffic"), [{"revisionName": "chat-00001", "percent": 100}])
    deployer.deploy(other())
    assert any(line.startswith("warning: requests do not all go to chat-00002") for line in said)
