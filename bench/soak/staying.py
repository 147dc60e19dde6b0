"""Clients that hold what they can for as long as they can: half-sent heads and bodies, single bytes, answers left unread."""

import asyncio
import contextlib
import random
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Final

from bench.soak.records import GATEWAY
from bench.soak.target import Connection, Kind, Outcomes, Target

_GATEWAY_CONNECTIONS: Final = 400
_STAGE_CONNECTIONS: Final = 50  # of a kind: two kinds together are more than a function has threads
_URL_CONNECTIONS: Final = 50
_DRIPPING: Final = 20
_STALLED: Final = 6
_FOR_EVER_SECONDS: Final = 3600.0  # until the lull ends it


async def half_head(target: Target, dice: random.Random, outcomes: Outcomes) -> None:
    await _everywhere(target, outcomes, lambda service: target.head("/", 10)[:-4])


async def half_body(target: Target, dice: random.Random, outcomes: Outcomes) -> None:
    """A stage listens to nobody without the pipeline's token, except to what says that it is signed."""

    def half(service: str | None) -> bytes:
        if service in (None, GATEWAY):
            return target.head("/v1/completions", 1000) + b'{"model": '
        return target.head("/", 1000, authorization="", ce_signature="0" * 64) + b"{"

    await _everywhere(target, outcomes, half)


async def drips(target: Target, dice: random.Random, outcomes: Outcomes) -> None:
    """A byte a second, of a body that would take a day."""

    async def send(connection: Connection) -> None:
        await connection.send(target.head("/v1/completions", 86_400))
        while not connection.reader.at_eof():
            await connection.send(b" ")
            await asyncio.sleep(1)

    async with asyncio.TaskGroup() as clients:
        for number in range(_DRIPPING):
            service = GATEWAY if number % 2 and GATEWAY in target.services else None
            clients.create_task(_hold(target, service, send, outcomes))


async def stalls_reading(target: Target, dice: random.Random, outcomes: Outcomes) -> None:
    """Wants a stream and reads nothing of it, with the smallest buffer there is."""
    async with asyncio.TaskGroup() as clients:
        for _ in range(_STALLED):
            clients.create_task(_stall(target, target.some_way(dice), outcomes))


async def _stall(target: Target, service: str | None, outcomes: Outcomes) -> None:
    outcome = "held until the lull"
    try:
        async with target.connect(service, buffer_bytes=2048) as connection:
            await connection.send(target.completion("Count to a thousand.", 400, stream=True))
            connection.writer.transport.pause_reading()  # type: ignore[attr-defined]
            await asyncio.sleep(_FOR_EVER_SECONDS)
    except (OSError, KeyError):
        outcome = "closed"
    finally:
        outcomes[outcome] += 1


async def _everywhere(target: Target, outcomes: Outcomes, half: Callable[[str | None], bytes]) -> None:
    counts: dict[str | None, int] = {None: _URL_CONNECTIONS}
    counts |= {service: _GATEWAY_CONNECTIONS if service == GATEWAY else _STAGE_CONNECTIONS for service in target.services}
    async with asyncio.TaskGroup() as clients:
        for service, count in counts.items():
            for _ in range(count):
                clients.create_task(_hold(target, service, partial(_send, half(service)), outcomes))


async def _send(data: bytes, connection: Connection) -> None:
    await connection.send(data)


async def _hold(target: Target, service: str | None, send: Callable[[Connection], Awaitable[None]], outcomes: Outcomes) -> None:
    """Until the server has enough of it, or the lull comes."""
    outcome = "held until the lull"
    try:
        async with target.connect(service) as connection, asyncio.TaskGroup() as both:
            sending = both.create_task(_quietly(send(connection)))
            outcome = await connection.status(_FOR_EVER_SECONDS)
            sending.cancel()
    except (OSError, KeyError):
        outcome = "closed"
    finally:
        outcomes[outcome] += 1


async def _quietly(sending: Awaitable[None]) -> None:
    with contextlib.suppress(OSError):
        await sending


STAYING: Final = (
    Kind("half a head, and stays", half_head, 5.0),
    Kind("half a body, and stays", half_body, 5.0),
    Kind("a byte a second", drips, 5.0),
    Kind("reads nothing of its stream", stalls_reading, 5.0),
)
