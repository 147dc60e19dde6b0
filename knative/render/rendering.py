"""From a PipelineSpec to objects that Knative accepts: what the spec leaves open is asked of the store."""

from collections.abc import Callable, Iterator
from typing import Final

from eventing.wire.events import Cut
from knative.render.disruption import disruption_budgets
from knative.render.eventing import eventing_objects
from knative.render.monitoring import monitoring_objects
from knative.render.network_policy import network_policies
from knative.render.resolved_pipeline import ResolvedPipeline
from knative.render.services import events_gateway_service, gateway_access, gateway_service, services, stage_service
from knative.spec.cut import cut_evenly, parse_cut
from knative.spec.kubernetes_object import KubernetesObject
from knative.spec.memory import check_memory
from knative.spec.model_shape import ModelShape
from knative.spec.pipeline_spec import PipelineSpec
from knative.spec.stage_plan import plan_stages
from knative.webhook.check import validate, warnings
from knative.webhook.feature_flags import POD_FIELDS, FeatureFlags
from storage.models.model_repository import ModelManifest

_LET_THROUGH: Final = FeatureFlags(dict.fromkeys(POD_FIELDS.values(), "enabled"))
"""What a spec says of pods is asked for on purpose; `deploy` holds it to the cluster's own flags, and `check` to any."""


class RenderFailed(Exception):
    """The manifests would be refused, or accepted and wrong. The message names every field."""


def render(pipeline: ResolvedPipeline) -> dict[str, list[KubernetesObject]]:
    """File name → objects, in the order in which they are applied: what is around the pods, stages, gateways, eventing."""
    files = {"access.yaml": gateway_access(pipeline)} if pipeline.spec.gateway.service_account is None else {}
    if pipeline.spec.network.policies:
        files["network.yaml"] = network_policies(pipeline)
    if budgets := disruption_budgets(pipeline):
        files["disruption.yaml"] = budgets
    if pipeline.spec.monitoring is not None:
        files["monitoring.yaml"] = monitoring_objects(pipeline)
    for index in range(len(pipeline.cut)):
        files[f"stage-{index}.yaml"] = [stage_service(pipeline, index)]
    files["gateway.yaml"] = [gateway_service(pipeline)]
    if pipeline.spec.eventing is not None:
        files["gateway-events.yaml"] = [events_gateway_service(pipeline)]
        files["eventing.yaml"] = eventing_objects(pipeline)
    return files


def resolve(spec: PipelineSpec, manifest: Callable[[], tuple[ModelManifest, ModelShape]]) -> ResolvedPipeline:
    """manifest: called only where the spec pins neither digest nor cut. Raises what it raises, TooManyStages, SpecError (an
    override for no stage, too little memory), RenderFailed."""
    if spec.cut is not None and spec.model.digest is not None:
        pinned = ResolvedPipeline(spec, parse_cut(spec.cut), spec.model.digest)
        check_memory(pinned.stages, [None] * len(pinned.cut))
        return checked(pinned)
    published, shape = manifest()
    if spec.model.digest not in (None, published.digest):
        raise RenderFailed(
            f"$.model.digest: {spec.model.digest} is pinned, but {spec.model.name} as {spec.model.dtype} in the store has "
            f"{published.digest}; pin that, or publish the pinned weights again"
        )
    pipeline = ResolvedPipeline(spec, _cut(spec, shape), published.digest)
    check_memory(pipeline.stages, [plan.weight_bytes for plan in plan_stages(shape, pipeline.cut)])
    return checked(pipeline)


def checked(pipeline: ResolvedPipeline) -> ResolvedPipeline:
    """Raises RenderFailed for what Knative refuses, and for what it accepts in silence although it is surely a mistake."""
    found = [
        f"{service['metadata']['name']}: {complaint}" for service in services(pipeline) for complaint in _complaints(service)
    ]
    if found:
        raise RenderFailed("; ".join(found))
    return pipeline


def _complaints(service: KubernetesObject) -> Iterator[str]:
    yield from map(str, validate(service, features=_LET_THROUGH))
    yield from (f"{each.field}: {each.reason}" for each in warnings(service))


def _cut(spec: PipelineSpec, shape: ModelShape) -> Cut:
    if spec.cut is None:
        return cut_evenly(shape, spec.stages or 1)
    cut = parse_cut(spec.cut)
    if cut[-1][1] != shape.num_layers:
        raise RenderFailed(f"$.cut: {spec.cut} ends at layer {cut[-1][1]}, but {shape.name} has {shape.num_layers} layers")
    return cut
