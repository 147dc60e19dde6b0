"""Counts requests for the autoscaler, in queue-proxy and activator: arrivals, and how many were in flight on average."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ConcurrencyReport:
    """The requests since the previous report."""

    average: float  # requests in flight, weighted by time
    arrivals: int


class ConcurrencyMeter:
    """Counts requests in flight. `now` is in seconds of a monotonic clock."""

    def __init__(self, now: float) -> None:
        self.in_flight = 0
        self.last_arrival = now
        self._since = self._changed = now
        self._weighted = 0.0
        self._arrivals = 0

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Counts one request for the block, by the event loop's clock."""
        clock = asyncio.get_running_loop().time
        self.enter(clock())
        try:
            yield
        finally:
            self.leave(clock())

    def enter(self, now: float) -> None:
        self._advance(now)
        self.in_flight += 1
        self._arrivals += 1
        self.last_arrival = now

    def leave(self, now: float) -> None:
        self._advance(now)
        self.in_flight -= 1

    def report(self, now: float) -> ConcurrencyReport:
        """Reports the time since the previous report and begins the next one. Requests that still run count in the average."""
        self._advance(now)
        seconds = now - self._since
        average = self._weighted / seconds if seconds > 0 else float(self.in_flight)
        report = ConcurrencyReport(average, self._arrivals)
        self._since, self._weighted, self._arrivals = now, 0.0, 0
        return report

    def _advance(self, now: float) -> None:
        self._weighted += self.in_flight * (now - self._changed)
        self._changed = now
