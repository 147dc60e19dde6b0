"""Which stage this is: what it checks of every event, and what it says of itself in every reply."""

from dataclasses import dataclass
from datetime import datetime
from typing import Self

from cloudevents.core.v1.event import CloudEvent

from eventing.problems import WrongLayer, WrongPipeline
from eventing.wire.cloud_event import integer_attribute, required_attribute
from eventing.wire.events import Attribute
from functions.configuration.config import StageConfig


@dataclass(frozen=True, slots=True)
class StageIdentity:
    """Layers [first, last) of a pipeline, and the instance that runs them."""

    pipeline: str
    first: int
    last: int
    is_last_stage: bool
    instance: str

    @classmethod
    def of(cls, config: StageConfig, instance: str) -> Self:
        first, last = config.layers
        return cls(config.pipeline, first, last, config.layers == config.cut[-1], instance)

    @property
    def source(self) -> str:
        """Of all replies; the same for all instances, so that a repeated delivery has the same reply wherever it goes."""
        return f"/pipelines/{self.pipeline}/stages/{self.first}-{self.last}"

    def check_pipeline(self, event: CloudEvent) -> None:
        """Raises WrongPipeline, and MalformedEvent where the event names none."""
        self.check_fingerprint(required_attribute(event, Attribute.PIPELINE))

    def check_fingerprint(self, seen: str) -> None:
        """Raises WrongPipeline."""
        if seen != self.pipeline:
            raise WrongPipeline(
                f"the event is of pipeline {seen!r} and this stage of {self.pipeline!r}; send it to its own pipeline's stage"
            )

    def check_layer(self, event: CloudEvent) -> None:
        """Raises WrongLayer, and MalformedEvent where the event names none."""
        self.check_first_layer(integer_attribute(event, Attribute.LAYER))

    def check_first_layer(self, layer: int) -> None:
        """Raises WrongLayer."""
        if layer != self.first:
            raise WrongLayer(f"the event wants layer {layer} and this stage runs {self.first} to {self.last - 1}")

    def reply_attributes(self, free_tokens: int) -> dict[str, str | int | bool | datetime | None]:
        return {
            Attribute.PIPELINE: self.pipeline,
            Attribute.INSTANCE: self.instance,
            Attribute.FREE_TOKENS: free_tokens,
        }
