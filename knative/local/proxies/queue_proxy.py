"""One pod's queue-proxy: every request to the function passes it, through the activator or straight to its port.

It counts, holds containerConcurrency, bounds how long an answer may take, and stays while its pod drains.
"""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from typing import Final

from knative.local.http.client import REFUSED, UpstreamFailed, UpstreamPool
from knative.local.http.messages import Headers, HttpError, find
from knative.local.http.server import THIS_MACHINE, Exchange, HttpServer
from knative.local.proxies.breaker import Breaker
from knative.local.proxies.concurrency import ConcurrencyMeter, Report
from knative.local.proxies.full_duplex import broken_off
from knative.local.proxies.network import Network, Relay
from knative.local.proxies.timeouts import Timeouts, in_time

_log = logging.getLogger(__name__)

_PROBE: Final = (b"k-network-probe", b"queue")
"""A request with this header asks queue-proxy whether the pod is ready, and is counted as none."""


@dataclass(frozen=True, slots=True)
class RequestLimits:
    """Of a revision's template, under Knative's names."""

    container_concurrency: int
    timeouts: Timeouts
    full_duplex: bool = False


class QueueProxy:
    """Stands for `podIP:8012`: a port of its own on 127.0.0.1."""

    def __init__(self, limits: RequestLimits, ready: Callable[[], bool] = lambda: True, network: Network | None = None) -> None:
        """network: between whoever connects to the port and this pod; None: loopback as it is."""
        now = asyncio.get_running_loop().time()
        self.all = ConcurrencyMeter(now)
        self.proxied = ConcurrencyMeter(now)
        """Those that came through the activator, which reports them itself."""
        self._limits = limits
        self._ready = ready
        self._breaker = Breaker(limits.container_concurrency)
        self._upstream: UpstreamPool | None = None
        self._server = HttpServer(self._direct)
        self._relay = None if network is None or network.is_loopback else Relay(network)

    @property
    def port(self) -> int:
        return self._server.port if self._relay is None else self._relay.port

    @property
    def function_port(self) -> int | None:
        return None if self._upstream is None else self._upstream.port

    async def start(self) -> None:
        await self._server.start()
        if self._relay is not None:
            await self._relay.start(self._server.port)

    def connect(self, port: int | None) -> None:
        """Where the function listens; None while there is none. What runs on the old connections breaks."""
        if self._upstream is not None:
            self._upstream.close()
        self._upstream = None if port is None else UpstreamPool(port, self._answer_begins)

    def close(self) -> None:
        self.connect(None)
        self._server.close()
        if self._relay is not None:
            self._relay.close()

    async def serve(self, exchange: Exchange) -> None:
        """Raises HttpError: 503 queue full, 502 no function behind, 504 no answer in time."""
        clock = asyncio.get_running_loop().time
        self.all.enter(clock())
        try:
            async with in_time(exchange, self._limits.timeouts, "request timeout"), self._breaker:
                await self._forward(exchange)
        finally:
            self.all.leave(clock())

    async def serve_proxied(self, exchange: Exchange) -> None:
        """For the activator, which is a proxy on the way of its own."""
        exchange.seen_from.append(THIS_MACHINE)
        clock = asyncio.get_running_loop().time
        self.proxied.enter(clock())
        try:
            await self.serve(exchange)
        finally:
            self.proxied.leave(clock())

    def report(self, now: float) -> Report:
        """What the autoscaler scrapes: without the activator's share, which it hears of from there."""
        everything, proxied = self.all.report(now), self.proxied.report(now)
        return Report(max(0.0, everything.average - proxied.average), everything.arrivals - proxied.arrivals)

    async def quiet(self, seconds: float) -> None:
        """Returns once no new request came for so long, counted from now."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        while (left := max(began, self.all.last_arrival) + seconds - loop.time()) > 0:
            await asyncio.sleep(left)

    async def _direct(self, exchange: Exchange) -> None:
        name, value = _PROBE
        if find(exchange.headers, name) == value:
            status = HTTPStatus.OK if self._ready() else HTTPStatus.SERVICE_UNAVAILABLE
            exchange.respond(status, value if status is HTTPStatus.OK else b"")
            return
        await self.serve(exchange)

    async def _forward(self, exchange: Exchange) -> None:
        if self._upstream is None:
            raise HttpError(HTTPStatus.BAD_GATEWAY, f"dial tcp 127.0.0.1: {REFUSED}")
        try:
            await self._upstream.forward(exchange)
        except UpstreamFailed as error:
            raise HttpError(HTTPStatus.BAD_GATEWAY, str(error)) from error

    def _answer_begins(self, exchange: Exchange, headers: Headers) -> str | None:
        if self._limits.full_duplex:
            return None
        reason = broken_off(exchange, headers, asyncio.get_running_loop().time())
        if reason is not None:
            _log.warning("%s %s: broken off: %s", exchange.method.decode(), exchange.target.decode(errors="replace"), reason)
        return reason
