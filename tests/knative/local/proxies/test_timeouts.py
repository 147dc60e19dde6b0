"""Knative's three time limits of a request, which count from its arrival."""

import asyncio
from collections.abc import Callable

import aiohttp
import pytest

from knative.local.proxies.timeouts import Timeouts
from tests.support.knative.behind_queue_proxy import OPEN_ENDED, behind_queue_proxy, chunk


async def never(head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read()


async def drops(head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """A drop every 50 ms, 40 of them; then nothing, for as long as the client stays."""
    writer.write(OPEN_ENDED)
    for _ in range(40):
        writer.write(chunk(b"drop "))
        await writer.drain()
        await asyncio.sleep(0.05)
    await reader.read()


async def fetch(session: aiohttp.ClientSession, url: str) -> tuple[int, str]:
    async with session.get(url) as reply:
        return reply.status, await reply.text()


async def fetch_until(is_wanted: Callable[[int, str], bool], timeouts: Timeouts) -> None:
    """Fetches `drops` until the reply is as wanted: a machine that stands still for a limit's time gets another one."""
    seen = []
    async with behind_queue_proxy(drops, timeouts) as (session, url):
        for _ in range(10):
            seen.append(await fetch(session, url))
            if is_wanted(*seen[-1]):
                return
    pytest.fail(f"{seen}")


@pytest.mark.slow
async def test_waiting_for_a_slot_counts() -> None:
    """Requests to a function that takes one at a time and never answers: all time out together, and not one by one."""
    async with behind_queue_proxy(never, Timeouts(2.0), concurrency=1) as (session, url), asyncio.timeout(20):
        answers = await asyncio.gather(*(fetch(session, url) for _ in range(11)))
        assert answers == [(504, "request timeout\n")] * 11


@pytest.mark.slow
async def test_an_answer_past_its_time_ends_with_knatives_words() -> None:
    await fetch_until(
        lambda status, text: status == 200 and text.startswith("drop drop ") and text.endswith("request timeout"), Timeouts(2.0)
    )


@pytest.mark.slow
async def test_an_answer_with_a_length_past_its_time_breaks() -> None:
    async def half(head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf")
        await reader.read()

    async with behind_queue_proxy(half, Timeouts(0.5)) as (session, url):
        with pytest.raises(aiohttp.ClientPayloadError):
            await fetch(session, url)


@pytest.mark.slow
async def test_the_response_start_timeout_ends_with_the_answers_first_byte() -> None:
    async with behind_queue_proxy(never, Timeouts(10, response_start_timeout_seconds=0.3)) as (session, url):
        assert await fetch(session, url) == (504, "request timeout\n")
    await fetch_until(lambda _, text: text.count("drop") > 20, Timeouts(3, response_start_timeout_seconds=1.0))


@pytest.mark.slow
async def test_the_idle_timeout_counts_from_the_last_bytes() -> None:
    timeouts = Timeouts(10, idle_timeout_seconds=1.5)
    async with behind_queue_proxy(never, timeouts) as (session, url):
        assert await fetch(session, url) == (504, "request timeout\n")
    await fetch_until(lambda _, text: text == "drop " * 40 + "request timeout", timeouts)


@pytest.mark.slow
async def test_a_slot_is_free_after_a_timeout() -> None:
    answers = iter([never, None])

    async def first_never(head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if next(answers):
            await reader.read()
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")

    async with behind_queue_proxy(first_never, Timeouts(2.0), concurrency=1) as (session, url):
        assert (await fetch(session, url))[0] == 504
        assert await fetch(session, url) == (200, "ok")
