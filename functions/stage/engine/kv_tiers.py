"""Tiers: places besides a stage's own memory that may hold a sequence's KV. The interface, and how much time a hit saves.

A tier is a peer or the store (`functions/stage/kv`). What no tier holds is computed, so answers never depend on tiers.
"""

import math
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Final, Protocol

from msgspec.structs import replace

from eventing.wire.control import ReservedRow, ReserveRow
from eventing.wire.prefix_chain import BLOCK_TOKENS, Chain
from functions.stage.models.kv_cache import KVBlocks

MEMORY: Final = "memory"  # name of the first tier, the prefix cache in the stage's own memory
_FEWEST_TOKENS: Final = 32  # passes with fewer tokens do not measure the speed of prefill
_SMOOTHING: Final = 0.3  # weight of the newest value in a moving average


class SequenceGone(Exception):
    """The sequence was released, or began another attempt, while a tier fetched its KV. Stop fetching."""


@dataclass(frozen=True, slots=True)
class RestoreRequest:
    """What a tier must know to fetch the KV that a sequence with a reservation lacks."""

    chain: Chain  # of the tokens whose KV is wanted, under the lineage
    lineage: str  # of the KV
    held: int  # tokens of the chain that the stage holds already
    # Calls action(cache, the sequence's handle) on the engine's thread between two passes. Both return the tokens that the
    # sequence holds then. Raises SequenceGone.
    with_cache: Callable[[Callable[[KVBlocks, int], int]], int]
    # Id, attempt and source, by which a peer that the sequence migrates from finds it.
    sequence: tuple[str, int, str] = ("", 0, "")
    peers: tuple[str, ...] = ()  # URLs of other instances of this stage that may hold it, the likeliest first
    draws_by_tokens: bool = False  # sampling needs token ids, and those after the chain are unknown here: do not fetch their KV
    deadline: float = math.inf  # time.monotonic(); the reservation's reply is due then

    @property
    def lacks_blocks(self) -> bool:
        return self.held < BLOCK_TOKENS * len(self.chain)


class Restore:
    """A sequence's restore, under way or over."""

    def __init__(self, wanted: ReserveRow, lineage: str | None, reserved: ReservedRow, over: "Future[ReservedRow]") -> None:
        """lineage: of the KV. reserved: the reply to `wanted` before the restore. over: the reply after it."""
        self.over = over
        self.told = False  # a reply has said that it is over
        self._wanted = wanted
        self._lineage = lineage
        self._reserved = reserved

    def answers(self, row: ReserveRow, lineage: str | None) -> bool:
        """Whether `row` is the same reservation, asked again. The peers to ask may have changed."""
        own = self._wanted
        same = (own.attempt, own.reserve_tokens, own.chain) == (row.attempt, row.reserve_tokens, row.chain)
        return same and lineage == self._lineage and not self.told

    def reply(self) -> ReservedRow:
        """The reply to the reservation by now, which says whether the restore is under way."""
        if not self.over.done():
            return replace(self._reserved, restoring=True)
        self.told = True
        return self.over.result()


class Tier(Protocol):
    """A place besides a stage's own memory that may hold a sequence's KV."""

    @property
    def name(self) -> str:
        """Name of the tier in metrics."""

    def restore(self, request: RestoreRequest) -> int:
        """Fetches KV into the sequence's memory. Returns how many tokens it holds then; `request.held` if nothing was found.

        Reservations call it from several threads at once. It ends by `request.deadline`. Raises SequenceGone.
        """


@dataclass(frozen=True, slots=True)
class Reuse:
    """A reservation found KV of some tokens in the prefix cache or a tier, so that they need not be computed."""

    tier: str  # its name, or MEMORY
    tokens: int
    saved_seconds: float  # expected time to compute the tokens, less the time of finding them; never negative


@dataclass(slots=True)
class ComputeRate:
    """Measures how many seconds this stage's layers take for one token of a prompt. Thread-safe."""

    seconds_per_token: float | None = None  # None before the first measurement

    def computed(self, tokens: int, seconds: float) -> None:
        """Counts one pass: how many tokens it computed, in how many seconds. Ignores passes with few tokens."""
        if tokens >= _FEWEST_TOKENS:
            self.seconds_per_token = smoothed(self.seconds_per_token, seconds / tokens)

    def seconds(self, tokens: int) -> float | None:
        """Expected time to compute the tokens; None before the first measurement."""
        return None if self.seconds_per_token is None else tokens * self.seconds_per_token

    def reuse(self, tier: str, tokens: int, seconds: float = 0.0) -> Reuse:
        """Describes a hit in `tier`. seconds: the time that finding the tokens took."""
        return Reuse(tier, tokens, max(0.0, (self.seconds(tokens) or 0.0) - seconds))


def smoothed(old: float | None, new: float) -> float:
    """The next value of an exponential moving average. old: the one before; None: `new` is the first."""
    return new if old is None else old + (new - old) * _SMOOTHING
