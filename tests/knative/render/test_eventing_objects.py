"""The Eventing objects: the routes that events take through them, and that every delivery ends somewhere."""

from typing import Any

import yaml

from eventing.wire.events import EventType
from knative.render.eventing_objects import Delivery, EventingPlan, render_eventing, service_destination

PLAN = EventingPlan(
    name="smol",
    sequence="smol-score",
    namespace="models",
    gateway="smol-gateway",
    stages=("smol-s0", "smol-s1", "smol-s2"),
    delivery=Delivery(timeout_seconds=300, dead_letter_sink=service_destination("dead-letters")),
    reply_sink={"uri": "http://sink.example/"},
    labels={"app.kubernetes.io/part-of": "lamina"},
)
DELIVERY = {
    "deadLetterSink": {"ref": {"apiVersion": "serving.knative.dev/v1", "kind": "Service", "name": "dead-letters"}},
    "retry": 5,
    "backoffPolicy": "exponential",
    "backoffDelay": "PT1S",
    "timeout": "PT300S",
}


def _of_kind(kind: str, plan: EventingPlan = PLAN) -> list[dict[str, Any]]:
    return [manifest for manifest in render_eventing(plan) if manifest["kind"] == kind]


def test_every_event_type_has_its_subscriber() -> None:
    subscribers = {
        manifest["spec"]["filter"]["attributes"]["type"]: manifest["spec"]["subscriber"] for manifest in _of_kind("Trigger")
    }
    assert subscribers == {
        EventType.GENERATE_REQUEST: service_destination("smol-gateway"),
        EventType.SCORE_REQUEST: {"ref": {"apiVersion": "flows.knative.dev/v1", "kind": "Sequence", "name": "smol-score"}},
        EventType.GENERATE_RESPONSE: {"uri": "http://sink.example/"},
        EventType.SCORE_RESPONSE: {"uri": "http://sink.example/"},
    }


def test_the_sequence_runs_gateway_and_stages_in_order_and_answers_the_broker() -> None:
    (sequence,) = _of_kind("Sequence")
    (broker,) = _of_kind("Broker")
    assert [step["ref"]["name"] for step in sequence["spec"]["steps"]] == [PLAN.gateway, *PLAN.stages]
    assert sequence["spec"]["reply"]["ref"] == {
        "apiVersion": broker["apiVersion"],
        "kind": "Broker",
        "name": broker["metadata"]["name"],
    }
    assert sequence["spec"]["channelTemplate"] == {"apiVersion": "messaging.knative.dev/v1", "kind": "InMemoryChannel"}


def test_every_delivery_is_bounded_and_ends_in_the_dead_letter_sink() -> None:
    deliveries = [manifest["spec"]["delivery"] for kind in ("Broker", "Trigger") for manifest in _of_kind(kind)]
    deliveries += [step["delivery"] for step in _of_kind("Sequence")[0]["spec"]["steps"]]
    assert deliveries == [DELIVERY] * 9


def test_names_and_order_of_application() -> None:
    manifests = render_eventing(PLAN)
    assert [(manifest["kind"], manifest["metadata"]["name"]) for manifest in manifests] == [
        ("Broker", "smol"),
        ("Sequence", "smol-score"),
        ("Trigger", "smol-generate"),
        ("Trigger", "smol-score"),
        ("Trigger", "smol-generate-reply"),
        ("Trigger", "smol-score-reply"),
    ]
    for manifest in manifests:
        assert manifest["metadata"]["namespace"] == "models"
        assert manifest["metadata"]["labels"] == {"app.kubernetes.io/part-of": "lamina"}


def test_without_a_reply_sink_nothing_takes_the_responses() -> None:
    plan = EventingPlan("smol", "smol-score", "models", "gateway", ("s0",), PLAN.delivery)
    assert [manifest["metadata"]["name"] for manifest in _of_kind("Trigger", plan)] == ["smol-generate", "smol-score"]
    assert "labels" not in _of_kind("Broker", plan)[0]["metadata"]


def test_they_are_plain_values_that_share_nothing() -> None:
    manifests = render_eventing(PLAN)
    text = yaml.safe_dump_all(manifests)
    assert list(yaml.safe_load_all(text)) == manifests
    assert "&id" not in text, "shared parts become YAML anchors, which readers of manifests do not expect"
