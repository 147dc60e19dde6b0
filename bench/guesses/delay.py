"""A network between gateway and stages: TCP relays on which every byte arrives so many seconds later, in both directions."""

import asyncio
import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import Final
from urllib.parse import urlsplit

_CHUNK_BYTES: Final = 2**18
_STOP_SECONDS: Final = 10.0


@contextlib.contextmanager
def delayed(urls: Sequence[str], seconds: float) -> Iterator[list[str]]:
    """URLs behind which `urls` answer, `seconds` away each way. As many bytes may be on their way as there are."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="delays", daemon=True)
    thread.start()
    servers = [asyncio.run_coroutine_threadsafe(_relay(url, seconds), loop).result(_STOP_SECONDS) for url in urls]
    try:
        yield [f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}" for server in servers]
    finally:
        asyncio.run_coroutine_threadsafe(_end(servers), loop).result(_STOP_SECONDS)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(_STOP_SECONDS)
        loop.close()


async def _relay(url: str, seconds: float) -> asyncio.Server:
    upstream = urlsplit(url)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # Cancelled at the end: asyncio's callback of a connection's task raises again whatever it was cancelled with.
        with contextlib.suppress(OSError, asyncio.CancelledError), contextlib.closing(writer):
            to, back = await asyncio.open_connection(upstream.hostname, upstream.port, limit=_CHUNK_BYTES)
            with contextlib.closing(back):
                await asyncio.gather(_carry(reader, back, seconds), _carry(to, writer, seconds))

    return await asyncio.start_server(serve, "127.0.0.1", 0, limit=_CHUNK_BYTES)


async def _carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, seconds: float) -> None:
    """What comes is written when its time has come, in order, and the end as well."""
    loop = asyncio.get_running_loop()
    arriving: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()

    async def arrive() -> None:
        while True:
            due, data = await arriving.get()
            await asyncio.sleep(max(0.0, due - loop.time()))
            if not data:
                break
            writer.write(data)
            await writer.drain()

    delivery = asyncio.create_task(arrive())
    with contextlib.suppress(OSError):
        while data := await reader.read(_CHUNK_BYTES):
            arriving.put_nowait((loop.time() + seconds, data))
    arriving.put_nowait((loop.time() + seconds, b""))
    with contextlib.suppress(OSError):
        await delivery
        writer.write_eof()


async def _end(servers: Sequence[asyncio.Server]) -> None:
    for server in servers:
        server.close()
    own = asyncio.current_task()
    others = [task for task in asyncio.all_tasks() if task is not own]
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
    await asyncio.sleep(0)  # Transports close their sockets when the loop comes round.
