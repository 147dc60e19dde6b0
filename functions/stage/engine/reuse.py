"""What finding keys and values is worth: they need not be computed, at the rate at which this stage computes."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

MEMORY: Final = "memory"
"""The first of the tiers, which `Remembered` is."""
_FEWEST_TOKENS: Final = 32
"""A pass with fewer says nothing of how fast a prompt is computed."""
_SMOOTHING: Final = 0.3


@dataclass(frozen=True, slots=True)
class Reuse:
    """A reservation found tokens in a tier that it would have had to compute."""

    tier: str
    tokens: int
    saved_seconds: float


OnReuse = Callable[[Reuse], None]


class ComputeRate:
    """Seconds that a token of a prompt takes in this stage's layers. Thread-safe."""

    def __init__(self) -> None:
        self._seconds_per_token: float | None = None

    def computed(self, tokens: int, seconds: float) -> None:
        """One pass."""
        if tokens >= _FEWEST_TOKENS:
            self._seconds_per_token = smoothed(self._seconds_per_token, seconds / tokens)

    def seconds(self, tokens: int) -> float | None:
        """What computing them would take; None: nobody knows yet."""
        return None if self._seconds_per_token is None else tokens * self._seconds_per_token

    def reuse(self, tier: str, tokens: int, seconds: float = 0.0) -> Reuse:
        """seconds: that finding them took."""
        return Reuse(tier, tokens, max(0.0, (self.seconds(tokens) or 0.0) - seconds))


def smoothed(old: float | None, new: float) -> float:
    return new if old is None else old + (new - old) * _SMOOTHING
