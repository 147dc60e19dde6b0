"""What the gateway says to a stage besides forward events, and what it hears: the JSON data of reserve, release and warm-up."""

from typing import Annotated, Final

from msgspec import Meta, Struct, field

from eventing.wire.events import MAX_POSITION, MAX_ROWS, Status

LEASE_SECONDS: Final = 20.0
"""A stage frees what a gateway holds there that it has not heard of for so long: a gateway that was killed releases nothing."""
RENEWAL_SECONDS: Final = 5.0
"""How often a gateway lets every stage hear of it where it holds something."""

SequenceId = Annotated[str, Meta(min_length=1, max_length=128)]
Attempt = Annotated[int, Meta(ge=0, lt=2**31)]


class ReserveRow(Struct, frozen=True, forbid_unknown_fields=True):
    """A sequence that wants room in a stage's KV cache."""

    id: SequenceId
    attempt: Attempt
    reserve_tokens: Annotated[int, Meta(ge=1, le=MAX_POSITION)]


class ReserveRequest(Struct, frozen=True, forbid_unknown_fields=True):
    """Data of `dev.lamina.reserve`."""

    rows: Annotated[tuple[ReserveRow, ...], Meta(min_length=1, max_length=MAX_ROWS)]


class ReservedRow(Struct, frozen=True):
    """`ok`, `full` or `stale`."""

    id: SequenceId
    attempt: Attempt
    status: Status


class ReserveReply(Struct, frozen=True):
    """The rows of the request in their order."""

    rows: tuple[ReservedRow, ...]


class ReleaseRow(Struct, frozen=True, forbid_unknown_fields=True):
    """A sequence that has ended: all its attempts up to this one are released."""

    id: SequenceId
    attempt: Attempt


class ReleaseRequest(Struct, frozen=True, forbid_unknown_fields=True):
    """Data of `dev.lamina.release`. An unknown id is no error. No rows: the gateway lives, and keeps what it holds."""

    rows: Annotated[tuple[ReleaseRow, ...], Meta(max_length=MAX_ROWS)]


class ReleaseReply(Struct, frozen=True):
    """How many sequences were held and are not any more."""

    released: int


class WarmupRequest(Struct, frozen=True, forbid_unknown_fields=True):
    """Data of `dev.lamina.warmup`: nothing."""


class WarmupReply(Struct, frozen=True):
    """Who is warm, and the seconds of each phase of its start."""

    instance: str
    start_up: dict[str, float] = field(default_factory=dict)
