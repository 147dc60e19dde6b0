"""How many events are at an instance, over time: what its autoscaler calls concurrency, as far as it is this gateway's.

Weighted by time, as queue-proxy counts requests (knative/serving pkg/http/stats).
"""

import threading
import time


class InFlight:
    """A context manager around each event. Thread-safe, with a lock of its own."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._now = 0
        self._seconds = 0.0
        self._since = time.monotonic()

    def __enter__(self) -> None:
        self._change(1)

    def __exit__(self, *_: object) -> None:
        self._change(-1)

    def event_seconds(self) -> float:
        """Of all events together until now: the difference of two readings, by the time between them, is the concurrency."""
        return self._change(0)

    def _change(self, by: int) -> float:
        with self._lock:
            now = time.monotonic()
            self._seconds += self._now * (now - self._since)
            self._since = now
            self._now += by
            return self._seconds
