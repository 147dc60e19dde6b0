"""Asks a gateway questions, a few at a time, and measures their answers."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bench.client import answered, connections


@dataclass(frozen=True, slots=True)
class Answered:
    """One gateway's answers to all questions of a set."""

    seconds: float
    texts: tuple[str, ...]
    prompt_tokens: int
    tokens: int
    accepted: int  # draft tokens
    rejected: int  # draft tokens
    cpu_seconds: float = 0.0  # of the gateway and the stages

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds

    @property
    def tokens_per_cpu_second(self) -> float:
        return self.tokens / self.cpu_seconds if self.cpu_seconds else 0.0


async def ask(url: str, model: str, questions: Sequence[str], max_tokens: int, at_once: int) -> Answered:
    """Asks greedily. Raises aiohttp.ClientError for a question that fails."""
    turns = asyncio.Semaphore(at_once)
    async with connections() as session:

        async def one(question: str) -> tuple[str, dict[str, Any]]:
            asked = {
                "model": model,
                "messages": [{"role": "user", "content": question}],
                "temperature": 0,
                "max_tokens": max_tokens,
            }
            async with turns:
                document = await answered(session, f"{url}/v1/chat/completions", asked)
            return document["choices"][0]["message"]["content"], document["usage"]

        began = time.perf_counter()
        answers = await asyncio.gather(*map(one, questions))
        seconds = time.perf_counter() - began
    details = [usage["completion_tokens_details"] for _, usage in answers]
    return Answered(
        seconds,
        tuple(text for text, _ in answers),
        sum(usage["prompt_tokens"] for _, usage in answers),
        sum(usage["completion_tokens"] for _, usage in answers),
        sum(each["accepted_prediction_tokens"] for each in details),
        sum(each["rejected_prediction_tokens"] for each in details),
    )
