"""The client of `bench.serving`: completions over the OpenAI API, streamed, so that all servers are measured alike."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Final

import aiohttp
import msgspec

from bench.serving.requests import Request

_DATA: Final = b"data: "
_DONE: Final = b"[DONE]"
_TIMEOUT: Final = aiohttp.ClientTimeout(total=300)


@dataclass(slots=True)
class Answer:
    """One streamed answer; moments by `time.perf_counter`."""

    began: float
    moments: list[float] = field(default_factory=list)
    """When text came."""
    tokens: int = 0
    """As the server counts them."""

    @property
    def first_token_seconds(self) -> float:
        return self.moments[0] - self.began

    @property
    def gaps(self) -> list[float]:
        return [later - earlier for earlier, later in pairwise(self.moments)]


@dataclass(frozen=True, slots=True)
class Measurement:
    """What one contender took for one workload. A list is empty where the contender does not tell."""

    seconds: float
    """From the first request to the last token."""
    tokens: int
    """Generated, of those that were asked for."""
    first_token_seconds: list[float] = field(default_factory=list)
    gap_seconds: list[float] = field(default_factory=list)
    """Between one piece of text and the next of the same answer."""
    cpu_seconds: float = 0.0


class Client:
    """url: of the server. options: what it wants besides prompt and length."""

    def __init__(self, url: str, model: str, options: dict[str, Any]) -> None:
        self._url = f"{url}/v1/completions"
        self._fixed = {"model": model, "temperature": 0, "stream": True, "stream_options": {"include_usage": True}, **options}

    async def measure(self, requests: Sequence[Request]) -> Measurement:
        """All of them at once. Raises aiohttp.ClientError where one is not answered."""
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(timeout=_TIMEOUT, connector=connector, raise_for_status=True) as session:
            began = time.perf_counter()
            answers = await asyncio.gather(*(self.stream(session, request) for request in requests))
            seconds = time.perf_counter() - began
        return Measurement(
            seconds,
            sum(answer.tokens for answer in answers),
            [answer.first_token_seconds for answer in answers],
            [gap for answer in answers for gap in answer.gaps],
        )

    async def stream(self, session: aiohttp.ClientSession, request: Request, answer: Answer | None = None) -> Answer:
        """answer: filled while tokens come, for who wants to look in between."""
        answer = answer or Answer(0.0)
        answer.began = time.perf_counter()
        asked = {**self._fixed, "prompt": request.text, "max_tokens": request.max_tokens}
        async with session.post(self._url, json=asked) as reply:
            async for line in reply.content:
                if line.startswith(_DATA) and (data := line[len(_DATA) :].strip()) != _DONE:
                    _take(msgspec.json.decode(data), answer)
        return answer


def _take(document: dict[str, Any], answer: Answer) -> None:
    if any(choice.get("text") for choice in document.get("choices", ())):
        answer.moments.append(time.perf_counter())
    if usage := document.get("usage"):
        answer.tokens = usage["completion_tokens"]
    if "error" in document:
        raise RuntimeError(f"the answer broke off: {document['error']}")
