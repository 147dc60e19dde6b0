"""The client of `bench.serving`: streamed completions over the OpenAI API, so that all servers are measured alike."""

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


@dataclass(frozen=True, slots=True)
class Measurement:
    """One contender's figures for one workload. A list is empty if the contender does not report it."""

    seconds: float  # from the first request to the last token
    tokens: int  # generated, up to the number asked for
    first_token_seconds: list[float] = field(default_factory=list)
    gap_seconds: list[float] = field(default_factory=list)  # between one piece of text and the next of the same answer
    cpu_seconds: float = 0.0


@dataclass(slots=True)
class _Answer:
    began: float  # by time.perf_counter
    moments: list[float] = field(default_factory=list)  # when text came
    tokens: int = 0  # as the server counts them


class Client:
    """Asks one server. options: further fields of each request."""

    def __init__(self, url: str, model: str, options: dict[str, Any]) -> None:
        self._url = f"{url}/v1/completions"
        self._fixed = {"model": model, "temperature": 0, "stream": True, "stream_options": {"include_usage": True}, **options}

    async def measure(self, requests: Sequence[Request]) -> Measurement:
        """Asks all requests at once. Raises aiohttp.ClientError for one that fails."""
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(timeout=_TIMEOUT, connector=connector, raise_for_status=True) as session:
            began = time.perf_counter()
            answers = await asyncio.gather(*(self._stream(session, request) for request in requests))
            seconds = time.perf_counter() - began
        return Measurement(
            seconds,
            sum(answer.tokens for answer in answers),
            [answer.moments[0] - answer.began for answer in answers],
            [later - earlier for answer in answers for earlier, later in pairwise(answer.moments)],
        )

    async def _stream(self, session: aiohttp.ClientSession, request: Request) -> _Answer:
        answer = _Answer(time.perf_counter())
        asked = {**self._fixed, "prompt": request.text, "max_tokens": request.max_tokens}
        async with session.post(self._url, json=asked) as reply:
            async for line in reply.content:
                if not line.startswith(_DATA) or (data := line[len(_DATA) :].strip()) == _DONE:
                    continue
                document = msgspec.json.decode(data)
                if any(choice.get("text") for choice in document.get("choices", ())):
                    answer.moments.append(time.perf_counter())
                if usage := document.get("usage"):
                    answer.tokens = usage["completion_tokens"]
                if "error" in document:
                    raise RuntimeError(f"the answer broke off: {document['error']}")
        return answer
