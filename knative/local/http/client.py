"""The HTTP client of the proxies: forwards a request to a server and passes the answer back, over kept-alive connections."""

import asyncio
from collections.abc import Callable
from typing import Final

import httptools

from knative.local.http.messages import CHUNKED, LAST_CHUNK, Headers, chunk, find, forwarded, has_body, head, with_forwarded_for
from knative.local.http.server import Exchange

REFUSED: Final = "connect: connection refused"  # Go's words, which are in the 502 of Knative's queue-proxy; gateways read them
_IDLE_SECONDS: Final = 30.0  # shorter than servers keep an idle connection, so that it does not close under a request
_CONNECT_SECONDS: Final = 10.0

# Called with an answer's headers before they are passed on. Returns None, or why the answer is broken off after its head.
AnswerBegins = Callable[[Exchange, Headers], str | None]


class UpstreamFailed(Exception):
    """The server refused the connection, or broke it before its answer was complete."""


class UpstreamPool:
    """Kept-alive connections to one server on 127.0.0.1, for one event loop.

    on_answer: called with the headers of every answer before they are passed on; see AnswerBegins.
    """

    def __init__(self, port: int, on_answer: AnswerBegins = lambda exchange, headers: None) -> None:
        self.port = port
        self._on_answer = on_answer
        self._idle: list[_Upstream] = []
        self._open: set[_Upstream] = set()

    async def forward(self, exchange: Exchange) -> None:
        """Sends the exchange's request to the server and writes the answer to the client; returns when the answer is complete.

        Raises UpstreamFailed; `exchange.started` then tells whether the answer had begun.
        """
        upstream = self._take() or await self._connect()
        self._open.add(upstream)
        try:
            await upstream.forward(exchange)
        finally:
            self._open.discard(upstream)
            if upstream.reusable:
                upstream.idle_since = asyncio.get_running_loop().time()
                self._idle.append(upstream)
            else:
                upstream.abort()

    def close(self) -> None:
        """Breaks all connections, idle and in use."""
        for upstream in [*self._idle, *self._open]:
            upstream.abort()
        self._idle.clear()

    def _take(self) -> "_Upstream | None":
        oldest = asyncio.get_running_loop().time() - _IDLE_SECONDS
        while self._idle:
            upstream = self._idle.pop()
            if upstream.reusable and upstream.idle_since >= oldest:
                return upstream
            upstream.abort()
        return None

    async def _connect(self) -> "_Upstream":
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(_CONNECT_SECONDS):
                _, upstream = await loop.create_connection(lambda: _Upstream(self._on_answer), "127.0.0.1", self.port)
        except ConnectionRefusedError as error:
            raise UpstreamFailed(f"dial tcp 127.0.0.1:{self.port}: {REFUSED}") from error
        except (OSError, TimeoutError) as error:
            raise UpstreamFailed(f"127.0.0.1:{self.port}: {error or 'no connection in time'}") from error
        return upstream


class _Upstream(asyncio.Protocol):
    """One connection to a server, for one exchange at a time: the callbacks of asyncio and of the HTTP parser."""

    def __init__(self, on_answer: AnswerBegins) -> None:
        self.idle_since = 0.0
        self._on_answer = on_answer
        self._parser = httptools.HttpResponseParser(self)
        self._transport: asyncio.Transport | None = None
        self._exchange: Exchange | None = None
        self._done: asyncio.Future[None] | None = None
        self._broken_because: str | None = None  # the answer is broken off after its head
        self._headers: Headers = []
        self._reason = b""
        self._out: list[bytes] = []  # parts of the answer that one call of the parser produced
        self._chunked = False  # framing of the request's body
        self._sent = True  # the request is sent to its end
        self._skip = False  # the parser is in an answer that is not passed on
        self._keep_alive = True
        self._collected: list[bytes] | None = None  # the request's first bytes, until they are written together

    @property
    def reusable(self) -> bool:
        is_open = self._transport is not None and not self._transport.is_closing()
        return is_open and self._exchange is None and self._sent and self._keep_alive

    async def forward(self, exchange: Exchange) -> None:
        self._exchange, self._broken_because = exchange, None
        self._done = asyncio.get_running_loop().create_future()
        self._sent = False
        self._chunked = (find(exchange.headers, b"transfer-encoding") or b"").lower().endswith(b"chunked")
        headers = with_forwarded_for(forwarded(exchange.headers), exchange.peers)
        if self._chunked:
            headers.append(CHUNKED)
        # The head leaves together with the part of the body that has arrived.
        self._collected = [head(b"%b %b HTTP/1.1" % (exchange.method, exchange.target), headers)]
        exchange.attach(self)
        collected, self._collected = self._collected, None
        self._write(b"".join(collected))
        try:
            await self._done
        finally:
            if self._exchange is not None:  # cancelled: the rest of the answer has no reader
                self._exchange, self._keep_alive = None, False

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    # Called by the exchange: this is its BodySink.

    def write_body(self, data: bytes) -> None:
        self._write(chunk(data) if self._chunked else data)

    def end_body(self) -> None:
        if self._chunked:
            self._chunked = False
            self._write(LAST_CHUNK)
        self._sent = True

    def pause(self, paused: bool) -> None:
        if self._transport is None or self._transport.is_reading() is not paused:
            return
        if paused:
            self._transport.pause_reading()
        elif not self._transport.is_closing():
            self._transport.resume_reading()

    # Callbacks of asyncio.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        framed = {name.lower() for name, _ in self._headers} & {b"content-length", b"transfer-encoding"}
        if self._exchange is not None and self._exchange.started and not framed:
            self._complete()  # such an answer ends with its connection
        self._fail(f"the connection broke: {exc or 'closed'}")

    def data_received(self, data: bytes) -> None:
        if self._exchange is None:  # no request is under way
            self._keep_alive = False
            self.abort()
            return
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self._keep_alive = False
            self._fail(f"no HTTP answer: {error}")
            self.abort()
        self._flush()
        if self._broken_because is not None:
            self._keep_alive = False
            self._fail(self._broken_because)

    def pause_writing(self) -> None:
        if self._exchange is not None:
            self._exchange.connection.pause(True)

    def resume_writing(self) -> None:
        if self._exchange is not None:
            self._exchange.connection.pause(False)

    # Callbacks of the parser.

    def on_message_begin(self) -> None:
        self._headers, self._reason = [], b""

    def on_status(self, status: bytes) -> None:
        self._reason += status

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers.append((name, value))

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        self._skip = status < 200  # interim: the real answer follows
        if self._skip or self._exchange is None:
            return
        self._broken_because = self._on_answer(self._exchange, self._headers)
        self._skip = self._broken_because is not None
        self._out.append(self._exchange.start(status, self._reason, forwarded(self._headers)))
        if self._exchange.method == b"HEAD" and has_body(b"GET", status):
            # The parser cannot know that no body follows, so the connection cannot be used again.
            self._keep_alive = False
            self._complete()

    def on_body(self, body: bytes) -> None:
        if self._exchange is not None and not self._skip:
            self._out.append(self._exchange.framed(body))

    def on_message_complete(self) -> None:
        if not self._skip:
            self._keep_alive = self._parser.should_keep_alive()
            self._complete()

    def _complete(self) -> None:
        if self._exchange is not None:
            self._flush()
            exchange, self._exchange = self._exchange, None
            exchange.end()
            # If the client read the end of the answer slowly, reading is paused, and no exchange is left to resume it.
            self.pause(False)
        if self._done is not None and not self._done.done():
            self._done.set_result(None)

    def _flush(self) -> None:
        data = b"".join(self._out)
        self._out.clear()
        if data and self._exchange is not None:
            self._exchange.write(data)

    def _fail(self, text: str) -> None:
        self._exchange = None
        if self._done is not None and not self._done.done():
            self._done.set_exception(UpstreamFailed(text))

    def _write(self, data: bytes) -> None:
        if self._collected is not None:
            self._collected.append(data)
        elif self._transport is not None:
            self._transport.write(data)
