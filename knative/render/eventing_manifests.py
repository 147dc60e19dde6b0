"""The Knative Eventing objects of a pipeline whose spec has an `eventing` section."""

from knative.render.eventing_objects import Delivery, Destination, EventingPlan, render_eventing, service_destination
from knative.render.services import Manifest, Pipeline, labels
from knative.spec.pipeline_spec import Eventing


def eventing_objects(pipeline: Pipeline) -> list[Manifest]:
    """Broker, Sequence and Triggers, in the order in which they are applied; none without the section.

    The Sequence carries the fingerprint as the stages do: a new pipeline has a new one, to which the Trigger moves.
    """
    eventing = pipeline.spec.eventing
    if eventing is None:
        return []
    reply_sink = eventing.reply_sink
    plan = EventingPlan(
        name=pipeline.spec.name,
        sequence=f"{pipeline.spec.name}-{pipeline.fingerprint[:8]}",
        namespace=pipeline.spec.namespace,
        gateway=pipeline.events_gateway_name,
        stages=[pipeline.stage_name(index) for index in range(len(pipeline.cut))],
        delivery=_delivery(eventing),
        reply_sink=None if reply_sink is None else _destination(reply_sink),
        broker_class=eventing.broker_class,
        channel={"apiVersion": eventing.channel.api_version, "kind": eventing.channel.kind},
        labels=labels(pipeline, "eventing"),
    )
    return render_eventing(plan)


def _delivery(eventing: Eventing) -> Delivery:
    return Delivery(
        timeout_seconds=eventing.timeout_seconds,
        dead_letter_sink=_destination(eventing.dead_letter_sink),
        retry=eventing.retry,
        backoff_policy=eventing.backoff_policy,
        backoff_seconds=eventing.backoff_seconds,
    )


def _destination(sink: str) -> Destination:
    """Of a URL, or of the name of a Service."""
    return {"uri": sink} if "://" in sink else service_destination(sink)
