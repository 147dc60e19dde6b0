"""An answer that begins before its request was read to the end, as Go's ReverseProxy treats it."""

import asyncio
from collections.abc import AsyncIterator

import aiohttp
import pytest

from tests.support.knative.behind_queue_proxy import OPEN_ENDED, Function, behind_queue_proxy, chunk

BODY = b"x" * 2000


async def early(head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answers before it reads the request."""
    writer.write(OPEN_ENDED + chunk(b"early"))
    await writer.drain()
    await reader.readexactly(len(BODY))
    writer.write(b"0\r\n\r\n")


async def at_once(head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Reads the whole request and begins its answer in the same moment."""
    await reader.readexactly(len(BODY))
    writer.write(OPEN_ENDED + chunk(b"at once"))
    await asyncio.sleep(0.02)
    writer.write(b"0\r\n\r\n")


async def later(head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Begins its answer 20 ms after the request."""
    await reader.readexactly(len(BODY))
    await asyncio.sleep(0.02)
    writer.write(OPEN_ENDED + chunk(b"later") + b"0\r\n\r\n")


async def refusal(head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answers briefly after the head alone."""
    writer.write(b"HTTP/1.1 401 Unauthorized\r\nContent-Length: 6\r\n\r\nno key")
    await writer.drain()
    await reader.readexactly(len(BODY))


async def whole(head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answers with a Content-Length, as a stage does."""
    await reader.readexactly(len(BODY))
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 5000\r\n\r\n" + b"y" * 5000)


async def slow_body() -> AsyncIterator[bytes]:
    yield BODY[:1000]
    await asyncio.sleep(0.1)
    yield BODY[1000:]


async def ask(session: aiohttp.ClientSession, url: str) -> bytes:
    async with session.post(url, data=slow_body(), headers={"Content-Length": str(len(BODY))}) as reply:
        return await reply.read()


async def ask_often(session: aiohttp.ClientSession, url: str) -> None:
    """An answer comes at once if it does within a few milliseconds, which a busy machine seldom leaves."""
    for _ in range(50):
        await ask(session, url)


@pytest.mark.parametrize("function", [early, at_once])
async def test_an_early_answer_is_broken_off_without_the_annotation(
    function: Function, caplog: pytest.LogCaptureFixture
) -> None:
    async with behind_queue_proxy(function) as (session, url):
        with pytest.raises(aiohttp.ClientPayloadError):
            await ask_often(session, url)
    assert "features.knative.dev/http-full-duplex" in caplog.text


@pytest.mark.parametrize(("function", "answer"), [(early, b"early"), (at_once, b"at once")])
async def test_an_early_answer_is_whole_with_the_annotation(function: Function, answer: bytes) -> None:
    async with behind_queue_proxy(function, full_duplex=True) as (session, url):
        assert await ask(session, url) == answer


@pytest.mark.parametrize(("function", "answer"), [(later, b"later"), (refusal, b"no key"), (whole, b"y" * 5000)])
async def test_an_answer_that_is_late_short_or_has_a_length_is_whole_without_it(function: Function, answer: bytes) -> None:
    async with behind_queue_proxy(function) as (session, url):
        assert await ask(session, url) == answer


async def test_the_answer_to_a_request_without_a_body_is_whole() -> None:
    async def answer(head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(OPEN_ENDED + chunk(b"events") + b"0\r\n\r\n")

    async with behind_queue_proxy(answer) as (session, url), session.get(url) as reply:
        assert await reply.read() == b"events"
