"""The `eventing` section of a spec: rendered objects, errors, and the length of names."""

from typing import Any

import pytest
import yaml

from eventing.wire.events import EventType
from knative.render.access import network_policies
from knative.render.eventing import eventing_objects
from knative.render.resolved_pipeline import ResolvedPipeline
from knative.render.services import gateway_service, services
from knative.spec.errors import SpecError
from knative.spec.kubernetes_object import KubernetesObject
from knative.spec.pipeline_spec import MAX_NAME, MAX_NAME_WITH_EVENTING
from knative.webhook.check import validate, warnings
from tests.support.knative.manifests import container_of, resolved_pipeline


def pipeline(eventing: dict[str, Any] | None, name: str = "chat") -> ResolvedPipeline:
    return resolved_pipeline(name=name, namespace="models", gateway={"api_keys_secret": "keys"}, eventing=eventing)


WITH = {"dead_letter_sink": "dead-letters", "reply_sink": "https://answers.example/x", "retry": 3, "backoff_seconds": 0.5}


def named(objects: list[KubernetesObject], kind: str) -> dict[str, KubernetesObject]:
    return {each["metadata"]["name"]: each for each in objects if each["kind"] == kind}


def secrets(service: KubernetesObject) -> set[str]:
    return {
        entry["name"] for entry in container_of(service)["env"] if "valueFrom" in entry or entry["name"].endswith("KEY_FILES")
    }


def test_the_events_gateway_needs_no_key_and_is_cluster_local() -> None:
    public, events = (gateway_service(pipeline(WITH), for_events=each) for each in (False, True))
    assert secrets(public) == {"LAMINA_PIPELINE_TOKEN", "LAMINA_API_KEY_FILES"}
    assert secrets(events) == {"LAMINA_PIPELINE_TOKEN"}
    assert "networking.knative.dev/visibility" not in public["metadata"]["labels"]
    assert events["metadata"]["labels"]["networking.knative.dev/visibility"] == "cluster-local"
    assert (validate(events), warnings(events)) == ([], [])


def test_the_gateways_policy_covers_the_events_gateway_and_admits_eventing() -> None:
    pod_labels = gateway_service(pipeline(WITH), for_events=True)["spec"]["template"]["metadata"]["labels"]
    for eventing, expected in ((WITH, True), (None, False)):
        _, gateway = network_policies(pipeline(eventing))
        assert gateway["spec"]["podSelector"]["matchLabels"].items() <= pod_labels.items()
        for policy in network_policies(pipeline(eventing)):
            assert ("knative-eventing" in str(policy["spec"]["ingress"][0])) is expected


def test_all_steps_of_a_sequence_are_of_one_pipeline() -> None:
    one = pipeline(WITH)
    (sequence,) = named(eventing_objects(one), "Sequence").values()
    steps = [step["ref"]["name"] for step in sequence["spec"]["steps"]]
    assert steps == [one.events_gateway_name, *(one.stage_name(index) for index in range(3))]
    assert all(one.fingerprint[:8] in name for name in [*steps, sequence["metadata"]["name"]])
    assert set(steps) <= {service["metadata"]["name"] for service in services(one)}


def test_broker_and_triggers_keep_their_names_and_lead_to_the_current_pipeline() -> None:
    objects = eventing_objects(pipeline(WITH))
    assert list(named(objects, "Broker")) == ["chat"]
    subscribers = {
        each["spec"]["filter"]["attributes"]["type"]: each["spec"]["subscriber"] for each in named(objects, "Trigger").values()
    }
    assert subscribers[EventType.GENERATE_REQUEST]["ref"]["name"] == pipeline(WITH).events_gateway_name
    assert [subscribers[EventType.SCORE_REQUEST]["ref"]["name"]] == list(named(objects, "Sequence"))
    assert subscribers[EventType.SCORE_RESPONSE] == {"uri": "https://answers.example/x"}


def test_replies_have_triggers_only_with_a_reply_sink() -> None:
    triggers = [list(named(eventing_objects(pipeline(spec)), "Trigger")) for spec in (WITH, {"dead_letter_sink": "x"})]
    assert triggers == [
        ["chat-generate", "chat-embed", "chat-score", "chat-generate-reply", "chat-embed-reply", "chat-score-reply"],
        ["chat-generate", "chat-embed", "chat-score"],
    ]


def test_the_sequence_replies_to_the_broker_and_comes_before_its_triggers() -> None:
    objects = eventing_objects(pipeline(WITH))
    assert [each["kind"] for each in objects] == ["Broker", "Sequence", *["Trigger"] * 6]
    broker, sequence = objects[:2]
    reply = {"apiVersion": broker["apiVersion"], "kind": "Broker", "name": broker["metadata"]["name"]}
    assert sequence["spec"]["reply"]["ref"] == reply
    assert sequence["spec"]["channelTemplate"] == {"apiVersion": "messaging.knative.dev/v1", "kind": "InMemoryChannel"}
    assert {each["metadata"]["namespace"] for each in objects} == {"models"}


def test_every_delivery_has_the_same_bounds_and_dead_letter_sink() -> None:
    broker, sequence, *triggers = eventing_objects(pipeline(WITH))
    deliveries = [each["spec"]["delivery"] for each in triggers] + [step["delivery"] for step in sequence["spec"]["steps"]]
    assert deliveries == [broker["spec"]["delivery"]] * 10


def test_objects_share_no_values() -> None:
    objects = eventing_objects(pipeline(WITH))
    text = yaml.safe_dump_all(objects)
    assert list(yaml.safe_load_all(text)) == objects
    assert "&id" not in text, "shared parts become YAML anchors, which readers of manifests do not expect"


def test_the_delivery_follows_the_spec() -> None:
    delivery = named(eventing_objects(pipeline(WITH | {"backoff_policy": "linear"})), "Broker")["chat"]["spec"]["delivery"]
    sink = {"ref": {"apiVersion": "serving.knative.dev/v1", "kind": "Service", "name": "dead-letters"}}
    expected = {"deadLetterSink": sink, "retry": 3, "backoffPolicy": "linear", "backoffDelay": "PT0.5S", "timeout": "PT600S"}
    assert delivery == expected


def test_without_the_section_nothing_is_rendered() -> None:
    assert eventing_objects(pipeline(None)) == []
    assert len(services(pipeline(None))) + 1 == len(services(pipeline(WITH)))


def test_eventing_needs_shorter_names() -> None:
    pipeline(None, "a" * MAX_NAME)
    (name,) = named(eventing_objects(pipeline(WITH, "a" * MAX_NAME_WITH_EVENTING)), "Sequence")
    assert len(f"{name}-kn-sequence-10-kn-channel") <= 63
    with pytest.raises(SpecError, match="at most 28 characters"):
        pipeline(WITH, "a" * (MAX_NAME_WITH_EVENTING + 1))


def test_a_gateway_with_jobs_takes_batches_and_knows_where_their_results_go() -> None:
    one = resolved_pipeline(name="chat", namespace="models", gateway={"jobs": "jobs"}, eventing=WITH)
    objects = eventing_objects(one)
    triggers = {name: each["spec"] for name, each in named(objects, "Trigger").items()}
    assert triggers["chat-batch"]["filter"] == {"attributes": {"type": "dev.lamina.batch.request"}}
    assert triggers["chat-batch"]["subscriber"]["ref"]["name"] == one.events_gateway_name
    assert triggers["chat-batch-reply"]["subscriber"] == {"uri": WITH["reply_sink"]}
    ((name, binding),) = named(objects, "SinkBinding").items()
    assert name == binding["spec"]["subject"]["name"] == one.events_gateway_name
    assert binding["spec"]["sink"]["ref"] == {"apiVersion": "eventing.knative.dev/v1", "kind": "Broker", "name": "chat"}
    environ = {entry["name"]: entry.get("value") for entry in container_of(gateway_service(one, for_events=True))["env"]}
    assert environ["LAMINA_JOBS_STORE"].endswith("/jobs")
    assert environ["LAMINA_OWN_URL"] == f"http://{one.events_gateway_name}.models.svc.cluster.local"
