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
from knative.spec.stage_plan import plan_mixed
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


def resolve(spec: PipelineSpec, published: Callable[[str], tuple[ModelManifest, ModelShape]]) -> ResolvedPipeline:
    """published: the model in a dtype; called only where the spec pins neither digests nor cut. Raises what it raises,
    TooManyStages, SpecError (an override for no stage, too little memory), RenderFailed."""
    pinned = {**spec.model.digests, **({spec.model.dtype: spec.model.digest} if spec.model.digest else {})}
    if spec.cut is not None and all(dtype in pinned for dtype in spec.dtypes):
        pipeline = ResolvedPipeline(spec, parse_cut(spec.cut), pinned[spec.model.dtype], pinned)
        check_memory(pipeline.stages, [None] * len(pipeline.cut))
        return checked(pipeline)
    found = {dtype: published(dtype) for dtype in spec.dtypes}
    for dtype, (manifest, _) in found.items():
        if pinned.get(dtype) not in (None, manifest.digest):
            raise RenderFailed(
                f"$.model.digest: {pinned[dtype]} is pinned, but {spec.model.name} as {dtype} in the store has "
                f"{manifest.digest}; pin that, or publish the pinned weights again"
            )
    shapes = {dtype: shape for dtype, (_, shape) in found.items()}
    digests = {dtype: manifest.digest for dtype, (manifest, _) in found.items()}
    pipeline = ResolvedPipeline(spec, _cut(spec, shapes[spec.model.dtype]), digests[spec.model.dtype], digests)
    plans = plan_mixed(shapes, spec.dtypes_of(pipeline.cut), pipeline.cut)
    check_memory(pipeline.stages, [plan.weight_bytes for plan in plans])
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
