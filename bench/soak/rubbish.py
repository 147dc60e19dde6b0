"""Clients that send what is no request."""

import random
from typing import Final

import msgspec

from bench.soak.target import Kind, Outcomes, Target

_PATHS: Final = ("/", "/v1/completions", "/v1/chat/completions")
_BROKEN: Final = (
    b"",
    b"{",
    b'{"model": "x", "prompt": ',
    b"[]",
    b"null",
    b'{"model": 7, "prompt": 8}',
    b'{"model": "\xff\xfe", "prompt": "a"}',
    b'{"prompt": "a", "max_tokens": 1e400}',
    b'{"prompt": "a", "max_tokens": -1, "nonsense": true}',
)
_EVENT: Final = {
    "ce_specversion": "1.0",
    "ce_id": "1",
    "ce_source": "/soak",
    "ce_type": "dev.lamina.generate.request",
    "ce_expirytime": "",
}
_WRONG_EVENTS: Final = (
    {"ce_specversion": "9.9"},
    {"ce_id": ""},
    {"ce_type": "dev.lamina.forward"},
    {"ce_type": "\xff\xfe"},
    {"ce_expirytime": "yesterday"},
    {"ce_expirytime": "1999-01-01T00:00:00Z"},
    {"ce_dataref": "http://127.0.0.1:1/etc/passwd"},
    {"content_type": "application/cloudevents+json; charset=utf-7"},
    {"content_type": "application/cloudevents-batch+json"},
)
_WRONG_HEADS: Final = (
    b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: -5\r\n\r\n",
    b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 5\r\ncontent-length: 6\r\n\r\nhello!",
    b"POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\nxyz\r\n",
    b"POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: gzip, chunked\r\ncontent-length: 3\r\n\r\n0\r\n\r\n",
    b"POST / HTTP/9.9\r\nhost: a\r\n\r\n",
    b"POST / HTTP/1.1\r\nno colon here\r\n\r\n",
    b"BREW " + b"/" * 9000 + b" HTTP/1.1\r\n\r\n",
    b"POST / HTTP/1.1\r\n" + b"".join(b"x-%d: y\r\n" % number for number in range(2000)) + b"\r\n",
    b"POST / HTTP/1.1\r\nx: " + b"y" * 200_000 + b"\r\n\r\n",
)


async def broken_json(target: Target, dice: random.Random, outcomes: Outcomes) -> None:
    data = target.post(dice.choice(_PATHS[1:]), dice.choice(_BROKEN))
    outcomes[await target.answered(target.some_way(dice), data)] += 1


async def wrong_event(target: Target, dice: random.Random, outcomes: Outcomes) -> None:
    body = b'{"prompt": "a", "max_tokens": 1}'
    headers = {**_EVENT, **dice.choice(_WRONG_EVENTS)}
    outcomes[await target.answered(target.some_way(dice), target.post("/", body, **headers))] += 1


async def wrong_head(target: Target, dice: random.Random, outcomes: Outcomes) -> None:
    """At any process: whoever reaches a port may send this."""
    service = dice.choice([None, *target.services])
    outcomes[await target.answered(service, dice.choice(_WRONG_HEADS))] += 1


async def binary(target: Target, dice: random.Random, outcomes: Outcomes) -> None:
    """As a body, and in place of a request."""
    noise = dice.randbytes(dice.choice((1, 100, 100_000)))
    if dice.random() < 0.5:
        outcomes[await target.answered(target.some_way(dice), target.post(dice.choice(_PATHS), noise))] += 1
    else:
        outcomes[await target.answered(dice.choice([None, *target.services]), noise + b"\r\n\r\n")] += 1


async def wrong_key(target: Target, dice: random.Random, outcomes: Outcomes) -> None:
    """A good question of somebody who may not ask; a stage lets in nobody but its gateway."""
    body = msgspec.json.encode({"model": target.plan.model, "prompt": "a", "max_tokens": 1})
    stages = [service for service in target.services if service.startswith("stage")]
    service = dice.choice([target.some_way(dice), *stages])
    path = "/" if service in stages else "/v1/completions"
    authorization = dice.choice(("", "Bearer guess", "Basic Zm9v", "Bearer \xff"))
    outcomes[await target.answered(service, target.post(path, body, authorization=authorization))] += 1


RUBBISH: Final = (
    Kind("broken JSON", broken_json, 0.5, refused=True),
    Kind("an event with wrong headers", wrong_event, 0.5, refused=True),
    Kind("a wrong head", wrong_head, 0.5, refused=True),
    Kind("binary", binary, 0.5, refused=True),
    Kind("a wrong key", wrong_key, 1.0, refused=True),
)
