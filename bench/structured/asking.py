"""Asks a gateway for structured answers, several at a time."""

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

import aiohttp

from bench.structured.cases import case

AT_ONCE: Final = 8
TIMEOUT: Final = aiohttp.ClientTimeout(total=600)


@dataclass(frozen=True, slots=True)
class Ended:
    """One answer."""

    number: int
    text: str
    finish_reason: str
    tokens: int

    @property
    def fits(self) -> bool:
        """Whether the answer matches; one that ran into max_tokens need not."""
        return self.finish_reason == "length" or case(self.number).fits(self.text)


async def ask_all(url: str, model: str, numbers: Iterable[int], max_tokens: int, found: dict[int, Ended]) -> None:
    """Asks these cases at temperature 1, and adds the answers to `found`. Raises AssertionError for any status but 200."""
    left = iter(numbers)

    async def keep_asking(session: aiohttp.ClientSession) -> None:
        for number in left:
            found[number] = await _ask(session, model, number, max_tokens)

    async with aiohttp.ClientSession(url, timeout=TIMEOUT) as session, asyncio.TaskGroup() as clients:
        for _ in range(AT_ONCE):
            clients.create_task(keep_asking(session))


async def _ask(session: aiohttp.ClientSession, model: str, number: int, max_tokens: int) -> Ended:
    body: dict[str, Any] = {
        "model": model,
        "messages": [{"role": "user", "content": f"Make one up, number {number}."}],
        "max_tokens": max_tokens,
        "temperature": 1,
        "seed": number,
        **case(number).options,
    }
    answer = await answered(session, "/v1/chat/completions", body)
    choice = answer["choices"][0]
    return Ended(number, choice["message"]["content"], choice["finish_reason"], answer["usage"]["completion_tokens"])


async def answered(session: aiohttp.ClientSession, path: str, body: dict[str, Any]) -> dict[str, Any]:
    async with session.post(path, json=body) as reply:
        answer: dict[str, Any] = await reply.json()
        assert reply.status == 200, f"seed {body['seed']}: {reply.status} {answer}"
    return answer
