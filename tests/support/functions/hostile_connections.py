"""The peak memory of one gateway under 200 hostile connections.

A quarter each: bodies of 8 MiB whose last bytes come slowly, heads of 60 KB that never end, streams that are hardly read, and
bodies without end to a path that does not exist. Whatever the gateway closes is opened again at once.
"""

import asyncio
import contextlib
import socket
import time
from collections.abc import Awaitable, Callable
from typing import Final
from urllib.parse import urlsplit

import msgspec

from knative.local.kubelet.processes import memory_bytes

CONNECTIONS: Final = 200
_BODY_BYTES: Final = 2**23
_HEAD_BYTES: Final = 60_000
_SMALL_BUFFER_BYTES: Final = 4096
_DRIP_SECONDS: Final = 1.0
_SAMPLE_SECONDS: Final = 0.02

Attack = Callable[[asyncio.StreamReader, asyncio.StreamWriter, str], Awaitable[None]]


async def slow_body(_: asyncio.StreamReader, writer: asyncio.StreamWriter, model: str) -> None:
    """All but the last KiB comes as fast as it is taken."""
    start = msgspec.json.encode({"model": model, "prompt": "Hello", "max_tokens": 1})
    await _send(writer, _head("/v1/completions", f"Content-Length: {_BODY_BYTES}") + start.ljust(_BODY_BYTES - 1024))
    await _drip(writer, b" ")


async def slow_head(_: asyncio.StreamReader, writer: asyncio.StreamWriter, model: str) -> None:
    await _send(writer, b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nX-Large: " + b"x" * _HEAD_BYTES)
    await _drip(writer, b"x")


async def slow_reader(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, model: str) -> None:
    fields = {"model": model, "prompt": "Go on", "max_tokens": 200, "n": 8, "logprobs": 5, "stream": True, "ignore_eos": True}
    body = msgspec.json.encode(fields)
    await _send(writer, _head("/v1/completions", f"Content-Length: {len(body)}") + body)
    while await reader.read(1024):
        await asyncio.sleep(_DRIP_SECONDS)


async def endless_body(_: asyncio.StreamReader, writer: asyncio.StreamWriter, model: str) -> None:
    await _send(writer, _head("/nothing", "Transfer-Encoding: chunked"))
    while True:
        await _send(writer, b"10000\r\n" + bytes(2**16) + b"\r\n")


ATTACKS: Final[tuple[Attack, ...]] = (slow_body, slow_head, slow_reader, endless_body)


async def peak_memory(url: str, pid: int, seconds: float, model: str, connections: int = CONNECTIONS) -> tuple[int, int, int]:
    """Attacks the gateway at `url` for so many seconds. Returns the process's bytes of memory: before, at the peak, and after.

    Memory is private and shared memory without mapped files. model: the name under which the gateway serves.
    """
    before = peak = memory_bytes(pid)
    until = time.monotonic() + seconds
    clients = [
        asyncio.create_task(_keep_attacking(ATTACKS[number % len(ATTACKS)], url, model)) for number in range(connections)
    ]
    while time.monotonic() < until:
        peak = max(peak, memory_bytes(pid))
        await asyncio.sleep(_SAMPLE_SECONDS)
    for client in clients:
        client.cancel()
    for ended in await asyncio.gather(*clients, return_exceptions=True):
        if isinstance(ended, Exception):
            raise ended
    await asyncio.sleep(5 * _DRIP_SECONDS)
    return before, peak, memory_bytes(pid)


async def _keep_attacking(attack: Attack, url: str, model: str) -> None:
    parts = urlsplit(url)
    while True:
        sock = socket.socket()
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _SMALL_BUFFER_BYTES)
        with contextlib.suppress(OSError), contextlib.closing(sock):
            await asyncio.get_running_loop().sock_connect(sock, (parts.hostname, parts.port))
            reader, writer = await asyncio.open_connection(sock=sock, limit=_SMALL_BUFFER_BYTES)
            try:
                await attack(reader, writer, model)
            finally:
                writer.transport.abort()
        await asyncio.sleep(0.01)


def _head(path: str, framing: str) -> bytes:
    return f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n{framing}\r\n\r\n".encode()


async def _send(writer: asyncio.StreamWriter, data: bytes) -> None:
    writer.write(data)
    await writer.drain()


async def _drip(writer: asyncio.StreamWriter, data: bytes) -> None:
    while True:
        await asyncio.sleep(_DRIP_SECONDS)
        await _send(writer, data)
