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

_TIMEOUT: Final = aiohttp.ClientTimeout(total=600)
_DATA: Final = b"data: "


@dataclass(frozen=True, slots=True)
class Measurement:
    """One contender's figures for one workload. A list is empty if the contender does not report it."""

    seconds: float  # from the first request to the last token
    tokens: int  # generated, up to the number asked for
    first_token_seconds: list[float] = field(default_factory=list)
    gap_seconds: list[float] = field(default_factory=list)  # between one piece of text and the next of the same answer
    cpu_seconds: float = 0.0


class Client:
    """Asks one server. options: further fields of each request."""

    def __init__(self, url: str, model: str, options: dict[str, Any]) -> None:
        self._url = f"{url}/v1/completions"
        usage = {"stream": True, "stream_options": {"include_usage": True}}
        self._fixed = {"model": model, "temperature": 0, **usage, **options}

    async def measure(self, requests: Sequence[Request]) -> Measurement:
        """Asks all requests at once. Raises aiohttp.ClientError for one that fails, RuntimeError for one that breaks off."""
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(timeout=_TIMEOUT, raise_for_status=True, connector=connector) as session:
            began = time.perf_counter()
            answers = await asyncio.gather(*(self._ask(session, request) for request in requests))
            seconds = time.perf_counter() - began
        return Measurement(
            seconds,
            sum(tokens for tokens, _ in answers),
            [moments[1] - moments[0] for _, moments in answers if len(moments) > 1],  # an answer may have no printable text
            [later - earlier for _, moments in answers for earlier, later in pairwise(moments[1:])],
        )

    async def _ask(self, session: aiohttp.ClientSession, request: Request) -> tuple[int, list[float]]:
        """Tokens as the server counts them, and the moments of the request and of each piece of text."""
        tokens, moments = 0, [time.perf_counter()]
        body = {**self._fixed, "prompt": request.text, "max_tokens": request.max_tokens}
        async with session.post(self._url, json=body) as reply:
            async for line in reply.content:
                if not line.startswith(_DATA + b"{"):
                    continue
                document = msgspec.json.decode(line.removeprefix(_DATA), type=dict[str, Any])
                if "error" in document:
                    raise RuntimeError(f"the answer broke off: {document['error']}")
                if any(choice.get("text") for choice in document.get("choices", ())):
                    moments.append(time.perf_counter())
                if usage := document.get("usage"):
                    tokens = usage["completion_tokens"]
        return tokens, moments
