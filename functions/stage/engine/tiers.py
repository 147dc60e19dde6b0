"""Other places than this stage's memory where keys and values may lie: a peer, the store. None is needed for a right answer."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from eventing.wire.prefix_chain import Chain
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


class Tier(Protocol):
    name: str
    """As the label of metrics has it."""

    def restore(self, wanted: Wanted) -> int:
        """Tokens of the chain that are held afterwards, `wanted.held` where nothing was found.

        Called in the thread of a reservation, several at once, with nothing locked; it has a deadline of its own.
        """
