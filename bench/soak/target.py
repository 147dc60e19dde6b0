"""What hostile clients attack: the gateway's URL and every process at its own port, over connections byte by byte."""

import asyncio
import contextlib
import random
import socket
import struct
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import urlsplit

import aiohttp
import msgspec

from bench.soak.records import HOSTILE, Plan, is_gateway, named_pods

ANSWER_SECONDS: Final = 20.0  # how long a hostile client waits for an answer that it wants to see
_RESET: Final = struct.pack("ii", 1, 0)  # SO_LINGER: closing sends RST, like a killed client

Outcomes = Counter[str]


@dataclass(frozen=True, slots=True)
class Connection:
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def status(self, seconds: float = ANSWER_SECONDS) -> str:
        """The reply's status; "closed": no reply; "silent": nothing happened within `seconds`."""
        try:
            async with asyncio.timeout(seconds):
                line = await self.reader.readline()
        except TimeoutError:
            return "silent"
        except (OSError, ValueError):
            return "closed"
        parts = line.split()
        return parts[1].decode(errors="replace") if len(parts) > 1 and line.startswith(b"HTTP/") else "closed"

    def reset_on_close(self) -> None:
        sock: socket.socket = self.writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)


class Target:
    def __init__(self, plan: Plan, session: aiohttp.ClientSession) -> None:
        self.plan = plan
        self._session = session
        self._ports: dict[str, int] = {}

    async def look(self) -> None:
        """Reads the functions' ports. Raises aiohttp.ClientError."""
        async with self._session.get(f"{self.plan.admin_url}/status") as reply:
            status = await reply.json()
        self._ports = function_ports(status, self.plan.services)

    @property
    def services(self) -> list[str]:
        """Services with a running process."""
        return list(self._ports)

    def address(self, service: str | None) -> tuple[str, int]:
        """service: None for the gateway's URL. Raises KeyError if it has no process."""
        if service is not None:
            return "127.0.0.1", self._ports[service]
        parts = urlsplit(self.plan.url)
        return parts.hostname or "127.0.0.1", parts.port or 80

    def some_way(self, dice: random.Random) -> str | None:
        """A random way to a gateway: the Service's URL (None), or one's own port."""
        return dice.choice([None, *filter(is_gateway, self._ports)])

    @contextlib.asynccontextmanager
    async def connect(self, service: str | None, buffer_bytes: int = 2**16) -> AsyncIterator[Connection]:
        """Raises OSError, KeyError."""
        host, port = self.address(service)
        sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer_bytes)
        try:
            await asyncio.get_running_loop().sock_connect(sock, (host, port))
            reader, writer = await asyncio.open_connection(sock=sock, limit=buffer_bytes)
        except BaseException:
            sock.close()
            raise
        try:
            yield Connection(reader, writer)
        finally:
            writer.close()

    def head(self, path: str, length: int | None, **headers: str) -> bytes:
        """The head of a POST. length: None: no Content-Length. headers: with _ for -; an empty one is left out."""
        all_headers = {
            "host": "soak",
            "authorization": f"Bearer {self.plan.keys[HOSTILE]}",
            "content-type": "application/json",
            **({} if length is None else {"content-length": str(length)}),
            **{name.replace("_", "-"): value for name, value in headers.items()},
        }
        lines = [f"POST {path} HTTP/1.1", *(f"{name}: {value}" for name, value in all_headers.items() if value), "", ""]
        return "\r\n".join(lines).encode("latin-1")

    def post(self, path: str, body: bytes, **headers: str) -> bytes:
        return self.head(path, len(body), **headers) + body

    def completion(self, prompt: str, max_tokens: int, **more: Any) -> bytes:
        body = {"model": self.plan.model, "prompt": prompt, "max_tokens": max_tokens, **more}
        return self.post("/v1/completions", msgspec.json.encode(body))

    def chat(self, text: str, max_tokens: int, **more: Any) -> bytes:
        messages = [{"role": "user", "content": text}]
        body = {"model": self.plan.model, "messages": messages, "max_tokens": max_tokens, **more}
        return self.post("/v1/chat/completions", msgspec.json.encode(body))

    async def token_ids(self, text: str) -> list[int]:
        """Those of a chat with one message; none if the request is refused. Raises aiohttp.ClientError."""
        headers = {"authorization": f"Bearer {self.plan.keys[HOSTILE]}"}
        body = {"messages": [{"role": "user", "content": text}]}
        async with self._session.post(f"{self.plan.url}/tokenize", json=body, headers=headers) as reply:
            found: list[int] = (await reply.json())["tokens"] if reply.ok else []
        return found

    async def answered(self, service: str | None, data: bytes) -> str:
        """The status of the reply to a whole request; "closed" also if the request is not read to its end."""
        async with self.connect(service) as connection:
            with contextlib.suppress(ConnectionError):
                async with asyncio.timeout(ANSWER_SECONDS):
                    await connection.send(data)
            return await connection.status()


def function_ports(status: Mapping[str, Any], services: Mapping[str, str]) -> dict[str, int]:
    """Name in the records → port of its process, from the platform's status document."""
    ports = {name: pod["function_port"] for name, pod in named_pods(status, services).items()}
    return {name: port for name, port in ports.items() if port is not None}


SERVED: Final = "2..|500"


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of hostile client."""

    name: str
    attack: Callable[[Target, random.Random, Outcomes], Awaitable[None]]
    pause_seconds: float  # between two attempts
    never: str = "500"  # pattern of outcomes that are defects; SERVED if its requests are invalid
