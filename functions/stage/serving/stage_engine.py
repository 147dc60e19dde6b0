"""What the handlers of events want of an engine, without importing one, which would import numpy."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol, TypeVar

from eventing.wire.control import ReleaseRow, ReservedRow, ReserveRow
from eventing.wire.events import Batch

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


class Readiness(Protocol):
    """Who knows when the engine is there."""

    def engine(self, wait_seconds: float = 0.0) -> StageEngine:
        """Raises NotReady."""

    def phases(self) -> dict[str, float]: ...
