"""Random constraints for answers (JSON schemas, regular expressions, choices, grammars), questions with them, and checks."""

import asyncio
import json
import random
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Final

import aiohttp
import jsonschema

_AT_ONCE: Final = 8
_WORDS: Final = ("name", "age", "city", "tags", "price", "note", "kind", "size", "when", "a b", 'quo"te', "größe")
_PATTERNS: Final = (r"[a-z]{1,8}", r"\d{3}-\d{4}", r"(yes|no|maybe)( sir)?", r"[A-Z][a-z]{2,6}(, [A-Z][a-z]{2,6}){0,2}")
_ARITHMETIC: Final = 'start: sum\nsum: product ("+" product){0,2}\nproduct: NUMBER ("*" NUMBER){0,2}\nNUMBER: /[0-9]{1,3}/\n'


@dataclass(frozen=True, slots=True)
class Case:
    options: dict[str, Any]  # fields of an OpenAI request
    fits: Callable[[str], bool]  # whether a complete answer matches


def case(number: int) -> Case:
    """Three of four are JSON schemas. The same number is the same case."""
    dice = random.Random(number)
    match number % 8:
        case 3:
            pattern = dice.choice(_PATTERNS)
            return Case({"structured_outputs": {"regex": pattern}}, lambda text: re.fullmatch(pattern, text) is not None)
        case 7:
            if dice.random() < 0.5:
                choices = tuple(dice.sample(_WORDS, 4))
                return Case({"structured_outputs": {"choice": choices}}, lambda text: text in choices)
            return Case({"structured_outputs": {"grammar": _ARITHMETIC}}, _is_arithmetic)
    schema = _object(dice, 2)
    wanted = {"type": "json_schema", "json_schema": {"name": f"case{number}", "schema": schema, "strict": True}}
    return Case({"response_format": wanted}, lambda text: _is_valid(text, schema))


def _is_arithmetic(text: str) -> bool:
    return re.fullmatch(r"\d{1,3}([+*]\d{1,3})*", text) is not None and text.count("+") <= 2


def _is_valid(text: str, schema: dict[str, Any]) -> bool:
    try:
        jsonschema.validate(json.loads(text), schema)
    except (ValueError, jsonschema.ValidationError):
        return False
    return True


def _object(dice: random.Random, depth: int) -> dict[str, Any]:
    names = dice.sample(_WORDS, dice.randint(1, 4))
    return {
        "type": "object",
        "properties": {name: _value(dice, depth - 1) for name in names},
        "required": names[: dice.randint(0, len(names))],
        "additionalProperties": False,
    }


def _value(dice: random.Random, depth: int) -> dict[str, Any]:
    match dice.randrange(8 if depth else 5):
        case 0:
            least = dice.randint(0, 3)
            return {"type": "string", "minLength": least, "maxLength": least + dice.randint(1, 8)}
        case 1:
            least = dice.randint(-1000, 1000)
            return {"type": "integer", "minimum": least, "maximum": least + dice.randint(0, 500)}
        case 2:
            return dice.choice([{"const": dice.choice(_WORDS)}, {"enum": [*dice.sample(_WORDS, 3), 7, None]}])
        case 3:
            return dice.choice([{"type": "string", "pattern": "^[a-f0-9]{4,8}$"}, {"type": "string", "format": "date"}])
        case 4:
            return {"type": ["boolean", "null"]}
        case 5:
            return _object(dice, depth)
        case 6:
            least, most = dice.randint(0, 2), dice.randint(0, 2)
            return {"type": "array", "items": _value(dice, depth - 1), "minItems": least, "maxItems": least + most}
    return {"anyOf": [_value(dice, depth - 1) for _ in range(2)]}


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

    async with aiohttp.ClientSession(url, timeout=aiohttp.ClientTimeout(total=600)) as session, asyncio.TaskGroup() as clients:
        for _ in range(_AT_ONCE):
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
    async with session.post("/v1/chat/completions", json=body) as reply:
        answer: dict[str, Any] = await reply.json()
        assert reply.status == 200, f"seed {number}: {reply.status} {answer}"
    choice = answer["choices"][0]
    return Ended(number, choice["message"]["content"], choice["finish_reason"], answer["usage"]["completion_tokens"])
