"""What the scheduler's threads do without its lock: plain data, decided and put together under it."""

from collections.abc import Mapping
from collections.abc import Sequence as Items
from dataclasses import dataclass, field

from eventing.wire.control import ReleaseRow, ReserveRow
from functions.gateway.scheduling.sequence import Sequence
from functions.gateway.stages.client import Traces
from functions.gateway.stages.instances import Instance
from functions.gateway.stages.trip import Trip


@dataclass(frozen=True, slots=True)
class Walk:
    trip: Trip


@dataclass(frozen=True, slots=True)
class Reserve:
    sequences: Items[Sequence]
    """Whose memory it is: for the scheduler, when the reply is there."""
    instances: tuple[Instance, ...]
    rows: Items[ReserveRow]
    """Of `sequences`, in their order."""
    traces: Traces
    deadline: float
    """In time.monotonic()."""
    one_by_one: bool
    """Stage after stage in order, so that of two gateways one always comes through."""
    peers: Mapping[Instance, tuple[str, ...]] = field(default_factory=dict)
    """Other instances' URLs that each of `instances` may ask for what the sequences held there."""
    moved_from: Instance | None = None
    """Where they were before `instances`, one instance then: told to release them when that one has had its chance to ask."""


@dataclass(frozen=True, slots=True, eq=False)
class Release:
    instance: Instance
    rows: Items[ReleaseRow]
    awaited_tokens: int = 0
    """Its reply is held there until so many can be reserved; see `rooms`."""


@dataclass(frozen=True, slots=True)
class Wake:
    """Warm-up events to these stages, all at once."""

    stages: Items[int]


Action = Walk | Reserve | Release | Wake
