"""Whether it is worth to ask elsewhere for keys and values, and for how long: by what computing and fetching took lately."""

import threading
from typing import Final

_SMOOTHING: Final = 0.3
_FEWEST_TOKENS: Final = 32
"""A pass with fewer says nothing of how fast a prompt is computed."""
_RELAXED: Final = 1.25
"""Each time that fetching would have been slower it seems so much faster, so that it is tried again."""
LEAST_SECONDS: Final = 0.5
MOST_SECONDS: Final = 10.0
"""That a tier is waited for, also while nobody knows how long computing takes."""


class ComputeRate:
    """Seconds that a token of a prompt takes in this stage's layers. Thread-safe."""

    def __init__(self) -> None:
        self._seconds_per_token: float | None = None

    def computed(self, tokens: int, seconds: float) -> None:
        """One pass."""
        if tokens >= _FEWEST_TOKENS:
            self._seconds_per_token = _smoothed(self._seconds_per_token, seconds / tokens)

    def seconds(self, tokens: int) -> float | None:
        """What computing them would take; None: nobody knows yet."""
        return None if self._seconds_per_token is None else tokens * self._seconds_per_token


class Worth:
    """Of one tier. Thread-safe."""

    def __init__(self, rate: ComputeRate) -> None:
        self._rate = rate
        self._lock = threading.Lock()
        self._asking_seconds: float | None = None
        """What it takes to hear that something is not there."""
        self._seconds_per_token: float | None = None

    def patience(self, tokens: int) -> float | None:
        """How many seconds to wait at most for so many tokens; None: computing them is quicker."""
        computing = self._rate.seconds(tokens)
        if computing is None:
            return MOST_SECONDS
        with self._lock:
            fetching = max(self._asking_seconds or 0.0, tokens * (self._seconds_per_token or 0.0))
            if fetching > computing:
                self._asking_seconds = (self._asking_seconds or 0.0) / _RELAXED
                self._seconds_per_token = (self._seconds_per_token or 0.0) / _RELAXED
                return None
        return min(MOST_SECONDS, max(LEAST_SECONDS, computing))

    def fetched(self, tokens: int, seconds: float) -> None:
        """tokens: 0 where there was nothing."""
        with self._lock:
            if tokens:
                self._seconds_per_token = _smoothed(self._seconds_per_token, seconds / tokens)
            else:
                self._asking_seconds = _smoothed(self._asking_seconds, seconds)


def _smoothed(old: float | None, new: float) -> float:
    return new if old is None else old + (new - old) * _SMOOTHING
