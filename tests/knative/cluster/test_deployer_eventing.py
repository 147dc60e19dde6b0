"""The deployer with an eventing section: Triggers move when everything they lead to is Ready, and what was before goes."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from knative.cluster.client import Cluster
from knative.cluster.deployer import Deployer
from knative.cluster.errors import KindMissing
from knative.cluster.garbage import GarbageCollector
from knative.spec.kubernetes_object import KubernetesObject
from tests.support.knative.kubernetes_api import KubernetesApi
from tests.support.knative.pipelines import rendered_pipeline

EVENTING = {
    "eventing.knative.dev/v1": {"Broker": "brokers", "Trigger": "triggers"},
    "flows.knative.dev/v1": {"Sequence": "sequences"},
}


@pytest.fixture
def api() -> Iterator[KubernetesApi]:
    server = KubernetesApi()
    server.kinds |= EVENTING
    metadata = {"name": "lamina-store", "namespace": "default"}
    data = dict.fromkeys(("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"), "eA==")
    server.put({"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "data": data})
    yield server
    server.close()


def cluster(api: KubernetesApi, folder: Path) -> Cluster:
    kubeconfig = folder / "kubeconfig"
    kubeconfig.write_text(api.kubeconfig())
    return Cluster.connect(str(kubeconfig))


def deployer(api: KubernetesApi, folder: Path) -> Deployer:
    return Deployer(cluster(api, folder), "default", lambda _: None, timeout_seconds=5)


def objects(digest: str) -> list[KubernetesObject]:
    return rendered_pipeline(digest, cut="0:10,10:30", eventing={"dead_letter_sink": "dead-letters"})


def names(rendered: list[KubernetesObject], *kinds: str) -> list[str]:
    return sorted(each["metadata"]["name"] for each in rendered if each["kind"] in kinds)


def test_triggers_come_last_and_lead_to_the_new_sequence(api: KubernetesApi, tmp_path: Path) -> None:
    rendered = objects("d" * 64)
    deployer(api, tmp_path).deploy(rendered)
    order = api.applied
    last_service = max(order.index(name) for name in names(rendered, "Service"))
    sequence = names(rendered, "Sequence")[0]
    assert last_service < order.index(sequence) < min(order.index(name) for name in ("chat-generate", "chat-score"))


def test_what_led_to_the_old_pipeline_goes_with_it(api: KubernetesApi, tmp_path: Path) -> None:
    old, new = objects("d" * 64), objects("e" * 64)
    deployer(api, tmp_path).deploy(old)
    deployer(api, tmp_path).deploy(new)
    for kind, plural in (("Service", "services"), ("Sequence", "sequences"), ("Broker", "brokers"), ("Trigger", "triggers")):
        assert api.named(plural) == names(new, kind)
    assert names(old, "Sequence") != names(new, "Sequence")
    trigger = api.objects["eventing.knative.dev/v1", "triggers", "default", "chat-score"]
    assert [trigger["spec"]["subscriber"]["ref"]["name"]] == names(new, "Sequence")
    GarbageCollector(cluster(api, tmp_path), "default", lambda _: None, timeout_seconds=5).collect_all("chat")
    assert api.named("services") == api.named("sequences") == api.named("brokers") == api.named("triggers") == []


def test_without_eventing_nothing_is_applied(api: KubernetesApi, tmp_path: Path) -> None:
    del api.kinds["eventing.knative.dev/v1"]
    with pytest.raises(KindMissing, match="install Knative Eventing"):
        deployer(api, tmp_path).deploy(objects("d" * 64))
    assert api.applied == []
