"""The Knative Eventing objects of a pipeline whose spec has an `eventing` section: Broker, Triggers, Sequence.

    client → Broker ─ generate.request → gateway ─ generate.response ───────────────┐
               │                                                                    ├→ Broker ─ *.response → reply sink
               └──── score.request → Sequence of gateway and stages ─ score.response ┘
                     whatever fails for good, at any step → dead letter sink

Delivery is at least once. What is retried: no answer, 404, 408, 409, 429 and 5xx; the statuses of `problems` are chosen for it.
A dead letter says why in its `knativeerrorcode` and `knativeerrordata`.
"""

from typing import Final

from eventing.wire.events import EventType
from knative.render.resolved_pipeline import ResolvedPipeline, labels
from knative.spec.kubernetes_object import KubernetesObject
from knative.spec.pipeline_spec import Eventing

_RESPONSES: Final = (EventType.GENERATE_RESPONSE, EventType.SCORE_RESPONSE)


def eventing_objects(pipeline: ResolvedPipeline) -> list[KubernetesObject]:
    """In the order in which they are applied; none without the section."""
    eventing = pipeline.spec.eventing
    if eventing is None:
        return []
    scoring = _destination("flows.knative.dev/v1", "Sequence", pipeline.sequence_name)
    subscribers = {
        "generate": (EventType.GENERATE_REQUEST, _service(pipeline.events_gateway_name)),
        "score": (EventType.SCORE_REQUEST, scoring),
    }
    if eventing.reply_sink is not None:
        subscribers |= {
            f"{event_type.split('.')[2]}-reply": (event_type, _sink(eventing.reply_sink)) for event_type in _RESPONSES
        }
    triggers = [_trigger(pipeline, eventing, suffix, *each) for suffix, each in subscribers.items()]
    return [_broker(pipeline, eventing), _score_sequence(pipeline, eventing), *triggers]


def _broker(pipeline: ResolvedPipeline, eventing: Eventing) -> KubernetesObject:
    """Its delivery holds for every Trigger that names none of its own."""
    broker = _object(pipeline, "eventing.knative.dev/v1", "Broker", pipeline.spec.name, {"delivery": _delivery(eventing)})
    broker["metadata"]["annotations"] = {"eventing.knative.dev/broker.class": eventing.broker_class}
    return broker


def _trigger(
    pipeline: ResolvedPipeline, eventing: Eventing, suffix: str, event_type: EventType, subscriber: KubernetesObject
) -> KubernetesObject:
    """Events of one type, from the pipeline's Broker to `subscriber`, whose reply goes back to the Broker."""
    spec = {
        "broker": pipeline.spec.name,
        "filter": {"attributes": {"type": str(event_type)}},
        "subscriber": subscriber,
        "delivery": _delivery(eventing),
    }
    return _object(pipeline, "eventing.knative.dev/v1", "Trigger", f"{pipeline.spec.name}-{suffix}", spec)


def _score_sequence(pipeline: ResolvedPipeline, eventing: Eventing) -> KubernetesObject:
    """Gateway and stages one after the other: the reply of each is the next one's event, the last one's goes to the Broker."""
    steps = (pipeline.events_gateway_name, *pipeline.stage_names)
    spec = {
        "channelTemplate": {"apiVersion": eventing.channel.api_version, "kind": eventing.channel.kind},
        "steps": [{**_service(step), "delivery": _delivery(eventing)} for step in steps],
        "reply": _destination("eventing.knative.dev/v1", "Broker", pipeline.spec.name),
    }
    return _object(pipeline, "flows.knative.dev/v1", "Sequence", pipeline.sequence_name, spec)


def _delivery(eventing: Eventing) -> KubernetesObject:
    """How often and how long it is tried. The wait before retry n, counted from 0: backoff_seconds × 2^n, or × n."""
    return {
        "deadLetterSink": _sink(eventing.dead_letter_sink),
        "retry": eventing.retry,
        "backoffPolicy": eventing.backoff_policy,
        "backoffDelay": f"PT{eventing.backoff_seconds:g}S",
        "timeout": f"PT{eventing.timeout_seconds}S",
    }


def _sink(sink: str) -> KubernetesObject:
    """The destination that a URL, or the name of a Service, stands for."""
    return {"uri": sink} if "://" in sink else _service(sink)


def _service(name: str) -> KubernetesObject:
    """A Knative Service of the same namespace, as a destination."""
    return _destination("serving.knative.dev/v1", "Service", name)


def _destination(api_version: str, kind: str, name: str) -> KubernetesObject:
    return {"ref": {"apiVersion": api_version, "kind": kind, "name": name}}


def _object(pipeline: ResolvedPipeline, api_version: str, kind: str, name: str, spec: KubernetesObject) -> KubernetesObject:
    metadata = {"name": name, "namespace": pipeline.spec.namespace, "labels": labels(pipeline, "eventing")}
    return {"apiVersion": api_version, "kind": kind, "metadata": metadata, "spec": spec}
