"""The time limits of a request, as queue-proxy and activator apply them (knative/serving, pkg/http/handler/timeout.go).

The clock runs from the request's arrival, so that waiting for a slot or for a pod counts as well.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from http import HTTPStatus

from knative.local.http.messages import HttpError
from knative.local.http.server import Exchange


@dataclass(frozen=True, slots=True)
class Timeouts:
    """The time limits of a request, from a revision's template and under Knative's names. 0: no limit, for the last two."""

    timeout_seconds: float
    response_start_timeout_seconds: float = 0.0
    idle_timeout_seconds: float = 0.0  # since the answer's last bytes, or since the request's arrival before the first

    def next_due(self, exchange: Exchange, began: float) -> float:
        """When the first of the limits is reached if nothing more is sent.

        began: when the request arrived. Both times are by the event loop's clock.
        """
        due = began + self.timeout_seconds
        if self.response_start_timeout_seconds and not exchange.started:
            due = min(due, began + self.response_start_timeout_seconds)
        if self.idle_timeout_seconds:
            due = min(due, (exchange.written_at or began) + self.idle_timeout_seconds)
        return due


@asynccontextmanager
async def in_time(exchange: Exchange, timeouts: Timeouts, text: str) -> AsyncIterator[None]:
    """Ends its block at the first limit that is reached, and raises HttpError 504 with `text`.

    If the answer has begun, it ends with `text` as its last bytes instead, as in Knative.
    """
    loop = asyncio.get_running_loop()
    began = loop.time()
    try:
        async with asyncio.timeout(None) as timer:
            watch: asyncio.TimerHandle

            def check() -> None:
                nonlocal watch
                due = timeouts.next_due(exchange, began)
                if due <= loop.time():
                    timer.reschedule(due)
                else:  # bytes that were sent meanwhile may have moved the limit
                    watch = loop.call_at(due, check)

            watch = loop.call_at(timeouts.next_due(exchange, began), check)
            try:
                yield
            finally:
                watch.cancel()
    except TimeoutError as error:
        if not exchange.started:
            raise HttpError(HTTPStatus.GATEWAY_TIMEOUT, text) from error
        exchange.cut_short(text.encode())
