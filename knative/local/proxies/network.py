"""A network between pods that is slower than loopback: a TCP relay in front of a port, without root.

Every byte arrives a delay later, in both directions, and no faster than the link carries. A link belongs to one pod and is
shared by all its connections, each direction for itself. As many bytes may be on their way as there are.
"""

import asyncio
import contextlib
import time
from dataclasses import dataclass
from typing import Final

_CHUNK_BYTES: Final = 2**16
_TICK_SECONDS: Final = 0.001
"""A loop's clock: what it is to wake for comes up to so much later, which is long on a link of a tenth of it."""


@dataclass(frozen=True, slots=True)
class Network:
    """Of one pod's link."""

    delay_seconds: float = 0.0
    """Each way."""
    bytes_per_second: float | None = None
    """Each way; None: no bound."""

    @property
    def is_loopback(self) -> bool:
        return not self.delay_seconds and self.bytes_per_second is None


class Relay:
    """Listens on 127.0.0.1 and carries what comes to `port` and back."""

    def __init__(self, network: Network) -> None:
        self.port = 0
        self._network = network
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._free_at = {"to": 0.0, "back": 0.0}
        """When the link has carried all that was given to it so far, by direction."""

    async def start(self, port: int) -> None:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await self._serve(port, reader, writer)

        self._server = await asyncio.start_server(serve, "127.0.0.1", 0, limit=_CHUNK_BYTES)
        self.port = self._server.sockets[0].getsockname()[1]

    def close(self) -> None:
        """Stops listening and breaks what is open."""
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
        """What comes is written when its time has come, in order, and the end as well."""
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
        """When so many bytes that come now have arrived."""
        rate = self._network.bytes_per_second
        carried = max(now, self._free_at[direction]) + (size / rate if rate else 0.0)
        self._free_at[direction] = carried if rate else 0.0
        return carried + self._network.delay_seconds


async def _wait_until(due: float, loop: asyncio.AbstractEventLoop) -> None:
    """More exactly than the loop can."""
    if due - loop.time() > _TICK_SECONDS:
        await asyncio.sleep(due - loop.time() - _TICK_SECONDS)
    if (left := due - loop.time()) > 0:
        await loop.run_in_executor(None, time.sleep, left)
