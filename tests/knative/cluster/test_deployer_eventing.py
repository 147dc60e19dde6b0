"""The deployer with an eventing section: Triggers move when everything they lead to is Ready, and what was before goes."""

import pytest

from knative.cluster.deployer import Deployer
from knative.cluster.errors import KindMissing
from knative.spec.kubernetes_object import KubernetesObject
from tests.support.knative.deployments import sink
from tests.support.knative.kubernetes_api import EVENTING, KubernetesApi
from tests.support.knative.pipelines import rendered_pipeline


@pytest.fixture(autouse=True)
def eventing(api: KubernetesApi) -> None:
    """Knative Eventing is installed, and the sink is there."""
    api.kinds |= EVENTING
    api.put(sink("dead-letters"))


def objects(digest: str) -> list[KubernetesObject]:
    return rendered_pipeline(digest, cut="0:10,10:30", eventing={"dead_letter_sink": "dead-letters"})


def names(rendered: list[KubernetesObject], *kinds: str) -> list[str]:
    return sorted(each["metadata"]["name"] for each in rendered if each["kind"] in kinds)


def test_triggers_come_last_and_lead_to_the_new_sequence(api: KubernetesApi, deployer: Deployer) -> None:
    rendered = objects("d" * 64)
    deployer.deploy(rendered)
    order = api.applied
    last_service = max(order.index(name) for name in names(rendered, "Service"))
    sequence = names(rendered, "Sequence")[0]
    assert last_service < order.index(sequence) < min(order.index(name) for name in ("chat-generate", "chat-score"))


def test_what_led_to_the_old_pipeline_goes_with_it(api: KubernetesApi, deployer: Deployer) -> None:
    old, new = objects("d" * 64), objects("e" * 64)
    deployer.deploy(old)
    deployer.deploy(new)
    for kind, plural in (("Service", "services"), ("Sequence", "sequences"), ("Broker", "brokers"), ("Trigger", "triggers")):
        assert [name for name in api.named(plural) if name != "dead-letters"] == names(new, kind)
    assert names(old, "Sequence") != names(new, "Sequence")
    trigger = api.objects["eventing.knative.dev/v1", "triggers", "default", "chat-score"]
    assert [trigger["spec"]["subscriber"]["ref"]["name"]] == names(new, "Sequence")
    deployer.delete("chat")
    assert api.named("services") == ["dead-letters"]
    assert api.named("sequences") == api.named("brokers") == api.named("triggers") == []


def test_without_eventing_nothing_is_applied(api: KubernetesApi, deployer: Deployer) -> None:
    del api.kinds["eventing.knative.dev/v1"]
    with pytest.raises(KindMissing, match="install Knative Eventing"):
        deployer.deploy(objects("d" * 64))
    assert api.applied == []
