"""Tiers of keys and values besides a stage's own memory: their interface, and how much time a hit saves.

A tier is a peer or the store (`functions/stage/kv`). No tier is ever needed for a right answer.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Protocol

from eventing.wire.prefix_chain import BLOCK_TOKENS, Chain
from functions.stage.models.kv_cache import KVRanges

MEMORY: Final = "memory"  # name of the first tier, the prefix cache in the stage's own memory
_FEWEST_TOKENS: Final = 32  # a pass with fewer says nothing about the speed of prefill
_SMOOTHING: Final = 0.3


class SequenceGone(Exception):
    """The sequence was released, or began another attempt, while a tier was asked for its keys and values."""


@dataclass(frozen=True, slots=True)
class RestoreRequest:
    """Asks a tier for the keys and values that a sequence with a reservation lacks."""

    chain: Chain
    held: int  # tokens of the chain that the stage holds already
    # Runs an action with the cache and the sequence's handle, on the engine's thread between two passes. Returns the action's
    # result, the tokens held afterwards. Raises SequenceGone.
    with_cache: Callable[[Callable[[KVRanges, int], int]], int]
    sequence: tuple[str, int, str] = ("", 0, "")  # id, attempt and source, by which a peer that the sequence leaves knows it
    peers: tuple[str, ...] = ()  # URLs of other instances of this stage that may hold it, the likeliest first
    draws_by_tokens: bool = False  # sampling depends on token ids, which are unknown here after the chain: compute those
    deadline: float = math.inf  # time.monotonic(); the reservation's reply is due then

    @property
    def lacks_blocks(self) -> bool:
        return self.held < BLOCK_TOKENS * len(self.chain)


class Tier(Protocol):
    @property
    def name(self) -> str:
        """Label in metrics."""

    def restore(self, request: RestoreRequest) -> int:
        """Tokens of the chain held afterwards; `request.held` if nothing was found. Raises SequenceGone.

        Called in the thread of a reservation, several at once, without locks. A tier has a time limit of its own.
        """


@dataclass(frozen=True, slots=True)
class Reuse:
    """A reservation found tokens in a tier, which need not be computed."""

    tier: str
    tokens: int
    saved_seconds: float


class ComputeRate:
    """Measures how many seconds this stage's layers take for one token of a prompt. Thread-safe."""

    def __init__(self) -> None:
        self._seconds_per_token: float | None = None

    def computed(self, tokens: int, seconds: float) -> None:
        """Takes one pass into account."""
        if tokens >= _FEWEST_TOKENS:
            self._seconds_per_token = smoothed(self._seconds_per_token, seconds / tokens)

    def seconds(self, tokens: int) -> float | None:
        """Expected time to compute the tokens; None before the first measurement."""
        return None if self._seconds_per_token is None else tokens * self._seconds_per_token

    def reuse(self, tier: str, tokens: int, seconds: float = 0.0) -> Reuse:
        """seconds: the time that finding the tokens took."""
        return Reuse(tier, tokens, max(0.0, (self.seconds(tokens) or 0.0) - seconds))


def smoothed(old: float | None, new: float) -> float:
    """Moving average, None before the first value."""
    return new if old is None else old + (new - old) * _SMOOTHING
