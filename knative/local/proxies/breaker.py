"""queue-proxy's breaker: containerConcurrency requests at once, ten times as many waiting, the rest refused."""

import asyncio
from collections import deque
from http import HTTPStatus
from types import TracebackType
from typing import Final

from knative.local.http.messages import HttpError

_QUEUE_FACTOR: Final = 10


class Breaker:
    """`async with breaker:` holds one of the places, waiting for it in order of arrival."""

    def __init__(self, container_concurrency: int) -> None:
        """container_concurrency: 0 is without limit."""
        self._limit = container_concurrency
        self._running = 0
        self._waiting: deque[asyncio.Future[None]] = deque()

    async def __aenter__(self) -> None:
        """Raises HttpError 503 where too many wait already."""
        if not self._limit or (self._running < self._limit and not self._waiting):
            self._running += 1
            return
        if len(self._waiting) >= _QUEUE_FACTOR * self._limit:
            raise HttpError(HTTPStatus.SERVICE_UNAVAILABLE, "pending request queue full")
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(place)
        try:
            await place
        except asyncio.CancelledError:
            if place.done() and not place.cancelled():
                self._hand_on()
            elif place in self._waiting:  # else it was passed over in the same moment
                self._waiting.remove(place)
            raise

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hand_on()

    def _hand_on(self) -> None:
        """The place goes to who waits longest, or becomes free."""
        while self._waiting:
            place = self._waiting.popleft()
            if not place.done():
                place.set_result(None)
                return
        self._running -= 1
