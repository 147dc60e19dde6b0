"""Limits of each client: requests and tokens a minute, budgets, concurrent answers, the longest answer, and priority.

A minute is a sliding window, counted by the package `limits`. A request is refused before it is tokenized, so a refused request
costs nothing else. An answer's tokens are counted when it ends, so a client that has any tokens left may begin one more answer.
Each gateway counts concurrent answers alone. It also counts requests and tokens alone, unless there is a store that all
gateways share.
"""

import math
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, TypeVar, cast

from eventing.problems import InvalidRequest, RateLimited
from functions.configuration.api_keys import Quota
from functions.gateway.answers.budgets import Budgets, LimitsStore, Period, seconds_left

if TYPE_CHECKING:
    from limits import RateLimitItem
    from limits.storage.base import SlidingWindowCounterSupport
    from limits.strategies import SlidingWindowCounterRateLimiter

T = TypeVar("T")

Release = Callable[[int], None]  # called when an answer ends, with the number of tokens of prompt and answer


@dataclass(eq=False)
class ClientLimits:
    """Admits requests that are within their client's limits, and counts what they use. Thread-safe."""

    default: Quota  # limits that hold where `quota_of` sets none
    quota_of: Callable[[str], Quota] = lambda _: Quota()  # of a client id
    store: str | None = None  # URL of a Redis in which all gateways count together; None: this process counts alone
    scope: str = ""  # prefix of the names in the store
    _windows: "SlidingWindows | None" = None
    _budgets: Budgets | None = None
    _running: Counter[str] = field(default_factory=Counter)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def quota(self, client_id: str) -> Quota:
        """Returns the client's own limits, completed by the default ones. None and 0 in them mean no limit."""
        return self.quota_of(client_id).over(self.default)

    def admit(self, client_id: str, answers: int = 1, *, in_background: bool = False) -> Release:
        """Admits one request for `answers` answers. The caller calls the returned function once for each answer, when it ends.

        If `in_background`, only the client's budgets count, because the gateway chooses when and how many such requests it
        answers. Raises RateLimited, or InvalidRequest if the request has more answers than the client may ever have at once.
        """
        quota = self.quota(client_id)
        if in_background:
            self._check_budget(client_id, quota)
            return lambda tokens: self._spend(client_id, tokens)
        if quota.concurrent and answers > quota.concurrent:
            raise InvalidRequest(
                f"{answers} answers of one request are more than the {quota.concurrent} that this client may have at once"
            )
        with self._lock:
            if quota.concurrent and self._running[client_id] + answers > quota.concurrent:
                raise RateLimited(f"{quota.concurrent} answers at once are what this client may have; wait for one of them")
            self._running[client_id] += answers
        try:
            self._count_request(client_id, quota)
        except BaseException:
            self._end(client_id, answers)
            raise
        return lambda tokens: self._release(client_id, tokens)

    def _count_request(self, client_id: str, quota: Quota) -> None:
        """Counts one request of the client. If the client's requests or tokens are used up, raises RateLimited instead."""
        self._check_budget(client_id, quota)
        for limit, unit in ((quota.tokens_per_minute, "tokens"), (quota.requests_per_minute, "requests")):
            if not limit:
                continue
            windows = self._counted()
            if not windows.allows(limit, self.scope, unit, client_id, counts=unit == "requests"):
                seconds = windows.seconds_left(limit, self.scope, unit, client_id)
                raise RateLimited(f"{limit} {unit} a minute are what this client may have; ask again in {seconds} s", seconds)

    def _check_budget(self, client_id: str, quota: Quota) -> None:
        limits: dict[Period, int | None] = {"day": quota.tokens_per_day, "month": quota.tokens_per_month}
        for period, limit in limits.items():
            if limit and (used := self._budgeted().used(client_id, period)) >= limit:
                seconds = seconds_left(period)
                raise RateLimited(
                    f"{limit} tokens a {period} are what this client may have, and {used} are used; ask again in {seconds} s, "
                    f"when the next {period} begins (UTC)",
                    seconds,
                )

    def _release(self, client_id: str, tokens: int) -> None:
        self._end(client_id, 1)
        quota = self.quota(client_id)
        if quota.tokens_per_minute and tokens:
            self._counted().charge(quota.tokens_per_minute, tokens, self.scope, "tokens", client_id)
        self._spend(client_id, tokens)

    def _spend(self, client_id: str, tokens: int) -> None:
        if tokens and self.quota(client_id).has_budget:
            self._budgeted().add(client_id, tokens)

    def _end(self, client_id: str, answers: int) -> None:
        with self._lock:
            self._running[client_id] -= answers
            if not self._running[client_id]:
                del self._running[client_id]

    def _counted(self) -> "SlidingWindows":
        """Returns the counters, which are made on first use.

        So a gateway without limits does not import the package `limits`.
        """
        with self._lock:
            if self._windows is None:
                self._windows = SlidingWindows(self.store)
            return self._windows

    def _budgeted(self) -> Budgets:
        with self._lock:
            if self._budgets is None:
                self._budgets = Budgets(self.store)
            return self._budgets


class SlidingWindows:
    """Counters of the last minute's requests and tokens of each client, in this process or in a store that gateways share.

    In all methods `limit` is the highest count that is allowed in a minute, and `names` identify the counter: scope, unit and
    client. While the store does not answer, this process counts alone: a client gets its limit at each gateway. Thread-safe.
    """

    def __init__(self, store: str | None = None) -> None:
        """`store` is a URL, as for LimitsStore. If it is None, this process counts alone."""
        from limits.storage import MemoryStorage
        from limits.strategies import SlidingWindowCounterRateLimiter

        self._store = None if store is None else LimitsStore(store, "limits are counted by this gateway alone")
        self._shared = None if self._store is None else SlidingWindowCounterRateLimiter(self._store.storage)
        self._local = SlidingWindowCounterRateLimiter(MemoryStorage())
        self._lock = threading.Lock()

    def allows(self, limit: int, *names: str, counts: bool) -> bool:
        """Returns whether a counter of the last minute is below `limit`. If it is and `counts` is true, adds one to it."""
        return self._ask(lambda limiter: (limiter.hit if counts else limiter.test)(_a_minute(limit), *names))

    def charge(self, limit: int, cost: int, *names: str) -> None:
        """Adds `cost` to a counter of the last minute, but never so much that it exceeds `limit`.

        The package `limits` would refuse a larger cost and add nothing.
        """

        def take(limiter: "SlidingWindowCounterRateLimiter") -> None:
            taken = False
            while not taken:  # another gateway may count between the two calls, and then less is left
                left = limiter.get_window_stats(_a_minute(limit), *names).remaining
                taken = not left or limiter.hit(_a_minute(limit), *names, cost=min(cost, left))

        self._ask(take)

    def seconds_left(self, limit: int, *names: str) -> int:
        """Returns the seconds, at least 1, until a counter that has reached `limit` is below it, if nothing else is counted.

        The counter is the count of this minute plus a share of the count of the minute before. The share is the part of that
        minute that is less than a minute ago.
        """
        item = _a_minute(limit)

        def until_below(limiter: "SlidingWindowCounterRateLimiter") -> float:
            storage = cast("SlidingWindowCounterSupport", limiter.storage)
            expiry = item.get_expiry()
            before, before_left, now, now_left = storage.get_sliding_window(item.key_for(*names), expiry)
            if now < limit:
                return before_left - (limit - now) * expiry / before if before else 0.0
            return now_left - expiry  # a counter is kept for two minutes; in the second one it fades

        return max(1, math.ceil(self._ask(until_below)))

    def _ask(self, ask: "Callable[[SlidingWindowCounterRateLimiter], T]") -> T:
        if self._store is not None and self._shared is not None:
            with suppress(ConnectionError):
                return self._store.ask(partial(ask, self._shared))
        with self._lock:  # `charge` reads and takes in two steps
            return ask(self._local)


def _a_minute(amount: int) -> "RateLimitItem":
    from limits import RateLimitItemPerMinute

    return RateLimitItemPerMinute(amount)
