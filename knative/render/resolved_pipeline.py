"""ResolvedPipeline: a spec with its cut and weights digests; names, fingerprint and labels of its objects."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from eventing.wire.events import Cut, StageWeights, fingerprint_of
from functions.configuration.config import FLEET_LABEL
from knative.spec.kubernetes_object import KubernetesObject, kubernetes_object
from knative.spec.pipeline_spec import PipelineSpec, StageSpec


@dataclass(frozen=True)
class ResolvedPipeline:
    """A spec together with its cut and the digests of its weights.

    The names of stages, of the gateway for events and of the Sequence carry the fingerprint. So a new cut or model is a new set
    of objects beside the old one, and every object refers to its own pipeline.
    """

    spec: PipelineSpec
    cut: Cut
    weights_digest: str  # of the model in its own dtype
    other_digests: Mapping[str, str] = field(default_factory=dict)  # dtype → digest, for stages that compute in another dtype
    fleet: str | None = None  # name of the fleet that it belongs to

    @property
    def fingerprint(self) -> str:
        return fingerprint_of(self.weights, self.cut, self.spec.wire_dtype, self.spec.kv_dtype)

    @property
    def weights(self) -> tuple[StageWeights, ...]:
        """Dtype and weights digest of each stage. Raises SpecError if an override selects no stage."""
        digests = {**self.other_digests, self.spec.model.dtype: self.weights_digest}
        return tuple((dtype, digests[dtype]) for dtype in self.spec.dtypes_of(self.cut))

    @cached_property
    def stages(self) -> tuple[StageSpec, ...]:
        """Settings of each stage, overrides included. Raises SpecError if an override selects no stage."""
        return self.spec.stages_of(self.cut)

    @property
    def sequence_name(self) -> str:
        return f"{self.spec.name}-{self.fingerprint[:8]}"

    @property
    def events_gateway_name(self) -> str:
        return f"{self.sequence_name}-ev"

    def stage_name(self, index: int) -> str:
        return f"{self.sequence_name}-s{index}"

    @property
    def stage_names(self) -> list[str]:
        return [self.stage_name(index) for index in range(len(self.cut))]

    def stage_url(self, index: int) -> str:
        return cluster_url(self.stage_name(index), self.spec.namespace)


def cluster_url(name: str, namespace: str) -> str:
    """The URL of a Service inside the cluster."""
    return f"http://{name}.{namespace}.svc.cluster.local"


def labels(pipeline: ResolvedPipeline, component: str) -> dict[str, str]:
    """Labels of an object: those that Kubernetes recommends, and the fingerprint.

    component: its part in the pipeline, such as `stage` or `gateway`.
    """
    own = {
        "app.kubernetes.io/name": "lamina",
        "app.kubernetes.io/instance": pipeline.spec.name,
        "app.kubernetes.io/component": component,
        "app.kubernetes.io/part-of": "lamina",
        "app.kubernetes.io/managed-by": "lamina",
        "lamina.dev/pipeline": pipeline.fingerprint,
    }
    return own if pipeline.fleet is None else {**own, FLEET_LABEL: pipeline.fleet}


def pipeline_object(
    pipeline: ResolvedPipeline, api_version: str, kind: str, name: str, component: str, **fields: Any
) -> KubernetesObject:
    """An object in the pipeline's namespace, with the labels of one of its components."""
    return kubernetes_object(api_version, kind, name, pipeline.spec.namespace, labels(pipeline, component), **fields)
