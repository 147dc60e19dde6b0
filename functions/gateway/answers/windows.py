"""Sliding minutes, by the package `limits`: counted in this process, or in a store that several gateways share."""

import logging
import math
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, TypeVar

if TYPE_CHECKING:
    from limits import RateLimitItem
    from limits.strategies import RateLimiter

_log: Final = logging.getLogger(__name__)
T = TypeVar("T")

_STORE_SECONDS: Final = 0.5
"""How long a request waits for the store."""
_ASK_AGAIN_SECONDS: Final = 5.0
"""How long nobody waits for one that did not answer."""


class Windows:
    """Thread-safe. `names` say whose minute of what it is.

    While the store does not answer, this process counts by itself: each gateway then lets a client ask all that it may ask.
    """

    def __init__(self, store: str | None = None) -> None:
        """store: None, or a URL as `limits` has them, such as redis://host:6379/0."""
        from limits.storage import MemoryStorage, storage_from_string
        from limits.strategies import SlidingWindowCounterRateLimiter

        self._here: RateLimiter = SlidingWindowCounterRateLimiter(MemoryStorage())
        self._shared: RateLimiter | None = None
        if store is not None:
            times = {"socket_timeout": _STORE_SECONDS, "socket_connect_timeout": _STORE_SECONDS}
            storage = storage_from_string(store, wrap_exceptions=True, **times)
            self._shared = SlidingWindowCounterRateLimiter(storage)
        self._lock = threading.Lock()
        self._ask_again_at = 0.0

    def test(self, limit: int, *names: str) -> bool:
        """Whether something is left."""
        return self._by(lambda limiter: limiter.test(_a_minute(limit), *names))

    def hit(self, limit: int, *names: str) -> bool:
        """Takes one, if one is left."""
        return self._by(lambda limiter: limiter.hit(_a_minute(limit), *names))

    def charge(self, limit: int, cost: int, *names: str) -> None:
        """Takes `cost`, or what is left where that is less."""

        def take(limiter: "RateLimiter") -> bool:
            left = limiter.get_window_stats(_a_minute(limit), *names).remaining
            return limiter.hit(_a_minute(limit), *names, cost=min(cost, left))

        self._by(take)

    def seconds_left(self, limit: int, *names: str) -> int:
        """Until something is left again."""
        reset = self._by(lambda limiter: limiter.get_window_stats(_a_minute(limit), *names).reset_time)
        return max(1, math.ceil(reset - time.time()))

    def _by(self, ask: "Callable[[RateLimiter], T]") -> T:
        from limits.errors import StorageError

        if self._shared is not None and time.monotonic() >= self._ask_again_at:
            try:
                return ask(self._shared)
            except StorageError as error:
                self._ask_again_at = time.monotonic() + _ASK_AGAIN_SECONDS
                kind = type(error.storage_error).__name__
                _log.warning("limits are counted by this gateway alone, their store does not answer (%s)", kind)
        # One at a time: what is left is read and taken in two steps.
        with self._lock:
            return ask(self._here)


def _a_minute(amount: int) -> "RateLimitItem":
    from limits import RateLimitItemPerMinute

    return RateLimitItemPerMinute(amount)
