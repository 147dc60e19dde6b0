"""A pipeline of which nothing is left open: its names, its fingerprint, and the labels of everything that is rendered of it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from eventing.wire.events import Cut, Weights, fingerprint_of
from knative.spec.pipeline_spec import PipelineSpec, Stage


@dataclass(frozen=True)
class ResolvedPipeline:
    """A spec with what only the model can tell: where it is cut, and the digest of its weights."""

    spec: PipelineSpec
    cut: Cut
    weights_digest: str
    """Of the model's own dtype."""
    other_digests: Mapping[str, str] = field(default_factory=dict)
    """By dtype, of others in which single stages compute."""

    @property
    def fingerprint(self) -> str:
        return fingerprint_of(self.weights, self.cut, self.spec.wire_dtype)

    @property
    def weights(self) -> tuple[Weights, ...]:
        """Of each stage. Raises SpecError."""
        digests = {**self.other_digests, self.spec.model.dtype: self.weights_digest}
        return tuple((dtype, digests[dtype]) for dtype in self.spec.dtypes_of(self.cut))

    @cached_property
    def stages(self) -> tuple[Stage, ...]:
        """What each stage gets, overrides included. Raises SpecError."""
        return self.spec.stages_of(self.cut)

    def stage_name(self, index: int) -> str:
        """Carries the fingerprint: a new cut or model is a new set of Services beside the old one."""
        return f"{self.spec.name}-{self.fingerprint[:8]}-s{index}"

    @property
    def stage_names(self) -> list[str]:
        return [self.stage_name(index) for index in range(len(self.cut))]

    @property
    def events_gateway_name(self) -> str:
        """Likewise, so that a Sequence's first step is of the same pipeline as the stages behind it."""
        return f"{self.spec.name}-{self.fingerprint[:8]}-ev"

    @property
    def sequence_name(self) -> str:
        """Likewise: a new pipeline has a new Sequence, to which the Trigger moves."""
        return f"{self.spec.name}-{self.fingerprint[:8]}"

    def stage_url(self, index: int) -> str:
        return f"http://{self.stage_name(index)}.{self.spec.namespace}.svc.cluster.local"


def labels(pipeline: ResolvedPipeline, component: str) -> dict[str, str]:
    """Kubernetes' recommended labels, and the fingerprint."""
    return {
        "app.kubernetes.io/name": "lamina",
        "app.kubernetes.io/instance": pipeline.spec.name,
        "app.kubernetes.io/component": component,
        "app.kubernetes.io/part-of": "lamina",
        "app.kubernetes.io/managed-by": "lamina",
        "lamina.dev/pipeline": pipeline.fingerprint,
    }
