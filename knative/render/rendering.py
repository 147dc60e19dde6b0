"""From a PipelineSpec to manifests that Knative accepts. Asks the store for digests and cut if the spec does not pin them."""

from collections.abc import Callable
from typing import Final

from knative.render.access import around_gateway
from knative.render.eventing import eventing_objects
from knative.render.monitoring import monitoring_objects
from knative.render.resolved_pipeline import ResolvedPipeline
from knative.render.services import gateway_service, services, stage_service
from knative.spec.cut import cut_evenly, parse_cut
from knative.spec.kubernetes_object import KubernetesObject
from knative.spec.model_shape import ModelShape
from knative.spec.pipeline_spec import PipelineSpec
from knative.spec.sizing import check_memory, plan_mixed
from knative.webhook.check import validate, warnings
from knative.webhook.feature_flags import POD_FIELDS, FeatureFlags
from storage.models.model_repository import ModelManifest

# All pod fields are allowed here: `deploy` compares them with the cluster's own flags, `check` with any.
_ALL_FEATURES: Final = FeatureFlags(dict.fromkeys(POD_FIELDS.values(), "enabled"))


class RenderFailed(Exception):
    """Knative would reject the manifests, or accept them although a setting is certainly wrong.

    The message names every such field.
    """


def render(pipeline: ResolvedPipeline) -> dict[str, list[KubernetesObject]]:
    """File name → objects, in the order in which they are applied: access and monitoring, stages, gateways, eventing."""
    spec, files = pipeline.spec, around_gateway(pipeline)
    if spec.monitoring is not None:
        files["monitoring.yaml"] = monitoring_objects(pipeline)
    for index in range(len(pipeline.cut)):
        files[f"stage-{index}.yaml"] = [stage_service(pipeline, index)]
    files["gateway.yaml"] = [gateway_service(pipeline)]
    if spec.eventing is not None:
        files["gateway-events.yaml"] = [gateway_service(pipeline, for_events=True)]
        files["eventing.yaml"] = eventing_objects(pipeline)
    return files


def resolve(spec: PipelineSpec, published: Callable[[str], tuple[ModelManifest, ModelShape]]) -> ResolvedPipeline:
    """Completes a spec with its cut and the digests of its weights, and checks the result.

    published: returns the publication in a dtype; called only if the spec does not pin all digests and the cut. Raises what it
    raises, TooManyStages, SpecError (an override selects no stage, or too little memory) and RenderFailed.
    """
    pinned = dict(spec.model.digests)
    if spec.model.digest:
        pinned[spec.model.dtype] = spec.model.digest
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
    shape = shapes[spec.model.dtype]
    cut = cut_evenly(shape, spec.stages or 1) if spec.cut is None else parse_cut(spec.cut)
    if cut[-1][1] != shape.num_layers:
        raise RenderFailed(f"$.cut: {spec.cut} ends at layer {cut[-1][1]}, but {shape.name} has {shape.num_layers} layers")
    pipeline = ResolvedPipeline(spec, cut, digests[spec.model.dtype], digests)
    plans = plan_mixed(shapes, spec.dtypes_of(cut), cut, spec.wire_dtype, spec.kv_dtype)
    kept = spec.adapters * spec.adapter_rank
    check_memory(pipeline.stages, [plan.weight_bytes for plan in plans], [kept * plan.adapter_bytes for plan in plans])
    return checked(pipeline)


def checked(pipeline: ResolvedPipeline) -> ResolvedPipeline:
    """Returns the pipeline unchanged if its Services are valid.

    Raises RenderFailed if Knative would reject one, or accept one with a setting that is certainly wrong.
    """
    found = []
    for service in services(pipeline):
        complaints = [*map(str, validate(service, features=_ALL_FEATURES))]
        complaints += [f"{each.field}: {each.reason}" for each in warnings(service)]
        found += [f"{service['metadata']['name']}: {complaint}" for complaint in complaints]
    if found:
        raise RenderFailed("; ".join(found))
    return pipeline
