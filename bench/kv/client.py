"""Conversations with an OpenAI server: the time of an answer's first text, and the part of the prompt that was cached."""

import asyncio
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp

from bench.client import connections, streamed

Messages = Sequence[Mapping[str, str]]


@dataclass(frozen=True, slots=True)
class Answered:
    seconds: float  # to the first text
    text: str
    prompt_tokens: int
    cached_tokens: int

    @property
    def cached_share(self) -> float:
        """Of the prompt."""
        return self.cached_tokens / self.prompt_tokens


@dataclass(frozen=True, slots=True)
class Server:
    """Asked greedily."""

    url: str
    model: str
    options: Mapping[str, Any]  # further fields of each request

    def ask(self, messages: Messages, max_tokens: int) -> Answered:
        """Raises aiohttp.ClientError."""
        return asyncio.run(self.answers([messages], max_tokens))[0][0]

    async def answers(self, questions: Sequence[Messages], max_tokens: int) -> tuple[list[Answered], float]:
        """Asks all at once; also the seconds until all answers were complete."""
        async with connections() as session:
            began = time.perf_counter()
            answers = await asyncio.gather(*(self._one(session, messages, max_tokens) for messages in questions))
            return answers, time.perf_counter() - began

    def stream(
        self, session: aiohttp.ClientSession, messages: Messages, max_tokens: int
    ) -> AsyncGenerator[dict[str, Any], None]:
        """OpenAI's documents as they come. Closing the generator cancels the answer."""
        asked = {"model": self.model, "messages": messages, "temperature": 0, "max_tokens": max_tokens, "ignore_eos": True}
        return streamed(session, f"{self.url}/v1/chat/completions", {**asked, **self.options})

    async def _one(self, session: aiohttp.ClientSession, messages: Messages, max_tokens: int) -> Answered:
        began, first, text = time.perf_counter(), 0.0, ""
        usage: dict[str, Any] = {}
        async for document in self.stream(session, messages, max_tokens):
            usage = document.get("usage") or usage
            piece = text_in(document)
            first = first or (time.perf_counter() - began if piece else 0.0)
            text += piece
        details = usage.get("prompt_tokens_details") or {}
        return Answered(first, text, usage["prompt_tokens"], details.get("cached_tokens", 0))


def text_in(document: Mapping[str, Any]) -> str:
    return "".join(choice["delta"].get("content") or "" for choice in document.get("choices", ()))
