"""Which stage this is, what it checks of every event, and what serving needs of the stage's engine.

The engine is a Protocol because importing the class would import numpy, before a pod is told to start.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, Self, TypeVar

from eventing.problems import WrongLayer, WrongPipeline
from eventing.wire.control import ReleaseRow, ReservedRow, ReserveRow
from eventing.wire.events import Batch
from functions.configuration.config import StageConfig

if TYPE_CHECKING:
    from functions.stage.engine.sequences import SequenceTable

T = TypeVar("T")


class StageEngine(Protocol):
    """functions.stage.engine.engine.Engine."""

    @property
    def free_tokens(self) -> int: ...

    @property
    def has_prefix_cache(self) -> bool: ...

    def handle(self, batch: Batch, *, source: str, expires_at: float | None = None) -> Batch: ...

    def reserve(
        self, reservations: Sequence[ReserveRow], *, source: str, expires_at: float | None = None
    ) -> list[ReservedRow]: ...

    def release(self, releases: Sequence[ReleaseRow], *, source: str) -> int: ...

    def await_memory(self, tokens: int, *, source: str, expires_at: float | None = None) -> None: ...

    def with_sequences(self, action: "Callable[[SequenceTable], T]") -> T: ...


class EngineSource(Protocol):
    """Gives out the engine once it has started."""

    def engine(self, wait_seconds: float = 0.0) -> StageEngine:
        """Raises NotReady if it has not started after `wait_seconds`."""

    def phases(self) -> dict[str, float]:
        """Seconds of each phase of the start that has ended."""


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
        """Of all replies. Instances share it, so that a repeated delivery has the same reply from any of them."""
        return f"/pipelines/{self.pipeline}/stages/{self.first}-{self.last}"

    def check_pipeline(self, seen: str) -> None:
        """Raises WrongPipeline."""
        if seen != self.pipeline:
            raise WrongPipeline(
                f"the event is of pipeline {seen!r} and this stage of {self.pipeline!r}; send it to its own pipeline's stage"
            )

    def check_layer(self, layer: int) -> None:
        """Raises WrongLayer."""
        if layer != self.first:
            raise WrongLayer(f"the event wants layer {layer} and this stage runs {self.first} to {self.last - 1}")
