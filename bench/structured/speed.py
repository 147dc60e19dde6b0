"""The time of a token with a grammar and without: the same prompts and lengths in turns, through the same stages."""

import asyncio
import time
from dataclasses import dataclass
from statistics import median
from typing import Any, Final

import aiohttp

from bench.structured.asking import TIMEOUT, answered

_TOKENS: Final = 96
# A schema that no answer completes before its last token.
_LONG: Final = {
    "type": "array",
    "minItems": 100,
    "items": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 30},
            "age": {"type": "integer", "minimum": 0, "maximum": 120},
            "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "maxItems": 3},
        },
        "required": ["name", "age", "tags"],
        "additionalProperties": False,
    },
}


@dataclass(frozen=True, slots=True)
class Ratio:
    at_once: int
    plain_seconds: float  # per token of one answer, median over turns
    grammar_seconds: float

    @property
    def ratio(self) -> float:
        return self.grammar_seconds / self.plain_seconds


async def compare(url: str, model: str, at_once: int, rounds: int) -> Ratio:
    plain, constrained = list[float](), list[float]()
    async with aiohttp.ClientSession(url, timeout=TIMEOUT) as session:
        for number in range(rounds + 1):
            first = await _turn(session, model, at_once, number, {"ignore_eos": True})
            second = await _turn(session, model, at_once, number, {"structured_outputs": {"json": _LONG}})
            if number:  # the first turn is a warm-up
                plain.append(first)
                constrained.append(second)
    return Ratio(at_once, median(plain), median(constrained))


async def _turn(session: aiohttp.ClientSession, model: str, at_once: int, number: int, options: dict[str, Any]) -> float:
    began = time.perf_counter()
    await asyncio.gather(*(_ask(session, model, 100 * number + index, options) for index in range(at_once)))
    return (time.perf_counter() - began) / _TOKENS


async def _ask(session: aiohttp.ClientSession, model: str, number: int, options: dict[str, Any]) -> None:
    body = {
        "model": model,
        "prompt": f"People, list {number}:",
        "max_tokens": _TOKENS,
        "temperature": 1,
        "seed": number,
        **options,
    }
    answer = await answered(session, "/v1/completions", body)
    assert answer["usage"]["completion_tokens"] == _TOKENS, answer
