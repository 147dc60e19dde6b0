"""How much running answers slow down while a prompt of 4k tokens is admitted."""

import asyncio
import time
from dataclasses import dataclass
from typing import Final

import aiohttp

from bench.serving.client import Answer, Client
from bench.serving.requests import Requests

_RUNNING: Final = 8
_TOKENS: Final = 400
_BEFORE: Final = 40
"""Tokens of each running answer before the long prompt comes."""
_TIMEOUT: Final = aiohttp.ClientTimeout(total=300)


@dataclass(frozen=True, slots=True)
class Interference:
    """Seconds between one token and the next of running answers."""

    alone: list[float]
    """Before the long prompt came."""
    during: list[float]
    """Gaps that began or ended while it was admitted."""
    first_token_seconds: float
    """Of the long prompt."""


async def measure_interference(client: Client, requests: Requests) -> Interference:
    async with aiohttp.ClientSession(timeout=_TIMEOUT, raise_for_status=True) as session:
        answers = [Answer(0.0) for _ in range(_RUNNING)]
        asked = zip(requests.decoding(_RUNNING, _TOKENS), answers, strict=True)
        tasks = [asyncio.create_task(client.stream(session, request, answer)) for request, answer in asked]
        while any(len(answer.moments) < _BEFORE for answer in answers):
            await asyncio.sleep(0.05)
        began = time.perf_counter()
        long = await client.stream(session, requests.long())
        ended = time.perf_counter()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    gaps = [pair for answer in answers for pair in zip(answer.moments[5:], answer.moments[6:], strict=False)]
    return Interference(
        [later - earlier for earlier, later in gaps if later <= began],
        [later - earlier for earlier, later in gaps if later > began and earlier < ended],
        long.first_token_seconds,
    )
