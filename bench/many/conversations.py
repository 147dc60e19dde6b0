"""Conversations that are open at the same time, read cheaply: the reader shares the cores with the measured gateway."""

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Final
from urllib.parse import urlsplit

_END_OF_EVENT: Final = b"\n\n"
_TOKEN: Final = b'"finish_reason":null'  # in every event with a token's text, and in no other
_DONE: Final = b"data: [DONE]"
_ANSWER_SECONDS: Final = 240.0


@dataclass(slots=True)
class Conversation:
    """One streamed answer. Moments by `time.perf_counter`."""

    began: float
    moments: list[float] = field(default_factory=list)  # when bytes with tokens came
    tokens: int = 0
    error: str = ""

    @property
    def gaps(self) -> list[float]:
        return [later - earlier for earlier, later in pairwise(self.moments)]


async def converse(urls: Sequence[str], model: str, count: int, max_tokens: int) -> list[Conversation]:
    """Holds `count` conversations at once, distributed over the gateways in turn."""
    asked = {"model": model, "stream": True, "temperature": 0, "max_tokens": max_tokens}
    return await asyncio.gather(
        *(ask(urls[number % len(urls)], {**asked, "prompt": f"Say it {number} times"}, max_tokens) for number in range(count))
    )


async def ask(url: str, asked: dict[str, object], wanted_tokens: int) -> Conversation:
    """One streamed answer. asked: the request. Its error says if there are not `wanted_tokens`."""
    found = Conversation(time.perf_counter())
    try:
        await asyncio.wait_for(_read(url, asked, found), _ANSWER_SECONDS)
        if found.tokens != wanted_tokens:
            found.error = f"{found.tokens} tokens of {wanted_tokens}"
    except (OSError, EOFError, TimeoutError, ValueError) as error:
        found.error = str(error) or type(error).__name__
    return found


async def _read(url: str, asked: dict[str, object], found: Conversation) -> None:
    """Counts server-sent events without parsing them."""
    parts = urlsplit(url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    try:
        body = json.dumps(asked).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {parts.netloc}\r\nContent-Type: application/json\r\n"
        writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        head_lines = await reader.readuntil(b"\r\n\r\n")
        if not head_lines.startswith(b"HTTP/1.1 200"):
            raise ValueError(head_lines.split(b"\r\n", 1)[0].decode("latin-1"))
        rest = b""
        while data := await reader.read(2**16):
            *events, rest = (rest + data).split(_END_OF_EVENT)
            tokens = sum(_TOKEN in event for event in events)
            if tokens:
                found.moments.append(time.perf_counter())
                found.tokens += tokens
            if any(_DONE in event for event in events):
                return
        raise EOFError("the answer broke off")
    finally:
        writer.close()
