"""Functions of a few lines with a real queue-proxy in front, for tests of how the proxy treats their answers."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import aiohttp

from knative.local.proxies.queue_proxy import QueueProxy, RequestLimits
from knative.local.proxies.timeouts import Timeouts

# Gets a request's head, and the streams for its body and the answer; the connection is closed when it returns.
Function = Callable[[bytes, asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
_PATIENT = Timeouts(120)
OPEN_ENDED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


@asynccontextmanager
async def behind_queue_proxy(
    function: Function, timeouts: Timeouts = _PATIENT, *, concurrency: int = 0, full_duplex: bool = False
) -> AsyncIterator[tuple[aiohttp.ClientSession, str]]:
    """A client, and the URL of the function's queue-proxy."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await function(await reader.readuntil(b"\r\n\r\n"), reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    proxy = QueueProxy(RequestLimits(concurrency, timeouts, full_duplex))
    await proxy.start()
    proxy.connect(server.sockets[0].getsockname()[1])
    try:
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=120)) as session:
            yield session, f"http://127.0.0.1:{proxy.port}"
    finally:
        proxy.close()
        server.close()
        await asyncio.sleep(0)
