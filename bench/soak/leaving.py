"""Clients that want a long answer and are gone before it ends: plain and streaming, chat, completion and event."""

import asyncio
import random
from typing import Final

import msgspec

from bench.soak.target import Connection, Kind, Outcomes, Target
from eventing.http.binding import to_binary_http
from eventing.wire.cloud_event import json_event
from eventing.wire.events import EventType
from eventing.wire.generation import GenerateRequest

_LONG_TOKENS: Final = 400
_PROMPT: Final = "Tell the story of a lighthouse."


async def leaves_plain(target: Target, dice: random.Random, outcomes: Outcomes) -> None:
    """Before the answer, of which nothing can be written to it: the server has to look."""
    async with target.connect(target.some_way(dice)) as connection:
        await connection.send(_request(target, dice, stream=False))
        status = await connection.status(dice.uniform(0.0, 3.0))
        _leave(connection, dice)
    outcomes["left" if status == "silent" else status] += 1


async def leaves_stream(target: Target, dice: random.Random, outcomes: Outcomes) -> None:
    async with target.connect(target.some_way(dice)) as connection:
        await connection.send(_request(target, dice, stream=True))
        status = await connection.status()
        for _ in range(dice.randrange(5)):
            async with asyncio.timeout(5):
                await connection.reader.read(256)
        _leave(connection, dice)
    outcomes[f"{status}, left" if status == "200" else status] += 1


def _leave(connection: Connection, dice: random.Random) -> None:
    if dice.random() < 0.5:
        connection.reset_on_close()


def _request(target: Target, dice: random.Random, *, stream: bool) -> bytes:
    match dice.randrange(3):
        case 0:
            return target.completion(_PROMPT, _LONG_TOKENS, stream=stream)
        case 1:
            messages = [{"role": "user", "content": _PROMPT}]
            body = {"model": target.plan.model, "messages": messages, "max_tokens": _LONG_TOKENS, "stream": stream}
            return target.post("/v1/chat/completions", msgspec.json.encode(body))
    event = json_event(EventType.GENERATE_REQUEST, "bench/soak", GenerateRequest(_PROMPT, max_tokens=_LONG_TOKENS))
    headers, pieces = to_binary_http(event)
    accept = "text/event-stream" if stream else "application/json"
    return target.post("/", b"".join(pieces), **{**headers, "accept": accept})


LEAVING: Final = (
    Kind("leaves before a plain answer", leaves_plain, 0.7),
    Kind("leaves in a stream", leaves_stream, 0.7),
)
