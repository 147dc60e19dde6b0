"""A relay delays and limits bytes in both directions, for all connections of a pod together, and loses none."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest

from knative.local.proxies.network import EmulatedNetwork, Relay

DELAY = 0.1


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(2**16):
        writer.write(data)
        await writer.drain()
    writer.close()


@asynccontextmanager
async def relayed(network: EmulatedNetwork) -> AsyncIterator[Relay]:
    server = await asyncio.start_server(echo, "127.0.0.1", 0)
    relay = Relay(network)
    await relay.start(server.sockets[0].getsockname()[1])
    try:
        yield relay
    finally:
        relay.close()
        server.close()
        await asyncio.sleep(0.05)


async def quickest(exchange: Callable[[], Awaitable[float]], at_least: float, below: float) -> None:
    """Checks that every exchange takes `at_least` seconds, and that one of 20 takes less than `below`."""
    for _ in range(20):
        seconds = await exchange()
        assert at_least <= seconds
        if seconds < below:
            return
    pytest.fail(f"each took {below} s or more")


async def sent(relay: Relay, data: bytes) -> tuple[bytes, float]:
    """(the bytes that came back, seconds)"""
    reader, writer = await asyncio.open_connection("127.0.0.1", relay.port)
    began = time.perf_counter()
    writer.write(data)
    writer.write_eof()
    answer = await reader.read(-1)
    seconds = time.perf_counter() - began
    writer.close()
    return answer, seconds


async def test_every_byte_is_delayed_each_way() -> None:
    async with relayed(EmulatedNetwork(delay_seconds=DELAY)) as relay:
        for size in (1, 3_000_000):
            data = bytes(range(256)) * (size // 256) + b"x"

            async def exchange(data: bytes = data) -> float:
                answer, seconds = await sent(relay, data)
                assert answer == data
                return seconds

            await quickest(exchange, 2 * DELAY, 2 * DELAY + 1.0)


async def test_the_link_limits_bytes_per_second_each_way() -> None:
    async with relayed(EmulatedNetwork(bytes_per_second=5e6)) as relay:

        async def exchange() -> float:
            """Both directions at the same time, as chunks come."""
            data = b"x" * 2_000_000
            answer, seconds = await sent(relay, data)
            assert answer == data
            return seconds

        await quickest(exchange, 0.4, 1.2)


async def test_connections_of_a_pod_share_its_link() -> None:
    async with relayed(EmulatedNetwork(bytes_per_second=5e6)) as relay:

        async def exchange() -> float:
            began = time.perf_counter()
            await asyncio.gather(*(sent(relay, b"x" * 500_000) for _ in range(4)))
            return time.perf_counter() - began

        await quickest(exchange, 0.4, 1.2)


async def test_a_broken_connection_breaks_on_the_other_side() -> None:
    async with relayed(EmulatedNetwork(delay_seconds=0.01)) as relay:
        reader, writer = await asyncio.open_connection("127.0.0.1", relay.port)
        writer.write(b"x")
        assert await reader.read(1) == b"x"
        relay.close()
        with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
            await reader.readexactly(1)
        writer.close()
