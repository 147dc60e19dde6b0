"""Budgets of clients: tokens per calendar day and month (UTC), counted in a store that all gateways share."""

import logging
import math
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import TYPE_CHECKING, Final, Literal, TypeVar

if TYPE_CHECKING:
    from limits.storage import Storage

_log: Final = logging.getLogger(__name__)

T = TypeVar("T")
Period = Literal["day", "month"]
PERIODS: Final[tuple[Period, ...]] = ("day", "month")

STORE_RETRY_SECONDS: Final = 5.0  # after a failure of the store, the time without requests to it
_STORE_TIMEOUT_SECONDS: Final = 0.5
_DAY_SECONDS: Final = 86_400
_KEPT_SECONDS: Final = {"day": 2 * _DAY_SECONDS, "month": 62 * _DAY_SECONDS}
_MAX_COUNTERS: Final = 65_536  # that are in memory


class LimitsStore:
    """Access to counters in a store. After a failure, the store is not asked for STORE_RETRY_SECONDS. Thread-safe."""

    def __init__(self, url: str | None, meanwhile: str) -> None:
        """Does not connect yet. `url` is that of a Redis, such as redis://host:6379/0.

        If `url` is None, the counters are in this process. `meanwhile` says, for the log, what happens while the store does not
        answer.
        """
        from limits.storage import MemoryStorage, storage_from_string

        timeouts = {"socket_timeout": _STORE_TIMEOUT_SECONDS, "socket_connect_timeout": _STORE_TIMEOUT_SECONDS}
        found = MemoryStorage() if url is None else storage_from_string(url, wrap_exceptions=True, **timeouts)
        self.storage: Storage = found  # type: ignore[assignment]
        self._meanwhile = meanwhile
        self._retry_at = 0.0

    def ask(self, ask: Callable[[], T]) -> T:
        """Calls `ask`, a function that uses `storage`, and returns its result.

        Raises ConnectionError if the store does not answer, or has failed within the last STORE_RETRY_SECONDS.
        """
        from limits.errors import StorageError

        if time.monotonic() < self._retry_at:
            raise ConnectionError("the limits store did not answer a moment ago")
        try:
            return ask()
        except StorageError as error:
            self._retry_at = time.monotonic() + STORE_RETRY_SECONDS
            kind = type(error.storage_error).__name__
            _log.warning("%s, their store does not answer (%s)", self._meanwhile, kind)
            raise ConnectionError(f"the limits store does not answer ({kind})") from error


class Budgets:
    """Counts the tokens of each client in this day and month, together with all gateways that use the store. Thread-safe.

    While the store does not answer, a gateway continues from the counts that it read last and adds its own tokens. It writes
    these when the store is back. So a client may exceed its budget by what it uses at other gateways meanwhile. A gateway that
    starts meanwhile begins at 0. A gateway that stops meanwhile loses the tokens that it could not write.
    """

    def __init__(self, store: str | None) -> None:
        """`store` is a URL, or None, as for LimitsStore."""
        self._store = LimitsStore(store, "budgets go on from the last counts")
        self._known: dict[str, int] = {}  # counts in the store, as they were last seen
        self._unwritten: dict[str, tuple[int, int]] = {}  # by counter: tokens, and for how many seconds the store keeps it
        self._lock = threading.Lock()

    def used(self, client_id: str, period: Period) -> int:
        """Returns the tokens of this client in the current period, as far as this gateway knows."""
        try:
            return self.read(client_id, period)
        except ConnectionError:
            counter = _counter(client_id, period)
            with self._lock:
                return self._known.get(counter, 0) + self._unwritten.get(counter, (0, 0))[0]

    def read(self, client_id: str, period: Period) -> int:
        """Returns the same as `used`, but raises ConnectionError instead of using old counts if the store does not answer."""
        self._write()
        counter = _counter(client_id, period)
        return self._ask(counter, lambda: self._store.storage.get(counter))

    def add(self, client_id: str, tokens: int) -> None:
        with self._lock:
            for period in PERIODS:
                counter = _counter(client_id, period)
                if len(self._unwritten) >= _MAX_COUNTERS:
                    del self._unwritten[next(iter(self._unwritten))]
                self._unwritten[counter] = (self._unwritten.get(counter, (0, 0))[0] + tokens, _KEPT_SECONDS[period])
        with suppress(ConnectionError):
            self._write()

    def _write(self) -> None:
        """Adds the tokens that are not written yet to the store's counts. Raises ConnectionError."""
        while self._unwritten:
            with self._lock:
                if not self._unwritten:
                    return
                counter, (tokens, kept_seconds) = self._unwritten.popitem()
            try:
                self._ask(counter, partial(self._store.storage.incr, counter, kept_seconds, tokens))
            except ConnectionError:
                with self._lock:
                    self._unwritten[counter] = (self._unwritten.get(counter, (0, 0))[0] + tokens, kept_seconds)
                raise

    def _ask(self, counter: str, ask: Callable[[], int]) -> int:
        """Calls `ask` for the counter's count in the store, remembers the count, and returns it. Raises ConnectionError."""
        count = int(self._store.ask(ask))
        with self._lock:
            if len(self._known) >= _MAX_COUNTERS:
                self._known.clear()
            self._known[counter] = count
        return count


def seconds_left(period: Period) -> int:
    """Returns the seconds, at least 1, until the next day or month begins."""
    now = datetime.fromtimestamp(time.time(), UTC)
    midnight = now.replace(hour=0, minute=0, second=0, microsecond=0)
    begins = midnight + timedelta(days=1) if period == "day" else (midnight.replace(day=1) + timedelta(days=32)).replace(day=1)
    return max(1, math.ceil((begins - now).total_seconds()))


def _counter(client_id: str, period: Period) -> str:
    now = datetime.fromtimestamp(time.time(), UTC)
    return f"lamina budget {client_id} {now:%Y-%m-%d}" if period == "day" else f"lamina budget {client_id} {now:%Y-%m}"
