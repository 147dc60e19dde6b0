"""Conversations with an OpenAI server: when the first text of an answer came, and what of the prompt was held."""

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import aiohttp

Messages = Sequence[Mapping[str, str]]
_TIMEOUT: Final = aiohttp.ClientTimeout(total=300)


@dataclass(frozen=True, slots=True)
class Answered:
    seconds: float  # to the first text
    text: str
    prompt_tokens: int
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class Server:
    url: str
    model: str
    more: Mapping[str, Any]  # of each request

    def ask(self, messages: Messages, max_tokens: int) -> Answered:
        """Greedy. Raises aiohttp.ClientError."""
        return self.ask_at_once([messages], max_tokens)[0][0]

    def ask_at_once(self, questions: Sequence[Messages], max_tokens: int) -> tuple[list[Answered], float]:
        """And the seconds until all were answered to their end."""
        return asyncio.run(self.answers(questions, max_tokens))

    async def answers(self, questions: Sequence[Messages], max_tokens: int) -> tuple[list[Answered], float]:
        """As `ask_at_once`, in an event loop that runs."""
        async with connections() as session:
            began = time.perf_counter()
            answers = await asyncio.gather(*(self._one(session, messages, max_tokens) for messages in questions))
            return answers, time.perf_counter() - began

    async def pieces(
        self, session: aiohttp.ClientSession, messages: Messages, max_tokens: int
    ) -> AsyncGenerator[dict[str, Any], None]:
        """What is streamed, in OpenAI's words; whoever closes it cancels the answer."""
        asked = {
            "model": self.model,
            "messages": messages,
            "temperature": 0,
            "max_tokens": max_tokens,
            "stream": True,
            "stream_options": {"include_usage": True},
            "ignore_eos": True,
            **self.more,
        }
        async with session.post(f"{self.url}/v1/chat/completions", json=asked) as reply:
            async for line in reply.content:
                if line.startswith(b"data: {"):
                    yield json.loads(line.removeprefix(b"data: "))

    async def _one(self, session: aiohttp.ClientSession, messages: Messages, max_tokens: int) -> Answered:
        began, first, text = time.perf_counter(), 0.0, ""
        usage: dict[str, Any] = {}
        async for document in self.pieces(session, messages, max_tokens):
            usage = document.get("usage") or usage
            said = said_in(document)
            first = first or (time.perf_counter() - began if said else 0.0)
            text += said
        details = usage.get("prompt_tokens_details") or {}
        return Answered(first, text, usage["prompt_tokens"], details.get("cached_tokens", 0))


def connections() -> aiohttp.ClientSession:
    """As many as there are questions."""
    return aiohttp.ClientSession(timeout=_TIMEOUT, raise_for_status=True, connector=aiohttp.TCPConnector(limit=0))


def said_in(document: Mapping[str, Any]) -> str:
    return "".join(choice["delta"].get("content") or "" for choice in document.get("choices", ()))
