"""JSON data of reserve, release and warm-up events: what gateway and stage tell each other besides forward events."""

from typing import Annotated, Final

from msgspec import Meta, Struct, field

from eventing.wire.events import MAX_POSITION, MAX_ROWS, Adapter, Status
from eventing.wire.prefix_chain import BLOCK_TOKENS, DIGEST_BYTES, Chain, unpacked

LEASE_SECONDS: Final = 20.0  # a stage frees the sequences of a gateway without events for so long, as it may be dead
RENEWAL_SECONDS: Final = 5.0  # how often a gateway renews its lease at every stage that holds its sequences
HOLD_SECONDS: Final = 2.0  # longest time that a stage holds the reply to a release that waits for memory
RESTORE_HOLD_SECONDS: Final = 0.1  # longest time that a stage holds the reply to a reservation while it restores KV

SequenceId = Annotated[str, Meta(min_length=1, max_length=128)]
Attempt = Annotated[int, Meta(ge=0, lt=2**31)]

MAX_PEERS: Final = 4
# Digests of a `prefix_chain` one after the other, base64 in JSON.
PackedChain = Annotated[bytes, Meta(max_length=MAX_POSITION // BLOCK_TOKENS * DIGEST_BYTES)]


class ReserveRow(Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """A sequence that needs memory in a stage's KV cache: one row of a reserve event."""

    id: SequenceId
    attempt: Attempt
    reserve_tokens: Annotated[int, Meta(ge=1, le=MAX_POSITION)]
    chain: PackedChain = b""  # of all its tokens but the newest; KV found by it is not computed again; empty: no lookup
    # The tokens that `chain` covers, int32, little endian. Sent only if the draw depends on them (a penalty).
    token_ids: Annotated[bytes, Meta(max_length=4 * MAX_POSITION)] = b""
    adapter: Adapter = b""  # the stage begins to load it
    # URLs of other instances of the stage that may hold its KV, likeliest first.
    peers: Annotated[tuple[Annotated[str, Meta(max_length=128)], ...], Meta(max_length=MAX_PEERS)] = ()

    def __post_init__(self) -> None:
        if BLOCK_TOKENS * len(self.digests) > self.reserve_tokens:
            raise ValueError(f"a chain of {len(self.digests)} blocks does not fit into {self.reserve_tokens} reserved tokens")
        if self.token_ids and len(self.token_ids) != 4 * BLOCK_TOKENS * len(self.digests):
            raise ValueError(f"token_ids has {len(self.token_ids)} bytes, the chain covers {len(self.digests)} blocks")

    @property
    def digests(self) -> Chain:
        return unpacked(self.chain)


class ReserveRequest(Struct, frozen=True, forbid_unknown_fields=True):
    """Data of `dev.lamina.reserve`: sequences for which the gateway asks a stage for memory."""

    rows: Annotated[tuple[ReserveRow, ...], Meta(min_length=1, max_length=MAX_ROWS)]


class ReservedRow(Struct, frozen=True, omit_defaults=True):
    """The stage's decision on one ReserveRow.

    `status` is `ok`, `full` (not enough memory), `stale` (a newer attempt is known) or `invalid` (it can never be granted).
    """

    id: SequenceId
    attempt: Attempt
    status: Status
    held: Annotated[int, Meta(ge=0, le=MAX_POSITION)] = 0  # tokens of its chain in the KV cache; its first row may begin there
    # Its adapter, or more of its chain, is on its way from a peer or the store: the same reservation asks again.
    restoring: bool = False
    reason: str = ""  # with `invalid`: why its adapter cannot be used


class ReserveReply(Struct, frozen=True):
    """Data of the reply to a reserve event. Its rows have the order of the request's rows."""

    rows: tuple[ReservedRow, ...]
    remembers: bool = False  # the stage has a prefix cache: sequences find what others computed


class ReleaseRow(Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """A sequence that has ended: one row of a release event. The stage releases this attempt and all earlier ones."""

    id: SequenceId
    attempt: Attempt
    chain: PackedChain = b""  # of all its tokens but the newest, for the prefix cache; empty: its reservation's chain is used

    def __post_init__(self) -> None:
        unpacked(self.chain)


class ReleaseRequest(Struct, frozen=True, forbid_unknown_fields=True):
    """Data of `dev.lamina.release`. Unknown ids are no error. An event without rows only renews the gateway's lease."""

    rows: Annotated[tuple[ReleaseRow, ...], Meta(max_length=MAX_ROWS)]


class ReleaseReply(Struct, frozen=True):
    released: int  # sequences that were held and are held no longer


class WarmupRequest(Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """Data of `dev.lamina.warmup`, which makes a stage's instance start and report how far its start is."""

    wait: bool = True  # the reply comes when the instance is ready; False: at once, and says how far the start is


class WarmupReply(Struct, frozen=True):
    """Data of the reply to a warm-up event: which instance replied, and which phases of its start have ended.

    Times are seconds since the instance's process began.
    """

    instance: str
    start_up: dict[str, float] = field(default_factory=dict)
    loaded_bytes: int = 0  # of its weights
    total_bytes: int = 0  # of its weights; 0: not known yet
