"""What one client may ask: requests and tokens a minute, answers at once. Counted in this gateway alone.

Windows slide, so that no minute has more than its share, whenever it begins. A request that is refused costs nothing else: it
is refused before it is tokenized. Tokens are known when an answer has ended, so that who has some left may begin one more.
"""

import math
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from eventing.problems import RateLimited

if TYPE_CHECKING:
    from limits import RateLimitItem
    from limits.strategies import RateLimiter

Leave = Callable[[int], None]
"""Ends an answer, which took so many tokens, prompt and all."""


@dataclass(frozen=True, slots=True)
class Allowance:
    """Of each client; None: without a limit."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrent: int | None = None


class ClientLimits:
    """Thread-safe."""

    def __init__(self, allowance: Allowance) -> None:
        self._allowance = allowance
        self._windows = _Windows() if allowance.requests_per_minute or allowance.tokens_per_minute else None
        self._running: Counter[str] = Counter()
        self._lock = threading.Lock()

    def enter(self, client_id: str, answers: int = 1) -> Leave:
        """With one request for so many answers; whoever enters calls the returned, once for each. Raises RateLimited."""
        allowed = self._allowance
        with self._lock:
            if allowed.concurrent is not None and self._running[client_id] + answers > allowed.concurrent:
                raise RateLimited(f"{allowed.concurrent} answers at once are what this client may have; wait for one of them")
            if self._windows is not None:
                self._windows.take(client_id, allowed)
            self._running[client_id] += answers
        return lambda tokens: self._leave(client_id, tokens)

    def _leave(self, client_id: str, tokens: int) -> None:
        with self._lock:
            self._running[client_id] -= 1
            if not self._running[client_id]:
                del self._running[client_id]
            if self._windows is not None and self._allowance.tokens_per_minute and tokens:
                self._windows.charge(client_id, self._allowance.tokens_per_minute, tokens)


class _Windows:
    """By the package `limits`."""

    def __init__(self) -> None:
        from limits.storage import MemoryStorage
        from limits.strategies import SlidingWindowCounterRateLimiter

        self._limiter: Final[RateLimiter] = SlidingWindowCounterRateLimiter(MemoryStorage())

    def take(self, client_id: str, allowed: Allowance) -> None:
        """One request, if there are tokens left, too. Raises RateLimited, and takes nothing then."""
        if (tokens := allowed.tokens_per_minute) is not None and not self._limiter.test(_a_minute(tokens), "tokens", client_id):
            raise self._refusal(_a_minute(tokens), "tokens", client_id)
        if (most := allowed.requests_per_minute) is not None and not self._limiter.hit(_a_minute(most), "requests", client_id):
            raise self._refusal(_a_minute(most), "requests", client_id)

    def charge(self, client_id: str, limit: int, tokens: int) -> None:
        """An answer may have taken more than was left: then all of it is gone."""
        left = self._limiter.get_window_stats(_a_minute(limit), "tokens", client_id).remaining
        self._limiter.hit(_a_minute(limit), "tokens", client_id, cost=min(tokens, left))

    def _refusal(self, limit: "RateLimitItem", what: str, client_id: str) -> RateLimited:
        reset = self._limiter.get_window_stats(limit, what, client_id).reset_time
        seconds = max(1, math.ceil(reset - time.time()))
        return RateLimited(f"{limit.amount} {what} a minute are what this client may have; ask again in {seconds} s", seconds)


def _a_minute(amount: int) -> "RateLimitItem":
    from limits import RateLimitItemPerMinute

    return RateLimitItemPerMinute(amount)
