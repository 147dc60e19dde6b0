"""The Knative Eventing objects of a pipeline or fleet whose spec has an `eventing` section: Broker, Triggers, Sequence.

    client → Broker ─ generate.request → gateway ─ generate.response ───────────────┐
               ├───── embed.request → gateway ─ embed.response ─────────────────────┤
               │                                                                    ├→ Broker ─ *.response → reply sink
               ├──── score.request → Sequence of gateway and stages ─ score.response ┤
               └──── batch.request → gateway … batch.response, if it has jobs ───────┘
                     events that fail for good, at any step → dead letter sink

A fleet has one Broker for all members, whose gateway routes by the events' model, and no Sequence.
Delivery is at least once. Knative retries without a reply and on 404, 408, 409, 429 and 5xx; the statuses of `problems` are
chosen for that. A dead letter gives its reason in `knativeerrorcode` and `knativeerrordata`.
"""

from eventing.wire.events import EventType
from knative.render.resolved_pipeline import ResolvedPipeline, pipeline_object
from knative.spec.kubernetes_object import KubernetesObject
from knative.spec.pipeline_spec import EventingSpec


def eventing_objects(pipeline: ResolvedPipeline) -> list[KubernetesObject]:
    """Broker, Sequence and Triggers, in the order in which they are applied. Empty if the spec has no `eventing` section.

    pipeline: or a fleet's gateway, as `fleet_door` makes it.
    """
    eventing, name, of_fleet = pipeline.spec.eventing, pipeline.spec.name, pipeline.fleet is not None
    if eventing is None:
        return []
    with_jobs = of_fleet or bool(pipeline.spec.gateway.jobs)  # any member of a fleet may have them
    # The gateway of a fleet refuses scores. Without their Trigger they would be lost, instead of becoming dead letters.
    scorer = ("serving.knative.dev/v1", "Service", pipeline.events_gateway_name)
    if not of_fleet:
        scorer = ("flows.knative.dev/v1", "Sequence", pipeline.sequence_name)
    subscribers = {
        "generate": (EventType.GENERATE_REQUEST, _sink(pipeline.events_gateway_name)),
        "embed": (EventType.EMBED_REQUEST, _sink(pipeline.events_gateway_name)),
        "score": (EventType.SCORE_REQUEST, _destination(*scorer)),
    }
    answers = [EventType.GENERATE_RESPONSE, EventType.EMBED_RESPONSE]
    if not of_fleet:
        answers.append(EventType.SCORE_RESPONSE)
    if with_jobs:
        subscribers["batch"] = (EventType.BATCH_REQUEST, _sink(pipeline.events_gateway_name))
        answers.append(EventType.BATCH_RESPONSE)
    if eventing.reply_sink is not None:
        for event_type in answers:
            subscribers[f"{event_type.split('.')[2]}-reply"] = (event_type, _sink(eventing.reply_sink))
    # The Broker's delivery applies to Triggers of others that set none.
    broker = pipeline_object(
        pipeline,
        "eventing.knative.dev/v1",
        "Broker",
        name,
        "eventing",
        annotations={"eventing.knative.dev/broker.class": eventing.broker_class},
        spec={"delivery": _delivery(eventing)},
    )
    # The reply of each step is the event of the next; the last reply goes to the Broker.
    steps = {
        "channelTemplate": {"apiVersion": eventing.channel.api_version, "kind": eventing.channel.kind},
        "steps": [
            {**_sink(step), "delivery": _delivery(eventing)} for step in (pipeline.events_gateway_name, *pipeline.stage_names)
        ],
        "reply": _destination("eventing.knative.dev/v1", "Broker", name),
    }
    sequence = pipeline_object(pipeline, "flows.knative.dev/v1", "Sequence", pipeline.sequence_name, "eventing", spec=steps)
    triggers = {
        suffix: {
            "broker": name,
            "filter": {"attributes": {"type": str(event_type)}},
            "subscriber": subscriber,
            "delivery": _delivery(eventing),
        }
        for suffix, (event_type, subscriber) in subscribers.items()
    }
    return [
        broker,
        *([] if of_fleet else [sequence]),
        *(
            pipeline_object(pipeline, "eventing.knative.dev/v1", "Trigger", f"{name}-{suffix}", "eventing", spec=trigger)
            for suffix, trigger in triggers.items()
        ),
        *([_binding(pipeline)] if with_jobs else []),
    ]


def _binding(pipeline: ResolvedPipeline) -> KubernetesObject:
    """Gives the gateway for events the Broker's URL (K_SINK), to which it sends the results of a batch when that has ended."""
    spec, name = pipeline.spec, pipeline.events_gateway_name
    subject = {"apiVersion": "serving.knative.dev/v1", "kind": "Service", "namespace": spec.namespace, "name": name}
    sink = _destination("eventing.knative.dev/v1", "Broker", spec.name)
    fields = {"subject": subject, "sink": sink}
    return pipeline_object(pipeline, "sources.knative.dev/v1", "SinkBinding", name, "eventing", spec=fields)


def _delivery(eventing: EventingSpec) -> KubernetesObject:
    """Retries, timeout and dead letter sink of a Broker, Trigger or step.

    Retry n, counted from 0, comes after backoff_seconds × 2^n (exponential) or × n (linear).
    """
    return {
        "deadLetterSink": _sink(eventing.dead_letter_sink),
        "retry": eventing.retry,
        "backoffPolicy": eventing.backoff_policy,
        "backoffDelay": f"PT{eventing.backoff_seconds:g}S",
        "timeout": f"PT{eventing.timeout_seconds}S",
    }


def _sink(sink: str) -> KubernetesObject:
    """Destination of events. sink: a URL, or the name of a Knative Service in the namespace."""
    return {"uri": sink} if "://" in sink else _destination("serving.knative.dev/v1", "Service", sink)


def _destination(api_version: str, kind: str, name: str) -> KubernetesObject:
    return {"ref": {"apiVersion": api_version, "kind": kind, "name": name}}
