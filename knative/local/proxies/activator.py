"""The activator of one revision: holds requests while no pod can take them, and balances them over the pods that can.

Like Knative's it knows only the requests that it sent itself. With a containerConcurrency of 1 to 3 a request goes to the first
pod with a free slot, above that to the next such pod in round robin, without a limit to the less busy of two random pods.
"""

import asyncio
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus

from knative.local.http.messages import HttpError, find
from knative.local.http.server import THIS_MACHINE, Exchange
from knative.local.proxies.concurrency import ConcurrencyMeter
from knative.local.proxies.queue_proxy import ACTIVATOR, PROXY_HEADER, QueueProxy
from knative.local.proxies.timeouts import Timeouts, in_time

_FIRST_AVAILABLE_UP_TO = 3


@dataclass(slots=True, eq=False)
class _PodTracker:
    proxy: QueueProxy  # of a ready pod
    in_flight: int = 0  # requests from this activator


class Activator:
    """Forwards a revision's requests to its pods, and holds them while no pod has a free slot. For one event loop."""

    def __init__(self, container_concurrency: int, timeouts: Timeouts, queue_depth: int, wake: Callable[[], None]) -> None:
        """queue_depth: how many requests may be held; more get 503. wake: called when a request is held and no pod is ready.

        timeouts: the time in which a request is held counts.
        """
        self.meter = ConcurrencyMeter(asyncio.get_running_loop().time())
        self.in_path = True  # False: `serve` sends requests to the pods in round robin, and the queue-proxies report them
        self._limit = container_concurrency
        self._timeouts = timeouts
        self._queue_depth = queue_depth
        self._wake = wake
        self._trackers: list[_PodTracker] = []
        self._turn = 0
        self.waiting: deque[asyncio.Future[_PodTracker]] = deque()  # requests that are held

    def set_pods(self, proxies: list[QueueProxy]) -> None:
        """Replaces the pods that get requests, and hands out held ones. proxies: of the ready pods, oldest first."""
        known = {tracker.proxy: tracker for tracker in self._trackers}
        self._trackers = [known.get(proxy) or _PodTracker(proxy) for proxy in proxies]
        self._hand_out()

    def fail_waiting(self, reason: str) -> None:
        """Answers all held requests with 503 and `reason`, because the revision will not come up."""
        while self.waiting:
            waiter = self.waiting.popleft()
            if not waiter.done():
                waiter.set_exception(HttpError(HTTPStatus.SERVICE_UNAVAILABLE, reason))

    async def serve(self, exchange: Exchange) -> None:
        """Forwards a request to a pod, which it may have to wait for, and returns when it is answered.

        Raises HttpError: 504 if no pod took the request in time, 503 if too many requests wait, or the error of the
        queue-proxy.
        """
        if not self.in_path and self._trackers:
            await self._next_in_turn().proxy.serve(exchange)
            return
        if _answers_probe(exchange):
            return
        exchange.peers.append(THIS_MACHINE)
        others = [header for header in exchange.headers if header[0].lower() != PROXY_HEADER]
        exchange.headers = [*others, (PROXY_HEADER, ACTIVATOR)]
        with self.meter.counted():
            async with in_time(exchange, self._timeouts, "activator request timeout"):
                tracker = self._pick()
                if tracker is None:
                    tracker = await self._wait()
                else:
                    tracker.in_flight += 1
                try:
                    await tracker.proxy.serve(exchange)
                finally:
                    self._release(tracker)

    def _release(self, tracker: _PodTracker) -> None:
        tracker.in_flight -= 1
        self._hand_out()

    async def _wait(self) -> _PodTracker:
        """Holds a request until `_hand_out` gives it a pod and counts it in flight. Raises HttpError 503 if too many wait."""
        if len(self.waiting) >= self._queue_depth:
            raise HttpError(HTTPStatus.SERVICE_UNAVAILABLE, f"{self._queue_depth} requests wait for a pod already")
        waiter: asyncio.Future[_PodTracker] = asyncio.get_running_loop().create_future()
        self.waiting.append(waiter)
        if not self._trackers:
            self._wake()
        try:
            return await waiter
        except asyncio.CancelledError:
            if waiter in self.waiting:
                self.waiting.remove(waiter)
            elif waiter.done() and not waiter.cancelled() and waiter.exception() is None:
                self._release(waiter.result())  # a pod was handed out in the same moment
            raise

    def _hand_out(self) -> None:
        while self.waiting and (tracker := self._pick()) is not None:
            waiter = self.waiting.popleft()
            if not waiter.done():
                tracker.in_flight += 1
                waiter.set_result(tracker)

    def _pick(self) -> _PodTracker | None:
        """The pod that gets the next request; None if no pod has a free slot.

        Knative's policies: without a containerConcurrency the less busy of two random pods; up to 3 the first pod with a free
        slot; above 3 the next such pod in round robin.
        """
        if not self._limit:
            drawn = random.sample(self._trackers, 2) if len(self._trackers) > 1 else self._trackers
            return min(drawn, key=lambda tracker: tracker.in_flight, default=None)
        if self._limit <= _FIRST_AVAILABLE_UP_TO:
            return next((tracker for tracker in self._trackers if tracker.in_flight < self._limit), None)
        for _ in self._trackers:
            tracker = self._next_in_turn()
            if tracker.in_flight < self._limit:
                return tracker
        return None

    def _next_in_turn(self) -> _PodTracker:
        self._turn = (self._turn + 1) % len(self._trackers)
        return self._trackers[self._turn]


def _answers_probe(exchange: Exchange) -> bool:
    """Answers a request that the activator takes for a probe of itself; no pod sees it. False if it is none.

    See knative/serving, pkg/activator/handler/healthz_handler.go and probe_handler.go.
    """
    if find(exchange.headers, b"k-kubelet-probe") or (find(exchange.headers, b"user-agent") or b"").startswith(b"kube-probe/"):
        exchange.respond(HTTPStatus.OK, b"")
        return True
    probe = find(exchange.headers, b"k-network-probe")
    if not probe:
        return False
    if probe == ACTIVATOR:
        exchange.respond(HTTPStatus.OK, ACTIVATOR)
    else:
        exchange.respond(HTTPStatus.BAD_REQUEST, b"unexpected probe header value: " + probe)
    return True
