"""The proxy's HTTP, byte by byte: framing, keep-alive, headers that must not pass, and failures."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from http import HTTPStatus
from typing import Any, cast

import pytest

from knative.local.http.client import UpstreamFailed, UpstreamPool
from knative.local.http.messages import Headers, HttpError, forwarded
from knative.local.http.server import BodySink, Exchange, HttpServer
from tests.support.knative.proxy import proxy_to_port

Talk = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def closing(talk: Talk) -> Talk:
    async def talk_and_close(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await talk(reader, writer)
        finally:
            writer.close()

    return talk_and_close


@asynccontextmanager
async def proxy_to(upstream: Talk) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A client's connection to a proxy, whose server is `upstream`."""

    server = await asyncio.start_server(closing(upstream), "127.0.0.1", 0)
    try:
        async with proxy_to_port(server.sockets[0].getsockname()[1]) as proxy:
            reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
            try:
                async with asyncio.timeout(60):
                    yield reader, writer
            finally:
                writer.close()
    finally:
        server.close()


def answering(answer: bytes, seen: list[bytes] | None = None, *, times: int = 1) -> Talk:
    """Reads a request and answers it, `times` times, then closes."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for _ in range(times):
            head = await reader.readuntil(b"\r\n\r\n")
            length = next((int(line[15:]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:")), 0)
            body = await reader.readexactly(length)
            if seen is not None:
                seen.append(head + body)
            writer.write(answer)
            await writer.drain()

    return talk


OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi"


async def test_a_connection_is_kept_on_both_sides() -> None:
    connections: list[None] = []

    async def counted(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.append(None)
        await answering(OK, times=3)(reader, writer)

    async with proxy_to(counted) as (reader, writer):
        for _ in range(3):
            writer.write(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
            assert await reader.readexactly(len(OK)) == OK
    assert len(connections) == 1


async def test_hop_by_hop_headers_do_not_pass() -> None:
    seen: list[bytes] = []
    async with proxy_to(answering(OK, seen)) as (reader, writer):
        writer.write(
            b"POST /path?q=1 HTTP/1.1\r\nHost: a\r\nConnection: x-mine, keep-alive\r\nX-Mine: 1\r\nTE: trailers\r\n"
            b"ce-id: 7\r\nContent-Length: 4\r\n\r\nbody"
        )
        await reader.readexactly(len(OK))
    own = b"X-Forwarded-For: 127.0.0.1"
    assert seen == [b"POST /path?q=1 HTTP/1.1\r\nHost: a\r\nce-id: 7\r\nContent-Length: 4\r\n%b\r\n\r\nbody" % own]


GET = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
LONG = b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n"


@pytest.mark.parametrize(
    ("request_bytes", "answer", "expected"),
    [
        # a body that ends with its connection becomes chunks
        (GET, b"HTTP/1.0 200 OK\r\n\r\nto the end", CHUNKED + b"a\r\nto the end\r\n0\r\n\r\n"),
        (GET, b"HTTP/1.1 204 No Content\r\n\r\n", b"HTTP/1.1 204 No Content\r\n\r\n"),
        (GET, b"HTTP/1.1 304 Not Modified\r\nETag: x\r\n\r\n", b"HTTP/1.1 304 Not Modified\r\nETag: x\r\n\r\n"),
        (GET, b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" + OK, OK),
        (GET, CHUNKED + b"2\r\nhi\r\n0\r\n\r\n", CHUNKED + b"2\r\nhi\r\n0\r\n\r\n"),
        (GET, b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"),
        # the answer to HEAD has a length but no body; an HTTP/1.0 client gets a body that ends with its connection
        (b"HEAD / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n", LONG + b"\r\n", LONG + b"Connection: close\r\n\r\n"),
        (b"GET / HTTP/1.0\r\n\r\n", CHUNKED + b"2\r\nhi\r\n0\r\n\r\n", b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nhi"),
    ],
)
async def test_answers_are_reframed(request_bytes: bytes, answer: bytes, expected: bytes) -> None:
    async with proxy_to(answering(answer)) as (reader, writer):
        writer.write(request_bytes)
        if b"Connection: close" in expected:
            assert await reader.read() == expected
        else:
            assert await reader.readexactly(len(expected)) == expected


async def test_the_proxy_answers_expect_100_continue() -> None:
    seen: list[bytes] = []
    async with proxy_to(answering(OK, seen)) as (reader, writer):
        writer.write(b"POST / HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 4\r\n\r\n")
        assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        writer.write(b"body")
        assert await reader.readexactly(len(OK)) == OK
    assert b"Expect" not in seen[0]


async def test_an_answer_before_the_end_of_the_request_keeps_the_connection() -> None:
    async def early(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(OK)
        await writer.drain()

    async with proxy_to(early) as (reader, writer):
        writer.write(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 400000\r\n\r\n")
        assert await reader.readexactly(len(OK)) == OK
        writer.write(b"x" * 400000 + b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        assert await reader.readexactly(len(OK)) == OK


@pytest.mark.parametrize(
    ("answer", "seen"),
    [
        (b"", b"HTTP/1.1 502 Bad Gateway"),  # closed without a word
        (b"no http at all\r\n\r\n", b"HTTP/1.1 502 Bad Gateway"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nshort", b"HTTP/1.1 200 OK"),  # begun: can only break off
    ],
)
async def test_a_server_that_fails(answer: bytes, seen: bytes) -> None:
    async with proxy_to(answering(answer)) as (reader, writer):
        writer.write(b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
        try:
            text = await reader.read()
        except ConnectionResetError:
            text = seen
        assert text.startswith(seen)


async def test_a_port_without_a_listener_is_502() -> None:
    async def nothing(exchange: Exchange) -> None:
        with pytest.raises(UpstreamFailed, match=r"127\.0\.0\.1:1"):
            await UpstreamPool(1).forward(exchange)
        raise HttpError(HTTPStatus.BAD_GATEWAY, "gone")

    server = HttpServer(nothing)
    await server.start()
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
    assert (await reader.readuntil(b"\n")).startswith(b"HTTP/1.1 502")
    writer.close()
    server.close()


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (b"complete nonsense\r\n\r\n", b"HTTP/1.1 400"),
        (b"GET / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n", b"HTTP/1.1 400"),
        (b"GET / HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n", b"HTTP/1.1 400"),
        (b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"y" * 70_000 + b"\r\n\r\n", b"HTTP/1.1 431"),
        (b"CONNECT b:80 HTTP/1.1\r\nHost: b:80\r\n\r\n", b"HTTP/1.1 501"),
    ],
)
async def test_an_unsupported_request_gets_a_status_and_ends_the_connection(request_bytes: bytes, status: bytes) -> None:
    async with proxy_to(answering(OK)) as (reader, writer):
        writer.write(request_bytes)
        assert (await reader.read()).startswith(status)


async def test_a_client_that_goes_away_ends_the_request_at_the_server() -> None:
    gone = asyncio.Event()

    async def waits(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nab")
        assert await reader.read() == b""
        gone.set()

    async with proxy_to(waits) as (reader, writer):
        writer.write(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        await reader.readuntil(b"ab")
        writer.close()
        await gone.wait()


@pytest.mark.slow
async def test_a_slow_client_slows_the_server_down() -> None:
    """The proxy holds a bounded amount of an answer while the client does not read."""
    sent = 0
    blocked = asyncio.Event()

    async def floods(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 268435456\r\n\r\n")
        while sent < 268435456:
            writer.write(b"x" * 2**20)
            try:
                async with asyncio.timeout(0.5):
                    await writer.drain()
            except TimeoutError:
                blocked.set()
                return
            sent += 2**20

    async with proxy_to(floods) as (_, writer):
        writer.write(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        await blocked.wait()
    assert sent < 64 * 2**20


class SlowReader(Exchange):
    """An exchange whose client reads so slowly that the server ends first."""

    def __init__(self) -> None:
        super().__init__(cast("Any", None), b"GET", b"/", [], keep_alive=True)
        self.upstream: BodySink | None = None

    def attach(self, sink: BodySink) -> None:
        self.upstream = sink
        sink.end_body()

    def start(self, status: int, reason: bytes, headers: Headers) -> bytes:
        return b""

    def write(self, data: bytes) -> None:
        assert self.upstream is not None
        self.upstream.pause(True)

    def end(self) -> None:
        pass


async def test_a_connection_whose_last_answer_was_read_slowly_takes_the_next_request() -> None:
    server = await asyncio.start_server(closing(answering(OK, times=2)), "127.0.0.1", 0)
    pool = UpstreamPool(server.sockets[0].getsockname()[1])
    async with asyncio.timeout(60):
        await pool.forward(SlowReader())
        await pool.forward(SlowReader())
    pool.close()
    server.close()


def test_headers_named_by_connection_are_dropped() -> None:
    assert forwarded([(b"Connection", b"a, B"), (b"A", b"1"), (b"b", b"2"), (b"C", b"3")]) == [(b"C", b"3")]
