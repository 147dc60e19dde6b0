"""Emulates a network between pods that is slower than loopback: a TCP relay in front of a port, without root.

Every byte arrives a delay later, in both directions, and no faster than the link carries. A link belongs to one pod. All its
connections share it, each direction for itself. The number of bytes on the way is not limited.
"""

import asyncio
import contextlib
import time
from dataclasses import dataclass
from functools import partial
from typing import Final

_CHUNK_BYTES: Final = 2**16
_TICK_SECONDS: Final = 0.001  # an event loop may wake this much late, too much for a delay of a tenth of it


@dataclass(frozen=True, slots=True)
class EmulatedNetwork:
    """Delay and rate of the link to one pod. With the defaults it is as fast as loopback."""

    delay_seconds: float = 0.0  # each way
    bytes_per_second: float | None = None  # each way; None: no limit


class Relay:
    """Listens on 127.0.0.1 and forwards bytes to another local port and back, with the delay and rate of `network`."""

    def __init__(self, network: EmulatedNetwork) -> None:
        self.port = 0
        self._network = network
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._free_at = {"to": 0.0, "back": 0.0}  # direction → when the link has carried everything given to it so far

    async def start(self, port: int) -> None:
        """Begins to listen on a free port, see `port`. The argument is the port to forward to."""
        self._server = await asyncio.start_server(partial(self._serve, port), "127.0.0.1", 0, limit=_CHUNK_BYTES)
        self.port = self._server.sockets[0].getsockname()[1]

    def close(self) -> None:
        """Stops listening and breaks open connections."""
        if self._server is not None:
            self._server.close()
        for task in list(self._tasks):
            task.cancel()

    async def _serve(self, port: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            with contextlib.suppress(OSError, asyncio.CancelledError):
                to, back = await asyncio.open_connection("127.0.0.1", port, limit=_CHUNK_BYTES)
                try:
                    await asyncio.gather(self._carry(reader, back, "to"), self._carry(to, writer, "back"))
                finally:
                    back.close()
        finally:
            writer.close()
            self._tasks.discard(task)

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, direction: str) -> None:
        """Copies bytes and the end of the stream from `reader` to `writer`, each when it is due. direction: "to" or "back"."""
        loop = asyncio.get_running_loop()
        arriving: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()

        async def arrive() -> None:
            while True:
                due, data = await arriving.get()
                await _wait_until(due, loop)
                if not data:
                    break
                writer.write(data)
                await writer.drain()

        delivery = asyncio.create_task(arrive())
        try:
            with contextlib.suppress(OSError):
                while data := await reader.read(_CHUNK_BYTES):
                    arriving.put_nowait((self._due(loop.time(), len(data), direction), data))
            arriving.put_nowait((self._due(loop.time(), 0, direction), b""))
            with contextlib.suppress(OSError):
                await delivery
                writer.write_eof()
        finally:
            delivery.cancel()

    def _due(self, now: float, size: int, direction: str) -> float:
        """Reserves the link for `size` bytes that are sent now; returns when they arrive, by the event loop's clock."""
        rate = self._network.bytes_per_second
        carried = max(now, self._free_at[direction]) + (size / rate if rate else 0.0)
        self._free_at[direction] = carried if rate else 0.0
        return carried + self._network.delay_seconds


async def _wait_until(due: float, loop: asyncio.AbstractEventLoop) -> None:
    """Sleeps until `due` (by the event loop's clock), more exactly than the event loop can."""
    if due - loop.time() > _TICK_SECONDS:
        await asyncio.sleep(due - loop.time() - _TICK_SECONDS)
    if (left := due - loop.time()) > 0:
        await loop.run_in_executor(None, time.sleep, left)
