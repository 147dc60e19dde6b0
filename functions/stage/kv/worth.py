"""Whether it is worth to ask elsewhere for keys and values, and for how long: by what computing and fetching took lately."""

import threading
from typing import Final

from functions.stage.engine.reuse import ComputeRate, smoothed

_RELAXED: Final = 1.25
"""Each time that fetching would have been slower it seems so much faster, so that it is tried again."""
_ENOUGH_TOKENS: Final = 256
"""Of which a rate can be told; what fewer took is mostly asking."""
LEAST_SECONDS: Final = 0.5
MOST_SECONDS: Final = 10.0
"""That a tier is waited for, also while nobody knows how long computing takes."""


class Worth:
    """Of one tier. Thread-safe."""

    def __init__(self, rate: ComputeRate) -> None:
        self._rate = rate
        self._lock = threading.Lock()
        self._asking_seconds: float | None = None
        """What it takes to hear that something is not there, or to get a little."""
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
            if tokens >= _ENOUGH_TOKENS:
                self._seconds_per_token = smoothed(self._seconds_per_token, seconds / tokens)
            else:
                self._asking_seconds = smoothed(self._asking_seconds, seconds)
