"""Passes an exchange on to a server and its answer back, over connections that are kept for the next one."""

import asyncio
from collections.abc import Callable
from typing import Final

import httptools

from knative.local.http.messages import (
    CHUNKED,
    LAST_CHUNK,
    Headers,
    chunk,
    forwarded,
    has_body,
    request_head,
    with_forwarded_for,
)
from knative.local.http.server import Exchange

_IDLE_SECONDS: Final = 30.0
"""Shorter than servers keep an idle connection, so that it is not lost under a request."""
_CONNECT_SECONDS: Final = 10.0


REFUSED: Final = "connect: connection refused"
"""Go's words, which stand in the 502 of Knative's queue-proxy: gateways go by them."""


class UpstreamFailed(Exception):
    """The server refused the connection or broke it before its answer was complete."""


AnswerBegins = Callable[[Exchange, Headers], str | None]
"""Told of an answer's headers before they are passed on; may say why the answer will break behind them."""


class UpstreamPool:
    """Connections to one server on 127.0.0.1."""

    def __init__(self, port: int, on_answer: AnswerBegins = lambda exchange, headers: None) -> None:
        self.port = port
        self._on_answer = on_answer
        self._idle: list[_Upstream] = []
        self._open: set[_Upstream] = set()

    async def forward(self, exchange: Exchange) -> None:
        """Raises UpstreamFailed; the exchange tells whether its answer had begun."""
        upstream = self._take() or await self._connect()
        self._open.add(upstream)
        try:
            await upstream.forward(exchange, self._on_answer)
        finally:
            self._open.discard(upstream)
            if upstream.reusable:
                upstream.idle_since = asyncio.get_running_loop().time()
                self._idle.append(upstream)
            else:
                upstream.abort()

    def close(self) -> None:
        """Breaks every connection, used or not."""
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
                _, upstream = await loop.create_connection(_Upstream, "127.0.0.1", self.port)
        except ConnectionRefusedError as error:
            raise UpstreamFailed(f"dial tcp 127.0.0.1:{self.port}: {REFUSED}") from error
        except (OSError, TimeoutError) as error:
            raise UpstreamFailed(f"127.0.0.1:{self.port}: {error or 'no connection in time'}") from error
        return upstream


class _Upstream(asyncio.Protocol):
    """The callbacks of asyncio and of the parser for one connection to a server; one exchange at a time."""

    def __init__(self) -> None:
        self.idle_since = 0.0
        self._parser = httptools.HttpResponseParser(self)
        self._transport: asyncio.Transport | None = None
        self._exchange: Exchange | None = None
        self._on_answer: AnswerBegins | None = None
        self._breaks: str | None = None
        self._done: asyncio.Future[None] | None = None
        self._headers: Headers = []
        self._reason = b""
        self._out: list[bytes] = []
        self._chunked = False
        self._sent = True
        self._skip = False
        self._keep_alive = True
        self._collected: list[bytes] | None = None

    @property
    def reusable(self) -> bool:
        open_ = self._transport is not None and not self._transport.is_closing()
        return open_ and self._exchange is None and self._sent and self._keep_alive

    async def forward(self, exchange: Exchange, on_answer: AnswerBegins) -> None:
        self._exchange = exchange
        self._on_answer, self._breaks = on_answer, None
        self._done = asyncio.get_running_loop().create_future()
        self._sent = False
        self._chunked = exchange.request_is_chunked
        headers = with_forwarded_for(forwarded(exchange.headers), exchange.seen_from)
        if self._chunked:
            headers.append(CHUNKED)
        # Head and what is there of the body leave in one piece.
        self._collected = [request_head(exchange.method, exchange.target, headers)]
        exchange.attach(self)
        collected, self._collected = self._collected, None
        self._write(b"".join(collected))
        try:
            await self._done
        finally:
            if self._exchange is not None:  # cancelled: whatever else comes belongs to nobody
                self._exchange, self._keep_alive = None, False

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    # BodySink

    def write_body(self, data: bytes) -> None:
        data = chunk(data) if self._chunked else data
        if self._collected is not None:
            self._collected.append(data)
        else:
            self._write(data)

    def end_body(self) -> None:
        if self._chunked:
            self._chunked = False
            if self._collected is not None:
                self._collected.append(LAST_CHUNK)
            else:
                self._write(LAST_CHUNK)
        self._sent = True

    def pause_reading(self) -> None:
        if self._transport is not None and self._transport.is_reading():
            self._transport.pause_reading()

    def resume_reading(self) -> None:
        if self._transport is not None and not self._transport.is_reading() and not self._transport.is_closing():
            self._transport.resume_reading()

    # asyncio's callbacks

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        exchange = self._exchange
        if exchange is not None and exchange.started and self._ends_with_connection:
            self._complete()
        self._fail(f"the connection broke: {exc or 'closed'}")

    def data_received(self, data: bytes) -> None:
        if self._exchange is None:  # an answer to no question
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
        if self._breaks is not None:
            self._keep_alive = False
            self._fail(self._breaks)

    def pause_writing(self) -> None:
        if self._exchange is not None:
            self._exchange.pause()

    def resume_writing(self) -> None:
        if self._exchange is not None:
            self._exchange.resume()

    # the parser's callbacks

    def on_message_begin(self) -> None:
        self._headers = []
        self._reason = b""

    def on_status(self, status: bytes) -> None:
        self._reason += status

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers.append((name, value))

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        self._skip = status < 200  # interim: the real answer follows
        if self._skip or self._exchange is None:
            return
        if self._on_answer is not None:
            self._breaks = self._on_answer(self._exchange, self._headers)
        self._skip = self._breaks is not None  # all behind the head
        self._out.append(self._exchange.start(status, self._reason, forwarded(self._headers)))
        if self._exchange.method == b"HEAD" and has_body(b"GET", status):
            # The parser cannot know that no body follows; the connection is of no more use to it.
            self._keep_alive = False
            self._complete()

    def on_body(self, body: bytes) -> None:
        if self._exchange is not None and not self._skip:
            self._out.append(self._exchange.framed(body))

    def on_message_complete(self) -> None:
        if not self._skip:
            self._keep_alive = self._parser.should_keep_alive()
            self._complete()

    @property
    def _ends_with_connection(self) -> bool:
        names = {name.lower() for name, _ in self._headers}
        return not names & {b"content-length", b"transfer-encoding"}

    def _complete(self) -> None:
        if self._exchange is not None:
            self._flush()
            exchange, self._exchange = self._exchange, None
            exchange.end()
            # Who read the end of the answer slowly had reading stopped, and knows of no exchange to start it again for.
            self.resume_reading()
        if self._done is not None and not self._done.done():
            self._done.set_result(None)

    def _flush(self) -> None:
        if self._out:
            data = b"".join(self._out)
            self._out.clear()
            if self._exchange is not None:
                self._exchange.write(data)

    def _fail(self, text: str) -> None:
        self._exchange = None
        if self._done is not None and not self._done.done():
            self._done.set_exception(UpstreamFailed(text))

    def _write(self, data: bytes) -> None:
        if self._transport is not None:
            self._transport.write(data)
