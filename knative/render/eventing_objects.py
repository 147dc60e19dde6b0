"""Knative Eventing's objects around a pipeline, as plain dicts of their own: Broker, Triggers, Sequence. Pure functions.

    client → Broker ─ generate.request → gateway ─ generate.response ───────────────┐
               │                                                                    ├→ Broker ─ *.response → reply sink
               └──── score.request → Sequence of gateway and stages ─ score.response ┘
                     whatever fails for good, at any step → dead letter sink

Delivery is at least once. What is retried: no answer, 404, 408, 409, 429 and 5xx; the statuses of `problems` are chosen for it.
A dead letter says why in its `knativeerrorcode` and `knativeerrordata`.
"""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, Final

from eventing.wire.events import EventType

Manifest = dict[str, Any]
Destination = Mapping[str, Any]

IN_MEMORY_CHANNEL: Final = {"apiVersion": "messaging.knative.dev/v1", "kind": "InMemoryChannel"}
"""Keeps nothing: events on their way are lost with its pod. For anything that matters name a durable channel."""

_RESPONSES: Final = (EventType.GENERATE_RESPONSE, EventType.SCORE_RESPONSE)


@dataclass(frozen=True, slots=True)
class Delivery:
    """How often and how long delivery is tried. The wait before retry n, counted from 0: backoff_seconds × 2^n, or × n."""

    timeout_seconds: int
    """How long one attempt may take: as long as the longest answer."""
    dead_letter_sink: Destination
    retry: int = 5
    backoff_policy: str = "exponential"
    """exponential or linear."""
    backoff_seconds: float = 1

    def spec(self) -> Manifest:
        return {
            "deadLetterSink": deepcopy(dict(self.dead_letter_sink)),
            "retry": self.retry,
            "backoffPolicy": self.backoff_policy,
            "backoffDelay": f"PT{self.backoff_seconds:g}S",
            "timeout": f"PT{self.timeout_seconds}S",
        }


@dataclass(frozen=True, slots=True)
class EventingPlan:
    """What stands around one pipeline, all in one namespace."""

    name: str
    """Of the Broker and, with a suffix, of its Triggers."""
    sequence: str
    namespace: str
    gateway: str
    """Name of the gateway's Service; it must ask for no API key, which no Trigger can send."""
    stages: Sequence[str]
    """Names of the stages' Services, first layer first."""
    delivery: Delivery
    reply_sink: Destination | None = None
    """Where the responses go; None: whoever wants them makes a Trigger."""
    broker_class: str = "MTChannelBasedBroker"
    channel: Mapping[str, Any] = field(default_factory=lambda: IN_MEMORY_CHANNEL)
    """apiVersion, kind and, if it has one, spec of the channels between the Sequence's steps."""
    labels: Mapping[str, str] = field(default_factory=dict)


def render_eventing(plan: EventingPlan) -> list[Manifest]:
    """All objects, in the order in which they are applied."""
    gateway, scoring = service_destination(plan.gateway), _destination("flows.knative.dev/v1", "Sequence", plan.sequence)
    triggers = [
        trigger(plan, "generate", EventType.GENERATE_REQUEST, gateway),
        trigger(plan, "score", EventType.SCORE_REQUEST, scoring),
    ]
    if plan.reply_sink is not None:
        triggers += [
            trigger(plan, event_type.split(".")[2] + "-reply", event_type, plan.reply_sink) for event_type in _RESPONSES
        ]
    return [broker(plan), score_sequence(plan), *triggers]


def broker(plan: EventingPlan) -> Manifest:
    """Its delivery holds for every Trigger that names none of its own."""
    manifest = _object(plan, "eventing.knative.dev/v1", "Broker", plan.name, {"delivery": plan.delivery.spec()})
    manifest["metadata"]["annotations"] = {"eventing.knative.dev/broker.class": plan.broker_class}
    return manifest


def trigger(plan: EventingPlan, suffix: str, event_type: EventType, subscriber: Destination) -> Manifest:
    """Events of one type, from the plan's Broker to `subscriber`, whose reply goes back to the Broker."""
    spec = {
        "broker": plan.name,
        "filter": {"attributes": {"type": str(event_type)}},
        "subscriber": deepcopy(dict(subscriber)),
        "delivery": plan.delivery.spec(),
    }
    return _object(plan, "eventing.knative.dev/v1", "Trigger", f"{plan.name}-{suffix}", spec)


def score_sequence(plan: EventingPlan) -> Manifest:
    """Gateway and stages one after the other: the reply of each is the next one's event, the last one's goes to the Broker."""
    spec = {
        "channelTemplate": deepcopy(dict(plan.channel)),
        "steps": [service_destination(step) | {"delivery": plan.delivery.spec()} for step in (plan.gateway, *plan.stages)],
        "reply": _destination("eventing.knative.dev/v1", "Broker", plan.name),
    }
    return _object(plan, "flows.knative.dev/v1", "Sequence", plan.sequence, spec)


def service_destination(name: str) -> Manifest:
    """A Knative Service of the same namespace."""
    return _destination("serving.knative.dev/v1", "Service", name)


def _destination(api_version: str, kind: str, name: str) -> Manifest:
    return {"ref": {"apiVersion": api_version, "kind": kind, "name": name}}


def _object(plan: EventingPlan, api_version: str, kind: str, name: str, spec: Manifest) -> Manifest:
    metadata: Manifest = {"name": name, "namespace": plan.namespace}
    if plan.labels:
        metadata["labels"] = dict(plan.labels)
    return {"apiVersion": api_version, "kind": kind, "metadata": metadata, "spec": spec}
