"""The activator of one revision: holds requests while no pod can take them, and spreads them over those that can.

Like Knative's it knows only what it sent itself: with a containerConcurrency of 1 to 3 the first pod with room is taken,
above that they take turns, and without a limit the less busy of two drawn at random gets the request.
"""

import asyncio
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus

from knative.local.http.messages import HttpError
from knative.local.http.server import Exchange
from knative.local.proxies.concurrency import ConcurrencyMeter
from knative.local.proxies.queue_proxy import QueueProxy
from knative.local.proxies.timeouts import Timeouts, in_time

_FIRST_AVAILABLE_UP_TO = 3


@dataclass(slots=True, eq=False)
class _Tracker:
    """A ready pod, and how many of its requests came from here."""

    proxy: QueueProxy
    in_flight: int = 0


class Activator:
    """`serve` is the only way into a revision for those who do not know its pods."""

    def __init__(self, container_concurrency: int, timeouts: Timeouts, queue_depth: int, wake: Callable[[], None]) -> None:
        """wake: called when a request finds no pod at all. timeouts: being held counts."""
        self.meter = ConcurrencyMeter(asyncio.get_running_loop().time())
        self.in_path = True
        """False: the ingress sends requests to the pods in turn, and they are the pods' to report."""
        self._limit = container_concurrency
        self._timeouts = timeouts
        self._queue_depth = queue_depth
        self._wake = wake
        self._trackers: list[_Tracker] = []
        self._turn = 0
        self._waiting: deque[asyncio.Future[_Tracker]] = deque()

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def set_pods(self, proxies: list[QueueProxy]) -> None:
        """The ready pods, oldest first. Requests that wait are handed out to new ones at once."""
        known = {tracker.proxy: tracker for tracker in self._trackers}
        self._trackers = [known.get(proxy) or _Tracker(proxy) for proxy in proxies]
        self._hand_out()

    def fail_waiting(self, reason: str) -> None:
        """503 for all that are held: the revision will not come up."""
        while self._waiting:
            place = self._waiting.popleft()
            if not place.done():
                place.set_exception(HttpError(HTTPStatus.SERVICE_UNAVAILABLE, reason))

    async def serve(self, exchange: Exchange) -> None:
        """Raises HttpError: 504 where no pod took the request in time, 503 where too many wait, or what queue-proxy raises."""
        if not self.in_path and self._trackers:
            await self._next_in_turn().proxy.serve(exchange)
            return
        clock = asyncio.get_running_loop().time
        self.meter.enter(clock())
        try:
            async with in_time(exchange, self._timeouts, "activator request timeout"):
                tracker = await self._acquire()
                try:
                    await tracker.proxy.serve_proxied(exchange)
                finally:
                    self._release(tracker)
        finally:
            self.meter.leave(clock())

    async def _acquire(self) -> _Tracker:
        tracker = self._pick()
        if tracker is None:
            return await self._wait()
        tracker.in_flight += 1
        return tracker

    def _release(self, tracker: _Tracker) -> None:
        tracker.in_flight -= 1
        self._hand_out()

    async def _wait(self) -> _Tracker:
        if len(self._waiting) >= self._queue_depth:
            raise HttpError(HTTPStatus.SERVICE_UNAVAILABLE, f"{self._queue_depth} requests wait for a pod already")
        place: asyncio.Future[_Tracker] = asyncio.get_running_loop().create_future()
        self._waiting.append(place)
        if not self._trackers:
            self._wake()
        try:
            return await place
        except asyncio.CancelledError:
            self._give_up(place)
            raise

    def _give_up(self, place: asyncio.Future[_Tracker]) -> None:
        if place in self._waiting:
            self._waiting.remove(place)
        elif place.done() and not place.cancelled() and place.exception() is None:
            self._release(place.result())  # handed out in the same moment

    def _hand_out(self) -> None:
        while self._waiting:
            tracker = self._pick()
            if tracker is None:
                return
            place = self._waiting.popleft()
            if not place.done():
                tracker.in_flight += 1
                place.set_result(tracker)

    def _pick(self) -> _Tracker | None:
        """A pod with room, by Knative's policy for this containerConcurrency."""
        if not self._limit:
            return self._less_busy_of_two()
        if self._limit <= _FIRST_AVAILABLE_UP_TO:
            return next((tracker for tracker in self._trackers if tracker.in_flight < self._limit), None)
        for _ in self._trackers:
            tracker = self._next_in_turn()
            if tracker.in_flight < self._limit:
                return tracker
        return None

    def _next_in_turn(self) -> _Tracker:
        self._turn = (self._turn + 1) % len(self._trackers)
        return self._trackers[self._turn]

    def _less_busy_of_two(self) -> _Tracker | None:
        if len(self._trackers) < 2:
            return self._trackers[0] if self._trackers else None
        return min(random.sample(self._trackers, 2), key=lambda tracker: tracker.in_flight)
