"""One pod's queue-proxy: every request to the function passes it, through the activator or straight to its port.

It counts requests, applies containerConcurrency and the time limits, and keeps a leaving pod while requests come.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, nullcontext
from dataclasses import dataclass
from http import HTTPStatus
from typing import Final

from knative.local.http.client import REFUSED, UpstreamFailed, UpstreamPool
from knative.local.http.messages import Headers, HttpError, find
from knative.local.http.server import Exchange, HttpServer
from knative.local.proxies.concurrency import ConcurrencyMeter, ConcurrencyReport
from knative.local.proxies.network import EmulatedNetwork, Relay
from knative.local.proxies.serving_certs import ServingCerts
from knative.local.proxies.timeouts import Timeouts, in_time

_log = logging.getLogger(__name__)

FULL_DUPLEX_ANNOTATION: Final = "features.knative.dev/http-full-duplex"  # `Enabled` on a template; see `broken_off`
_PROBERS: Final = (b"kube-probe/", b"Knative-Activator-Probe", b"Knative-Autoscaling-Probe")  # beginnings of a User-Agent
PROXY_HEADER: Final = b"k-proxy-request"  # with the value ACTIVATOR: this request came through the activator
ACTIVATOR: Final = b"activator"
_QUEUE_FACTOR: Final = 10
_BUFFERED_BYTES: Final = 2048  # Go's server sends answers with a Content-Length up to this in one piece
_END_SEEN_SECONDS: Final = 0.002  # ReverseProxy has seen the end of a body this long after it passed it on


@dataclass(frozen=True, slots=True)
class RequestLimits:
    """Limits for the requests of each pod, from a revision's template and under Knative's names."""

    container_concurrency: int  # 0: no limit
    timeouts: Timeouts
    full_duplex: bool = False  # answers may begin before the request has ended; see `broken_off`


class QueueProxy:
    """The queue-proxy of one pod. It has a port of 127.0.0.1 in place of `podIP:8012`, and with certificates one for 8112."""

    def __init__(
        self,
        limits: RequestLimits,
        ready: Callable[[], bool] = lambda: True,
        network: EmulatedNetwork | None = None,
        certs: ServingCerts | None = None,
    ) -> None:
        """ready: tells whether the pod is ready, for probes. network: emulated between clients and these ports; None: plain
        loopback. certs: None: without system-internal-tls."""
        now = asyncio.get_running_loop().time()
        self.all = ConcurrencyMeter(now)
        self.proxied = ConcurrencyMeter(now)  # requests through the activator, which reports them itself
        self._limits = limits
        self._ready = ready
        self._breaker = Breaker(limits.container_concurrency)
        self._draining = False
        self._upstream: UpstreamPool | None = None
        self._server = HttpServer(self.serve)
        self._tls_server = HttpServer(self.serve)
        self._certs = certs
        emulated = None if network is None or network == EmulatedNetwork() else network
        self._relay = None if emulated is None else Relay(emulated)
        self._tls_relay = None if emulated is None else Relay(emulated)

    @property
    def port(self) -> int:
        return (self._relay or self._server).port

    @property
    def tls_port(self) -> int:
        """The port for TLS. 0 without certificates."""
        return (self._tls_relay or self._tls_server).port

    @property
    def function_port(self) -> int | None:
        return None if self._upstream is None else self._upstream.port

    async def start(self) -> None:
        if self._certs is not None:
            await self._tls_server.start(tls=self._certs.listening)
            if self._tls_relay is not None:
                await self._tls_relay.start(self._tls_server.port)
        await self._server.start()
        if self._relay is not None:
            await self._relay.start(self._server.port)

    def connect(self, port: int | None) -> None:
        """Sets the port on which the function listens, or None if the function does not run.

        Breaks the connections to the previous port.
        """
        if self._upstream is not None:
            self._upstream.close()
        self._upstream = None if port is None else UpstreamPool(port, self._answer_begins)

    def close(self) -> None:
        self.connect(None)
        for each in (self._server, self._tls_server, self._relay, self._tls_relay):
            if each is not None:
                each.close()

    async def serve(self, exchange: Exchange) -> None:
        """Answers Knative's probes, and forwards every other request to the function. Returns when it is answered.

        Raises HttpError: 503 if the queue is full, 502 if the function does not listen or breaks off, 504 if time ran out.
        See knative/serving, pkg/queue/sharedmain/handlers.go, pkg/queue/handler.go and pkg/queue/health.
        """
        if self._answers_probe(exchange):
            return
        try:
            async with in_time(exchange, self._limits.timeouts, "request timeout"):
                if find(exchange.headers, b"k-kubelet-probe"):
                    await self._forward(exchange)  # neither counted nor limited
                    return
                through_activator = find(exchange.headers, PROXY_HEADER) == ACTIVATOR
                with self.all.counted(), self.proxied.counted() if through_activator else nullcontext():
                    async with self._breaker.slot():
                        await self._forward(exchange)
        except UpstreamFailed as error:
            raise HttpError(HTTPStatus.BAD_GATEWAY, str(error)) from error

    def report(self, now: float) -> ConcurrencyReport:
        """The load since the previous report, for the autoscaler, without the requests that the activator reports."""
        everything, proxied = self.all.report(now), self.proxied.report(now)
        return ConcurrencyReport(max(0.0, everything.average - proxied.average), everything.arrivals - proxied.arrivals)

    async def quiet(self, seconds: float) -> None:
        """Waits until no new request has come for `seconds`, the time before this call not counted. Probes fail from now on."""
        self._draining = True
        loop = asyncio.get_running_loop()
        began = loop.time()
        while (left := max(began, self.all.last_arrival) + seconds - loop.time()) > 0:
            await asyncio.sleep(left)

    def _answers_probe(self, exchange: Exchange) -> bool:
        """Answers a request that queue-proxy takes for a probe; such requests are not counted. False if it is none."""
        probe = find(exchange.headers, b"k-network-probe") or b""
        asks_function = (find(exchange.headers, b"user-agent") or b"").startswith(_PROBERS)
        version = find(exchange.headers, b"k-network-hash")
        if not asks_function and probe != b"probe":
            return False
        if self._draining:
            exchange.respond(HTTPStatus.SERVICE_UNAVAILABLE, b"shutting down")
        elif asks_function and probe != b"queue":
            exchange.respond(HTTPStatus.BAD_REQUEST, b"unexpected probe header value: " + probe)
        elif asks_function and not self._ready():
            exchange.respond(HTTPStatus.SERVICE_UNAVAILABLE, b"")
        elif asks_function:
            exchange.respond(HTTPStatus.OK, b"queue")
        elif version is None:
            exchange.respond(HTTPStatus.BAD_REQUEST, b'a probe request must contain a non-empty "K-Network-Hash" header')
        else:
            exchange.write(exchange.start(HTTPStatus.OK, b"OK", [(b"K-Network-Hash", version), (b"Content-Length", b"0")]))
            exchange.end()
        return True

    async def _forward(self, exchange: Exchange) -> None:
        if self._upstream is None:
            raise HttpError(HTTPStatus.BAD_GATEWAY, f"dial tcp 127.0.0.1: {REFUSED}")
        if host := find(exchange.headers, b"k-original-host"):
            others = [header for header in exchange.headers if header[0].lower() not in (b"host", b"k-original-host")]
            exchange.headers = [(b"Host", host), *others]
        await self._upstream.forward(exchange)

    def _answer_begins(self, exchange: Exchange, headers: Headers) -> str | None:
        if self._limits.full_duplex:
            return None
        reason = broken_off(exchange, headers, asyncio.get_running_loop().time())
        if reason is not None:
            _log.warning("%s %s: broken off: %s", exchange.method.decode(), exchange.target.decode(errors="replace"), reason)
        return reason


def broken_off(exchange: Exchange, headers: Headers, now: float) -> str | None:
    """Why Go's HTTP server would break off an answer with these headers that begins now; None if it would not.

    Go's server reads the rest of a request's body, and closes it, before it sends the first bytes of an answer (net/http,
    server.go, chunkWriter.writeHeader). If queue-proxy's ReverseProxy had not seen the body's end by then, its next read fails
    (`http: invalid Read on closed Body`), and its connection to the function is closed in the middle of the answer. On a
    cluster 4 to 19 % of the streamed answers that began a millisecond or two after the request broke so. Here all do.
    """
    length = find(headers, b"content-length")
    if length is not None and int(length) <= _BUFFERED_BYTES:
        return None
    remedy = f'annotate its template with {FULL_DUPLEX_ANNOTATION}: "Enabled", or let it send nothing before its answer'
    if not exchange.body_complete:
        return f"the function answered before the request was read to its end; {remedy}"
    # An answer without a length is sent at once. One with a length is buffered, and the body's end has been seen by then.
    if exchange.has_body and length is None and now - (exchange.body_ended_at or now) < _END_SEEN_SECONDS:
        return f"the function answered within {_END_SEEN_SECONDS * 1000:g} ms of the request's end; {remedy}"
    return None


class Breaker:
    """Admits containerConcurrency requests at once, queues ten times as many in order of arrival, and refuses the rest."""

    def __init__(self, container_concurrency: int) -> None:
        """container_concurrency: number of slots. If it is 0, there is no limit and no queue."""
        self._slots = asyncio.Semaphore(container_concurrency) if container_concurrency else None
        self._places = _QUEUE_FACTOR * container_concurrency  # left in the queue

    @asynccontextmanager
    async def slot(self) -> AsyncIterator[None]:
        """Waits for a slot and holds it for the block. Raises HttpError 503 if the queue is full."""
        if self._slots is None:
            yield
            return
        if self._slots.locked() and not self._places:
            raise HttpError(HTTPStatus.SERVICE_UNAVAILABLE, "pending request queue full")
        self._places -= 1
        try:
            await self._slots.acquire()
        finally:
            self._places += 1
        try:
            yield
        finally:
            self._slots.release()
