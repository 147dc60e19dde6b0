"""What the gateway says to a stage besides forward events, and what it hears: the JSON data of reserve, release and warm-up."""

from typing import Annotated, Final

from msgspec import Meta, Struct, field

from eventing.wire.events import MAX_POSITION, MAX_ROWS, Status
from eventing.wire.prefix_chain import BLOCK_TOKENS, DIGEST_BYTES, Chain, unpacked

LEASE_SECONDS: Final = 20.0
"""A stage frees what a gateway holds there that it has not heard of for so long: a gateway that was killed releases nothing."""
RENEWAL_SECONDS: Final = 5.0
"""How often a gateway lets every stage hear of it where it holds something."""
ROOM_SECONDS: Final = 2.0
"""How long a stage holds the reply to a release that awaits room, at most: those who wait for memory are in flight there."""

SequenceId = Annotated[str, Meta(min_length=1, max_length=128)]
Attempt = Annotated[int, Meta(ge=0, lt=2**31)]

MOST_PEERS: Final = 4
PackedChain = Annotated[bytes, Meta(max_length=MAX_POSITION // BLOCK_TOKENS * DIGEST_BYTES)]
"""Digests one behind the other, base64 in JSON, see `prefix_chain`."""


class ReserveRow(Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """A sequence that wants room in a stage's KV cache."""

    id: SequenceId
    attempt: Attempt
    reserve_tokens: Annotated[int, Meta(ge=1, le=MAX_POSITION)]
    chain: PackedChain = b""
    """Of its tokens so far but the newest: what of them is held need not be computed. Empty: nothing is looked for."""
    token_ids: Annotated[bytes, Meta(max_length=4 * MAX_POSITION)] = b""
    """int32, little endian, those that `chain` covers: only where drawing depends on them (a penalty)."""
    peers: Annotated[tuple[Annotated[str, Meta(max_length=128)], ...], Meta(max_length=MOST_PEERS)] = ()
    """URLs of other instances of the stage that may hold it, the likeliest first."""

    def __post_init__(self) -> None:
        if BLOCK_TOKENS * len(self.digests) > self.reserve_tokens:
            raise ValueError(f"a chain of {len(self.digests)} blocks and room for {self.reserve_tokens} tokens only")
        if self.token_ids and len(self.token_ids) != 4 * BLOCK_TOKENS * len(self.digests):
            raise ValueError(f"token_ids has {len(self.token_ids)} bytes, the chain covers {len(self.digests)} blocks")

    @property
    def digests(self) -> Chain:
        return unpacked(self.chain)


class ReserveRequest(Struct, frozen=True, forbid_unknown_fields=True):
    """Data of `dev.lamina.reserve`."""

    rows: Annotated[tuple[ReserveRow, ...], Meta(min_length=1, max_length=MAX_ROWS)]


class ReservedRow(Struct, frozen=True, omit_defaults=True):
    """`ok`, `full` or `stale`."""

    id: SequenceId
    attempt: Attempt
    status: Status
    held: Annotated[int, Meta(ge=0, le=MAX_POSITION)] = 0
    """Tokens of its chain that are held, so that its first row may begin there."""


class ReserveReply(Struct, frozen=True):
    """The rows of the request in their order."""

    rows: tuple[ReservedRow, ...]
    remembers: bool = False
    """What one sequence computes others find."""


class ReleaseRow(Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """A sequence that has ended: all its attempts up to this one are released."""

    id: SequenceId
    attempt: Attempt
    chain: PackedChain = b""
    """Of all its tokens but the newest: what is held of them may be remembered. Empty: that of its reservation counts."""

    def __post_init__(self) -> None:
        unpacked(self.chain)


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
