"""How long a request may take, as queue-proxy and activator hold it (knative/serving, pkg/http/handler/timeout.go).

The clock runs from the request's arrival, so that waiting for a place or for a pod counts as well.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from http import HTTPStatus

from knative.local.http.messages import HttpError
from knative.local.http.server import Exchange


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Of a revision's template, under Knative's names. 0: none."""

    timeout_seconds: float
    response_start_timeout_seconds: float = 0.0
    idle_timeout_seconds: float = 0.0
    """Since the answer's last bytes, or the request's arrival where none have come."""

    def next_due(self, exchange: Exchange, began: float) -> float:
        """When the next of them is over, as things stand."""
        due = began + self.timeout_seconds
        if self.response_start_timeout_seconds and not exchange.started:
            due = min(due, began + self.response_start_timeout_seconds)
        if self.idle_timeout_seconds:
            due = min(due, (exchange.written_at or began) + self.idle_timeout_seconds)
        return due


@asynccontextmanager
async def in_time(exchange: Exchange, timeouts: Timeouts, text: str) -> AsyncIterator[None]:
    """Raises HttpError 504 with `text`. An answer that has begun ends with `text` for its last words, as Knative does it."""
    began = asyncio.get_running_loop().time()
    try:
        async with asyncio.timeout(None) as timer:
            watch = _Watch(timer, lambda: timeouts.next_due(exchange, began))
            try:
                yield
            finally:
                watch.handle.cancel()
    except TimeoutError as error:
        if not exchange.started:
            raise HttpError(HTTPStatus.GATEWAY_TIMEOUT, text) from error
        exchange.cut_short(text.encode())


class _Watch:
    """Ends `timer` when what is due next is over; what that is may have changed by the time it was expected."""

    def __init__(self, timer: asyncio.Timeout, next_due: Callable[[], float]) -> None:
        self._loop = asyncio.get_running_loop()
        self._timer = timer
        self._next_due = next_due
        self.handle = self._loop.call_at(next_due(), self._look)

    def _look(self) -> None:
        due = self._next_due()
        if due <= self._loop.time():
            self._timer.reschedule(due)
        else:
            self.handle = self._loop.call_at(due, self._look)
