"""A small HTTP/1.1 server for a streaming proxy: handlers see heads as bytes, and bodies as they arrive.

Each request has a task. Bodies are passed on as they arrive, not collected: a slow reader on one side pauses the other side.
"""

import asyncio
import contextlib
import logging
import ssl
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import Final, Protocol

import httptools

from eventing.http.request_target import AUTHORITY, read_target
from knative.local.http.messages import CHUNKED, LAST_CHUNK, Headers, HttpError, chunk, find, has_body, head

_log = logging.getLogger(__name__)

THIS_MACHINE: Final = b"127.0.0.1"  # the address of every proxy here, as the next one sees it
_BUFFER_BYTES: Final = 256 * 1024  # held of a request's body before a sink is attached; beyond this the client is paused
_MAX_HEAD_BYTES: Final = 64 * 1024


class BodySink(Protocol):
    """Receives a request's body as it arrives, and produces the answer.

    `pause(True)` asks it to stop producing, because the client reads too slowly; `pause(False)` to go on.
    """

    def write_body(self, data: bytes) -> None: ...

    def end_body(self) -> None: ...

    def pause(self, paused: bool) -> None: ...


class Exchange:
    """One request of a client and its answer, as the handler of an HttpServer gets it."""

    def __init__(
        self, connection: "_ClientConnection", method: bytes, target: bytes, headers: Headers, keep_alive: bool
    ) -> None:
        self.connection = connection
        self.method = method
        self.target = target
        self.headers = headers
        self.peers: list[bytes] = []  # the peer's address at each proxy so far: the client's, then this machine's
        self.started = False  # the head of the answer has been sent
        self.ended = False  # the answer is complete
        self.written_at: float | None = None  # when a part of the answer was last sent, by the event loop's clock
        self.has_body = False  # a part of the request's body has come
        self.body_complete = False
        self.body_ended_at: float | None = None
        self._keep_alive = keep_alive
        self._chunked = False
        self.sink: BodySink | None = None  # gets the request's body
        self._held: list[bytes] = []
        self._held_bytes = 0

    def attach(self, sink: BodySink) -> None:
        """Sends the request's body to `sink`: first the part that has arrived, then each further part as it comes."""
        self.sink = sink
        for data in self._held:
            sink.write_body(data)
        self._held.clear()
        self.connection.pause(False)
        if self.body_complete:
            sink.end_body()

    def start(self, status: int, reason: bytes, headers: Headers) -> bytes:
        """Returns the head of the answer, which the caller must pass to `write`.

        It also chooses how the answer's body is delimited: by the Content-Length in `headers`, by chunks, or by closing the
        connection.
        """
        self.started = True
        extra: Headers = []
        if has_body(self.method, status) and find(headers, b"content-length") is None:
            self._chunked = self.connection.speaks_1_1
            if self._chunked:
                extra.append(CHUNKED)
            else:
                self._keep_alive = False
        if not self._keep_alive:
            extra.append((b"Connection", b"close"))
        return head(b"HTTP/1.1 %d %b" % (status, reason), headers + extra)

    def framed(self, data: bytes) -> bytes:
        return chunk(data) if self._chunked else data

    def write(self, data: bytes) -> None:
        """Sends bytes that `start` and `framed` returned."""
        self.written_at = asyncio.get_running_loop().time()
        self.connection.write(data)

    def end(self) -> None:
        """Ends the answer; call it after the last bytes are written."""
        if self._chunked:
            self.connection.write(LAST_CHUNK)
        self.ended = True
        self.connection.answered(self, self._keep_alive)

    def cut_short(self, text: bytes) -> None:
        """Ends an answer in chunks early, with `text` as its last bytes.

        An answer with a Content-Length is left as it is: the server breaks the connection when the handler returns.
        """
        if self._chunked and not self.ended:
            self.write(self.framed(text))
            self.end()

    def respond(self, status: HTTPStatus, body: bytes, content_type: bytes = b"text/plain; charset=utf-8") -> None:
        """Sends a whole answer, head and body."""
        headers = [(b"Content-Type", content_type), (b"Content-Length", b"%d" % len(body))]
        self.write(self.start(status.value, status.phrase.encode(), headers) + (body if self.method != b"HEAD" else b""))
        self.end()

    def body_arrived(self, data: bytes) -> None:
        self.has_body = True
        if self.sink is not None:
            self.sink.write_body(data)
        elif not self.ended:
            self._held.append(data)
            self._held_bytes += len(data)
            if self._held_bytes > _BUFFER_BYTES:
                self.connection.pause(True)

    def body_ended(self) -> None:
        self.body_complete = True
        self.body_ended_at = asyncio.get_running_loop().time()
        if self.sink is not None:
            self.sink.end_body()


class _CollectedBody:
    """A BodySink for `read_body`."""

    def __init__(self, most_bytes: int, too_long: str) -> None:
        self.data = bytearray()
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._most_bytes = most_bytes
        self._too_long = too_long

    def write_body(self, data: bytes) -> None:
        if self.done.done():  # too long already
            return
        self.data += data
        if len(self.data) > self._most_bytes:
            self.done.set_exception(HttpError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, self._too_long))

    def end_body(self) -> None:
        if not self.done.done():
            self.done.set_result(None)

    def pause(self, paused: bool) -> None:
        """Does nothing: the answer is too short to wait for a slow client."""


async def read_body(exchange: Exchange, most_bytes: int, too_long: str) -> bytes:
    """The whole body of a request, when it has arrived. Raises HttpError 413 with `too_long` beyond `most_bytes`."""
    body = _CollectedBody(most_bytes, too_long)
    exchange.attach(body)
    await body.done
    return bytes(body.data)


Handler = Callable[[Exchange], Awaitable[None]]


class HttpServer:
    """An HTTP server on 127.0.0.1 that calls `handler` for every request."""

    def __init__(self, handler: Handler) -> None:
        self.handler = handler
        self.connections: set[_ClientConnection] = set()
        self.port = 0  # from `start` on
        self._server: asyncio.Server | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def start(self, port: int = 0, tls: ssl.SSLContext | None = None) -> None:
        """Begins to listen. If `port` is 0, the system chooses one (see `port`). Raises OSError if the port is in use.

        If `tls` is None, serves http; otherwise https with these settings.
        """
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: _ClientConnection(self), "127.0.0.1", port, backlog=1024, ssl=tls)
        self.port = self._server.sockets[0].getsockname()[1]

    def close(self) -> None:
        """Stops listening and breaks open connections."""
        if self._server is not None:
            self._server.close()
        for connection in list(self.connections):
            connection.abort()


class _ClientConnection(asyncio.Protocol):
    """One connection of a client: the callbacks of asyncio and of the HTTP parser."""

    def __init__(self, server: HttpServer) -> None:
        self.speaks_1_1 = True
        self._server = server
        self._parser = httptools.HttpRequestParser(self)
        self._transport: asyncio.Transport | None = None
        self._exchange: Exchange | None = None
        self._task: asyncio.Task[None] | None = None
        self._paused = False
        self._refused = False
        self._target = b""
        self._headers: Headers = []
        self._head_bytes = 0
        self._peer = b""

    # Callbacks of asyncio.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._peer = str(transport.get_extra_info("peername")[0]).encode()
        self._server.connections.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._server.connections.discard(self)
        if self._task is not None and self._exchange is not None and not self._exchange.ended:
            self._task.cancel()  # the client is gone

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade as offer:
            self._decline(data[offer.args[0] :])
        except httptools.HttpParserError as error:
            self._refuse(HTTPStatus.BAD_REQUEST, f"no HTTP/1.1: {error}")

    def pause_writing(self) -> None:
        if self._exchange is not None and self._exchange.sink is not None:
            self._exchange.sink.pause(True)

    def resume_writing(self) -> None:
        if self._exchange is not None and self._exchange.sink is not None:
            self._exchange.sink.pause(False)

    # Callbacks of the parser.

    def on_message_begin(self) -> None:
        if self._exchange is not None:  # pipelining: clients do not use it, and it would break the order of answers
            self._refused = True
        self._target, self._headers, self._head_bytes = b"", [], 0

    def on_url(self, url: bytes) -> None:
        self._target += url
        self._count(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._exchange is None:  # trailers are ignored
            self._headers.append((name, value.strip(b" \t")))
        self._count(len(name) + len(value))

    def on_headers_complete(self) -> None:
        if self._refused or self._parser.should_upgrade():  # data_received declines the offer of another protocol
            return
        version = self._parser.get_http_version()
        if version not in ("1.0", "1.1"):
            self._refuse(HTTPStatus.HTTP_VERSION_NOT_SUPPORTED, f"HTTP/{version} is not served, HTTP/1.1 is")
            return
        self.speaks_1_1 = version == "1.1"
        keep_alive = self._parser.should_keep_alive()
        method = self._parser.get_method()
        try:
            target = self._origin_form(method)
        except ValueError as error:
            self._refuse(HTTPStatus.BAD_REQUEST, str(error))
            return
        coding = b",".join(value for name, value in self._headers if name.lower() == b"transfer-encoding").lower()
        if coding not in (b"", b"chunked"):
            by_chunks = coding.rpartition(b",")[2].strip() == b"chunked"  # else the end is unknown (RFC 9112, section 6.3)
            status = HTTPStatus.NOT_IMPLEMENTED if by_chunks else HTTPStatus.BAD_REQUEST
            self._refuse(status, f"the transfer coding {coding.decode('latin-1')[:40]!r} is not served, chunked is")
            return
        if coding and not self.speaks_1_1:
            keep_alive = False  # RFC 9112, section 6.1: that client may not know chunks
        self._exchange = Exchange(self, method, target, self._headers, keep_alive)
        self._exchange.peers.append(self._peer)
        if self.speaks_1_1 and (find(self._headers, b"expect") or b"").lower() == b"100-continue":
            self.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        self._task = asyncio.get_running_loop().create_task(self._handle(self._exchange))

    def on_body(self, body: bytes) -> None:
        if self._exchange is not None and not self._refused:
            self._exchange.body_arrived(body)

    def on_message_complete(self) -> None:
        if self._exchange is None or self._refused:
            return
        exchange = self._exchange
        if exchange.ended:
            self._exchange = None
        exchange.body_ended()

    def _origin_form(self, method: bytes) -> bytes:
        """The request's target in origin form, or `*`. If the target names an authority, Host becomes that.

        Raises ValueError for a target or a Host that RFC 9112, section 3.2, wants refused.
        """
        hosts = [value for name, value in self._headers if name.lower() == b"host"]
        if len(hosts) != 1 and (hosts or self.speaks_1_1):
            raise ValueError(f"the request has {len(hosts)} Host headers; send one")
        if hosts and not AUTHORITY.fullmatch(hosts[0].decode("latin-1")):
            raise ValueError("the Host header is no host with a port or without")
        target, authority = read_target(method.decode(), self._target.decode("latin-1"))
        if authority is not None or not hosts:  # a proxy sends a Host always (RFC 9110, section 7.2)
            others = [header for header in self._headers if header[0].lower() != b"host"]
            self._headers = [(b"Host", THIS_MACHINE if authority is None else authority.encode("latin-1")), *others]
        return target.encode("latin-1")

    def _decline(self, rest: bytes) -> None:
        """Reads the request once more without its offer of another protocol (RFC 9110, section 7.8).

        The parser took the request's body for that protocol. rest: what was received after the request's head.
        """
        method, version = self._parser.get_method(), self._parser.get_http_version().encode()
        if method == b"CONNECT":
            self._refuse(HTTPStatus.NOT_IMPLEMENTED, "CONNECT is not served here")
            return
        kept = [header for header in self._headers if header[0].lower() != b"upgrade"]
        self._parser = httptools.HttpRequestParser(self)
        self.data_received(head(b"%b %b HTTP/%b" % (method, self._target, version), kept) + rest)

    # Called by the exchange.

    def write(self, data: bytes) -> None:
        if self._transport is not None:
            self._transport.write(data)

    def pause(self, paused: bool) -> None:
        """Stops or resumes reading from the client."""
        if self._transport is None or paused is self._paused:
            return
        self._paused = paused
        if paused:
            self._transport.pause_reading()
        else:
            self._transport.resume_reading()

    def answered(self, exchange: Exchange, keep_alive: bool) -> None:
        self.pause(False)
        if exchange.body_complete:
            self._exchange = None
        if (not keep_alive or self._refused) and self._transport is not None:
            self._transport.close()

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    async def _handle(self, exchange: Exchange) -> None:
        """Runs the handler and answers its errors. If the answer has begun already, the connection is broken instead."""
        problem: HttpError | None = None
        try:
            await self._server.handler(exchange)
        except HttpError as error:
            problem = error
        except Exception:  # noqa: BLE001  # one request must not take the platform with it
            _log.exception("%s %s failed", exchange.method.decode(), exchange.target.decode(errors="replace"))
            problem = HttpError(HTTPStatus.INTERNAL_SERVER_ERROR, "the platform failed; its log says how")
        finally:
            if problem is not None and not exchange.started:
                exchange.respond(problem.status, str(problem).encode() + b"\n")
            if self._task is asyncio.current_task():  # the next request's task may have replaced it already
                self._task = None
            if not exchange.ended:
                self.abort()

    def _count(self, size: int) -> None:
        self._head_bytes += size
        if self._head_bytes > _MAX_HEAD_BYTES and not self._refused:
            self._refuse(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, f"more than {_MAX_HEAD_BYTES} bytes of head")

    def _refuse(self, status: HTTPStatus, text: str) -> None:
        """Answers a request that cannot be read with an error, and closes the connection. If the request before it is still
        being answered, the connection closes after that answer."""
        self._refused = True
        if self._exchange is not None and self._exchange.body_complete:
            return
        if self._exchange is None:
            body = text.encode() + b"\n"
            headers = [(b"Content-Length", b"%d" % len(body)), (b"Connection", b"close")]
            self.write(head(b"HTTP/1.1 %d %b" % (status, status.phrase.encode()), headers) + body)
        if self._transport is not None:
            with contextlib.suppress(RuntimeError):
                self._transport.close()
