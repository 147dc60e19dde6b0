"""The interface of tiers, and the estimate of how much time a hit saves.

A tier is a place outside the stage's memory that may hold the KV of a sequence: peers or the store (`functions/stage/kv`). KV
that no tier holds is computed, so answers never depend on tiers.
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
    """The sequence was released or began another attempt while a tier fetched KV for it. Stop fetching."""


@dataclass(frozen=True, slots=True)
class RestoreRequest:
    """A request to a tier: fetch the KV that a sequence with reserved memory lacks."""

    chain: Chain  # of the tokens whose KV is wanted; its digests include the lineage
    lineage: str  # of the KV
    held: int  # tokens of the chain that the stage holds already
    # Calls action(cache, handle of the sequence) on the engine's thread between two passes. Both functions return how many
    # tokens the sequence then holds. Raises SequenceGone.
    with_cache: Callable[[Callable[[KVBlocks, int], int]], int]
    # Id, attempt and source of the sequence. A peer that the sequence migrates from finds it by these.
    sequence: tuple[str, int, str] = ("", 0, "")
    peers: tuple[str, ...] = ()  # URLs of other instances of this stage that may hold it, the likeliest first
    draws_by_tokens: bool = False  # sampling needs token ids, and those after the chain are unknown here: do not fetch their KV
    deadline: float = math.inf  # time.monotonic(); the reservation's reply is due then

    @property
    def lacks_blocks(self) -> bool:
        return self.held < BLOCK_TOKENS * len(self.chain)


class Restore:
    """The restore of a sequence's KV from the tiers, either under way or over."""

    def __init__(self, wanted: ReserveRow, lineage: str | None, reserved: ReservedRow, over: "Future[ReservedRow]") -> None:
        """Describes the restore that serves the reservation `wanted`. lineage: of the KV.

        reserved: the reply to the reservation before the restore. over: a future of the reply after the restore.
        """
        self.over = over
        self.told = False  # whether a reply has already said that the restore is over
        self._wanted = wanted
        self._lineage = lineage
        self._reserved = reserved

    def answers(self, row: ReserveRow, lineage: str | None) -> bool:
        """Whether `row` repeats the reservation of this restore. The list of peers may differ."""
        own = self._wanted
        same = (own.attempt, own.reserve_tokens, own.chain) == (row.attempt, row.reserve_tokens, row.chain)
        return same and lineage == self._lineage and not self.told

    def reply(self) -> ReservedRow:
        """Returns the present reply to the reservation. Its `restoring` is true while the restore is under way."""
        if not self.over.done():
            return replace(self._reserved, restoring=True)
        self.told = True
        return self.over.result()


class Tier(Protocol):
    """A place outside the stage's own memory that may hold the KV of a sequence."""

    @property
    def name(self) -> str:
        """Name of the tier in metrics."""

    def restore(self, request: RestoreRequest) -> int:
        """Fetches KV into the memory of the sequence. Returns how many tokens the sequence then holds.

        Returns `request.held` if nothing was found. Must return by `request.deadline`. Several threads call this method at
        once. Raises SequenceGone.
        """


@dataclass(frozen=True, slots=True)
class Reuse:
    """A hit: a reservation found the KV of some tokens in the prefix cache or in a tier. For metrics."""

    tier: str  # its name, or MEMORY
    tokens: int
    saved_seconds: float  # expected time to compute the tokens, less the time of finding them; never negative


@dataclass(slots=True)
class ComputeRate:
    """Measures how many seconds this stage's layers take for one token of a prompt. Thread-safe."""

    seconds_per_token: float | None = None  # None before the first measurement

    def computed(self, tokens: int, seconds: float) -> None:
        """Counts one pass over `tokens`, which took `seconds`. Ignores passes with few tokens."""
        if tokens >= _FEWEST_TOKENS:
            self.seconds_per_token = smoothed(self.seconds_per_token, seconds / tokens)

    def seconds(self, tokens: int) -> float | None:
        """Returns the expected time to compute `tokens`. None before the first measurement."""
        return None if self.seconds_per_token is None else tokens * self.seconds_per_token

    def reuse(self, tier: str, tokens: int, seconds: float = 0.0) -> Reuse:
        """Returns the description of a hit in `tier`. seconds: how long it took to find the tokens."""
        return Reuse(tier, tokens, max(0.0, (self.seconds(tokens) or 0.0) - seconds))


def smoothed(old: float | None, new: float) -> float:
    """Returns the next value of an exponential moving average. If `old` is None, `new` is the first value."""
    return new if old is None else old + (new - old) * _SMOOTHING
