"""Clients of a soak against simple servers: their requests arrive, and the outcomes are recorded."""

import asyncio
import json
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from aiohttp import web

from bench.records import Recorder, of
from bench.soak.attacks import KINDS
from bench.soak.honest import (
    APIS,
    QUESTIONS,
    Api,
    ComeAgain,
    Given,
    HonestClient,
    NoAnswer,
    Question,
    ask,
    session_of,
    take_references,
)
from bench.soak.records import GATEWAY, Answer, Lost, Plan, Refused, read_records
from bench.soak.target import Outcomes, Target
from eventing.http.sse import encode_sse
from eventing.wire.events import EventType
from eventing.wire.generation import GenerateResponse, Timings, TokenEvent, Usage
from tests.bench.served import message, serving

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
CHAT, TEXT = QUESTIONS[0], QUESTIONS[2]
RESPONSE = GenerateResponse("ab", (5, 6), "length", Usage(3, 2, 5), Timings(0, 0, 0, 0, 1))
TOKENS = (TokenEvent(0, 5, "a"), TokenEvent(1, 6, "b"))
STAYS = "reads nothing of its stream"
LEAVES = "leaves before a plain answer"


def plan(url: str, seconds: float = 0.0) -> Plan:
    services = {GATEWAY: "soak", "stage 0": "soak-s0"}
    keys = {"honest_key": "honest", "hostile_key": "hostile", "honest": 1}
    return Plan(records="", started=0, seconds=seconds, url=url, admin_url=f"{url}/admin", services=services, model="m", **keys)


async def answering(request: web.Request) -> web.StreamResponse:
    """The same two tokens, in the form of the API that is asked."""
    body = await request.json()
    if request.path == "/":
        if "text/event-stream" not in request.headers.get("accept", ""):
            return web.Response(body=msgspec.json.encode(RESPONSE))
        parts = [message(EventType.TOKEN, token) for token in TOKENS]
        return web.Response(body=b"".join([*parts, message(EventType.GENERATE_RESPONSE, RESPONSE)]))
    chat = request.path.endswith("chat/completions")
    if not body.get("stream"):
        choice = {"message": {"content": "ab"}} if chat else {"text": "ab"}
        return web.json_response({"choices": [choice], "usage": {"completion_tokens": 2}})
    chunks: list[Any] = [{"choices": [{"delta": {"content": text}} if chat else {"text": text}]} for text in ("a", "b")]
    chunks.append({"choices": [], "usage": {"completion_tokens": 2}})
    return web.Response(body=b"".join(map(encode_sse, [*map(json.dumps, chunks), "[DONE]"])))


def asked(handler: Handler, api: Api, question: Question = TEXT) -> Given:
    async def scenario() -> Given:
        async with serving(web.post("/{path:.*}", handler)) as url, session_of(plan(url)) as session:
            return await ask(session, plan(url), api, question)

    return asyncio.run(scenario())


@pytest.mark.parametrize("question", [CHAT, TEXT], ids=["chat", "text"])
@pytest.mark.parametrize("api", APIS)
def test_every_api_gives_the_same_answer(api: Api, question: Question) -> None:
    given = asked(answering, api, question)
    assert (given.text, given.completion_tokens) == ("ab", 2)
    assert given.token_ids == (None if api.startswith("openai") else (5, 6))


@pytest.mark.parametrize("status", [429, 503])
def test_a_refusal_carries_its_retry_after(status: int) -> None:
    async def refusing(_: web.Request) -> web.Response:
        return web.Response(status=status, headers={"Retry-After": "7"})

    with pytest.raises(ComeAgain) as refusal:
        asked(refusing, "openai")
    assert (refusal.value.status, refusal.value.retry_after) == (status, "7")


@pytest.mark.parametrize(
    ("api", "stream"),
    [
        ("event stream", message(EventType.TOKEN, TOKENS[0])),
        ("event stream", message(EventType.TOKEN, TOKENS[0]) + message(EventType.GENERATE_RESPONSE, RESPONSE)),
        ("openai stream", encode_sse(json.dumps({"choices": [{"text": "a"}]}))),
        ("openai stream", encode_sse(json.dumps({"error": {"message": "gone"}})) + encode_sse("[DONE]")),
    ],
    ids=["no last event", "a token is missing", "no end", "an error"],
)
def test_an_incomplete_answer_is_none(api: Api, stream: bytes) -> None:
    async def broken(_: web.Request) -> web.Response:
        return web.Response(body=stream)

    with pytest.raises(NoAnswer):
        asked(broken, api)


@pytest.mark.slow
def test_an_honest_client_retries_and_records_lost_questions(tmp_path: Path) -> None:
    statuses = iter([503, 500])

    async def moody(request: web.Request) -> web.StreamResponse:
        status = next(statuses, 200)
        return await answering(request) if status == 200 else web.Response(status=status, headers={"Retry-After": "0"})

    async def scenario() -> None:
        async with serving(web.post("/{path:.*}", moody)) as url:
            with Recorder(tmp_path / "records") as recorder:
                asked = plan(url, seconds=1.1)
                async with session_of(asked) as session:
                    await HonestClient(session, asked, recorder).keep_asking(0)
                await take_references(asked, recorder)

    asyncio.run(scenario())
    records = read_records(tmp_path / "records")
    assert [(refused.status, refused.retry_after) for refused in of(Refused, records)] == [(503, "0")]
    assert [lost.reason[:3] for lost in of(Lost, records)] == ["500"]
    assert all(answer.text == "ab" for answer in of(Answer, records))


@pytest.mark.slow
def test_every_hostile_client_reaches_the_server_and_its_outcome_is_counted() -> None:
    """The server refuses everything. A client that reads nothing does not see that, nor one that left before the reply."""
    heard = Counter[bool]()

    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heard[bool(await reader.read(10))] += 1
        writer.write(b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\n\r\n")
        writer.close()

    async def scenario() -> dict[str, Outcomes]:
        server = await asyncio.start_server(refuse, "127.0.0.1", 0, backlog=2048)
        port = server.sockets[0].getsockname()[1]
        asked = plan(f"http://127.0.0.1:{port}")
        outcomes: dict[str, Outcomes] = {kind.name: Counter() for kind in KINDS}
        async with session_of(asked) as session:
            target = Target(asked, session)
            target._ports = {GATEWAY: port, "stage 0": port}
            dice = random.Random(1)
            attacks = {kind.name: asyncio.create_task(kind.attack(target, dice, outcomes[kind.name])) for kind in KINDS}
            stays = attacks.pop(STAYS)
            await asyncio.gather(*attacks.values())
            stays.cancel()
            await asyncio.wait([stays])
        server.close()
        return outcomes

    outcomes = asyncio.run(scenario())
    assert heard[True] > 1000
    for name, counts in outcomes.items():
        assert counts, name
        refused = {STAYS: {"held until the lull"}, LEAVES: {"400", "left"}}.get(name, {"400"})
        assert set(counts) <= refused | {"closed"}, (name, counts)
