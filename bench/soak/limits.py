"""Clients that want more than there is: huge prompts and bodies, deep nesting, too many tokens, bursts, all of the memory."""

import asyncio
import contextlib
import random
from typing import Final

import msgspec

from bench.soak.target import ANSWER_SECONDS, Kind, Outcomes, Target

_PROMPT_CHARACTERS: Final = (500_000, 4_000_000)
_TOO_MANY_WORDS: Final = 12_000  # somewhat more tokens than the model's context of 8,192
_NESTED: Final = 100_000
_KEYS: Final = 20_000
_MESSAGES: Final = 50_000
_TOO_LARGE_BYTES: Final = 2**28 + 2**20
_BLOCK: Final = b"x" * 2**16
_MOST_BLOCKS: Final = 512  # 32 MiB: enough to see whether anybody stops it
_BURST: Final = 300  # more than the gateway's queue holds


async def huge_prompt(target: Target, dice: random.Random, outcomes: Outcomes) -> None:
    """Digits are tokens of their own, the most that a text can have."""
    data = target.completion("7" * dice.choice(_PROMPT_CHARACTERS), 1)
    outcomes[await target.answered(target.some_way(dice), data)] += 1


async def too_many_tokens(target: Target, dice: random.Random, outcomes: Outcomes) -> None:
    data = target.completion("river " * _TOO_MANY_WORDS, dice.choice((1, 2**31)))
    outcomes[await target.answered(target.some_way(dice), data)] += 1


async def many_messages(target: Target, dice: random.Random, outcomes: Outcomes) -> None:
    body = {"model": target.plan.model, "messages": [{"role": "user", "content": "a"}] * _MESSAGES, "max_tokens": 1}
    data = target.post("/v1/chat/completions", msgspec.json.encode(body))
    outcomes[await target.answered(target.some_way(dice), data)] += 1


async def deep_nesting(target: Target, dice: random.Random, outcomes: Outcomes) -> None:
    body = dice.choice((b"[" * _NESTED, b'{"a":' * _NESTED, b'{"prompt":' + b"[" * _NESTED + b"]" * _NESTED + b"}"))
    if dice.random() < 0.5:
        data = target.post("/v1/completions", body)
    else:
        data = target.post("/", body, content_type="application/cloudevents+json")
    outcomes[await target.answered(target.some_way(dice), data)] += 1


async def many_keys(target: Target, dice: random.Random, outcomes: Outcomes) -> None:
    """A structured event with very many attributes, also to a stage with a signature that is looked at last."""
    body = b"{" + b",".join(b'"a%d":1' % number for number in range(_KEYS)) + b"}"
    service = dice.choice([target.some_way(dice), *target.services])
    headers = {"content_type": "application/cloudevents+json"}
    if service is not None and service.startswith("stage"):
        headers |= {"authorization": "", "ce_signature": "0" * 64}
    outcomes[await target.answered(service, target.post("/", body, **headers))] += 1


async def huge_body(target: Target, dice: random.Random, outcomes: Outcomes) -> None:
    """Sends for as long as somebody reads: a length far too large, or chunks without end."""
    if dice.random() < 0.5:
        begin, piece = target.head("/v1/completions", _TOO_LARGE_BYTES), _BLOCK
    else:
        begin = target.head("/v1/completions", None, transfer_encoding="chunked")
        piece = b"%x\r\n%s\r\n" % (len(_BLOCK), _BLOCK)
    async with target.connect(target.some_way(dice)) as connection:
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(ANSWER_SECONDS):
                await connection.send(begin)
                for _ in range(_MOST_BLOCKS):
                    await connection.send(piece)
                    if connection.reader.at_eof():
                        break
        outcomes[await connection.status(ANSWER_SECONDS)] += 1


async def hoards(target: Target, dice: random.Random, outcomes: Outcomes) -> None:
    """Reserves nearly all memory for an answer that it does not wait for."""
    async with target.connect(None) as connection:
        await connection.send(target.completion("Go on for ever.", 8_000, stream=True))
        outcomes[await connection.status(5.0)] += 1
        await asyncio.sleep(2)


async def burst(target: Target, dice: random.Random, outcomes: Outcomes) -> None:
    """All at once; those that are taken leave together."""
    data = target.completion("One of very many.", 100)

    async def ask() -> None:
        try:
            async with target.connect(None) as connection:
                await connection.send(data)
                outcomes[await connection.status(3.0)] += 1
        except OSError:
            outcomes["closed"] += 1

    async with asyncio.TaskGroup() as clients:
        for _ in range(_BURST):
            clients.create_task(ask())


LIMITS: Final = (
    Kind("a prompt of millions of digits", huge_prompt, 4.0, refused=True),
    Kind("more tokens than the context", too_many_tokens, 3.0, refused=True),
    Kind("50,000 messages", many_messages, 5.0, refused=True),
    Kind("nested 100,000 deep", deep_nesting, 2.0, refused=True),
    Kind("20,000 attributes", many_keys, 3.0, refused=True),
    Kind("a body without end", huge_body, 3.0, refused=True),
    Kind("wants all memory", hoards, 6.0),
    Kind("300 at once", burst, 8.0),
)
