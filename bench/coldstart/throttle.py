"""TCP proxies with a limited rate, like the network interface of a pod: one proxy for each pod.

    python -m bench.coldstart.throttle --upstream 127.0.0.1:9000 --bytes-per-second 50e6 --count 3

Prints a JSON list of its ports, and runs until its stdin is closed. Bytes from clients are not limited.
"""

import asyncio
import contextlib
import json
import socket
import sys
from typing import Final

import click

_CHUNK_BYTES: Final = 2**18
_BURST_SECONDS: Final = 0.02  # credit of a silent connection: a network card's queue, not a quota


class TokenBucket:
    """Delays senders so that together they keep to the rate, in the order of their calls. Time is the event loop's."""

    def __init__(self, bytes_per_second: float) -> None:
        self._rate = bytes_per_second
        self._paid_until = 0.0

    async def take(self, count: int) -> None:
        now = asyncio.get_running_loop().time()
        self._paid_until = max(self._paid_until, now - _BURST_SECONDS) + count / self._rate
        await asyncio.sleep(max(0.0, self._paid_until - now))


class Throttle:
    """One proxy: all of its connections share its rate. A context manager; its value is the port."""

    def __init__(self, upstream: tuple[str, int], bytes_per_second: float) -> None:
        self._upstream = upstream
        self._bucket = TokenBucket(bytes_per_second)
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> int:
        listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        listener.setblocking(False)
        self._tasks.add(asyncio.create_task(self._accept(listener)))
        port: int = listener.getsockname()[1]
        return port

    async def __aexit__(self, *_: object) -> None:
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        with listener:
            while True:
                client, _ = await loop.sock_accept(listener)
                task = asyncio.create_task(self._serve(client))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)

    async def _serve(self, client: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        server = socket.socket()
        with client, server, contextlib.suppress(OSError):
            for end in (client, server):
                end.setblocking(False)
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                # Small, or the kernel's buffers let megabytes through before the rate is felt.
                end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _CHUNK_BYTES)
            server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _CHUNK_BYTES)
            await loop.sock_connect(server, self._upstream)
            up = asyncio.create_task(_pass_on(client, server, None))
            try:
                await _pass_on(server, client, self._bucket)
            finally:
                up.cancel()
                await asyncio.gather(up, return_exceptions=True)


async def _pass_on(source: socket.socket, target: socket.socket, bucket: TokenBucket | None) -> None:
    loop, buffer = asyncio.get_running_loop(), memoryview(bytearray(_CHUNK_BYTES))
    while count := await loop.sock_recv_into(source, buffer):
        if bucket is not None:
            await bucket.take(count)
        await loop.sock_sendall(target, buffer[:count])
    target.shutdown(socket.SHUT_WR)


async def _run(upstream: tuple[str, int], bytes_per_second: float, count: int) -> None:
    async with contextlib.AsyncExitStack() as stack:
        ports = [await stack.enter_async_context(Throttle(upstream, bytes_per_second)) for _ in range(count)]
        print(json.dumps(ports), flush=True)
        await asyncio.to_thread(sys.stdin.read)


@click.command()
@click.option("--upstream", required=True, help="HOST:PORT")
@click.option("--bytes-per-second", type=click.FloatRange(min=1), required=True)
@click.option("--count", type=click.IntRange(min=1), default=1, show_default=True)
def main(upstream: str, bytes_per_second: float, count: int) -> None:
    """Proxies in front of UPSTREAM, each with this rate towards its clients."""
    host, _, port = upstream.rpartition(":")
    asyncio.run(_run((host, int(port)), bytes_per_second, count))


if __name__ == "__main__":
    main()
