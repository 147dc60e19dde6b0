"""Other places than this stage's memory where keys and values may lie: a peer, the store. None is needed for a right answer."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol, Self

from eventing.wire.prefix_chain import BLOCK_TOKENS, Chain
from functions.stage.models.kv_ranges import KVRanges


class Gone(Exception):
    """The sequence was released, or began another attempt, while a tier was asked for what it wants."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a sequence with a reservation does not hold yet."""

    chain: Chain
    held: int
    """Tokens of it that memory had."""
    at: Callable[[Callable[[KVRanges, int], int]], int]
    """Runs an action with the cache and the sequence's handle on the engine's thread, between two passes, and returns what that
    returns: tokens held by then. Raises Gone."""
    sequence: tuple[str, int, str] = ("", 0, "")
    """Its id, attempt and source, by which a peer knows it that it moves away from."""
    peers: tuple[str, ...] = ()
    """URLs of other instances of this stage that may hold it, the likeliest first."""
    draws_by_tokens: bool = False
    """What it draws depends on which tokens it has, and those behind its chain are not known here: they must be computed."""

    until: float = math.inf
    """In time.monotonic(): who made the reservation waits no longer for all of its rows."""

    @property
    def lacks_blocks(self) -> bool:
        """Of its chain."""
        return self.held < BLOCK_TOKENS * len(self.chain)

    def holding(self, held: int) -> Self:
        return replace(self, held=held)


class Tier(Protocol):
    @property
    def name(self) -> str:
        """As the label of metrics has it."""

    def restore(self, wanted: Wanted) -> int:
        """Tokens of the chain that are held afterwards, `wanted.held` where nothing was found.

        Called in the thread of a reservation, several at once, with nothing locked; it has a deadline of its own.
        """
