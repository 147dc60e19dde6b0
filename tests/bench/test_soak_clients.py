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
from bench.soak import clients
from bench.soak.attacks import KINDS
from bench.soak.honest import (
    APIS,
    QUESTIONS,
    Api,
    AskingClient,
    ComeAgain,
    Given,
    NoAnswer,
    Question,
    ask,
    session_of,
    take_references,
)
from bench.soak.records import HOSTILE, Answer, Attempt, Broken, Lost, Plan, Reference, Refused, read_records
from bench.soak.target import Kind, Outcomes, Target
from eventing.http.sse import encode_sse
from eventing.wire.events import EventType
from eventing.wire.generation import GenerateResponse, Timings, TokenEvent, Usage
from tests.bench.served import message, serving

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
CHAT, TEXT = QUESTIONS[0], QUESTIONS[2]
RESPONSE = GenerateResponse("ab", (5, 6), "length", Usage(3, 2, 5), Timings(0, 0, 0, 0, 1))
TOKENS = (TokenEvent(0, 5, "a"), TokenEvent(1, 6, "b"))
STAYS = "reads nothing of its stream"
KEYS = {"honest 0": "honest", HOSTILE: "hostile"}


def plan(url: str, seconds: float = 0.0) -> Plan:
    services = {"gateway 0": "soak", "stage 0": "soak-s0"}
    urls = {"url": url, "admin_url": f"{url}/admin"}
    return Plan(records="", started=0, seconds=seconds, services=services, model="m", keys=KEYS, greedy=1, **urls)


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
        async with serving(web.post("/{path:.*}", handler)) as url, session_of() as session:
            return await ask(session, plan(url), api, question, "honest 0", "one question", url)

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


@pytest.mark.parametrize("api", APIS)
def test_a_client_asks_again_with_the_same_key_until_it_is_answered(
    api: Api, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bench.soak.honest.APIS", (api,))
    monkeypatch.setattr("bench.soak.honest._PAUSE_SECONDS", 0.01)
    statuses, ids = iter([503, 500]), []

    async def moody(request: web.Request) -> web.StreamResponse:
        ids.append(request.headers.get("idempotency-key") or request.headers["ce-id"])
        status = next(statuses, 200)
        return await answering(request) if status == 200 else web.Response(status=status, headers={"Retry-After": "0"})

    records = asked_until_over(moody, tmp_path)
    assert [(refused.status, refused.retry_after) for refused in of(Refused, records)] == [(503, "0")]
    assert [(broken.reason[:3], broken.gateway) for broken in of(Broken, records)] == [("500", "gateway 0")]
    answers = of(Answer, records)
    assert [answer.broken for answer in answers] == [1] + [0] * (len(answers) - 1)
    assert {(answer.text, answer.client) for answer in answers} == {("ab", "honest 0")}
    assert len(set(ids)) == len(answers) == len(ids) - 2
    assert ids[:3] == ids[:1] * 3


def test_every_question_is_asked_before_the_disturbance(tmp_path: Path) -> None:
    async def scenario() -> None:
        with Recorder(tmp_path / "records") as recorder:
            async with serving(web.post("/{path:.*}", answering)) as url:
                await take_references(plan(url), recorder)

    asyncio.run(scenario())
    references = of(Reference, read_records(tmp_path / "records"))
    assert [reference.question for reference in references] == [question.name for question in QUESTIONS]
    assert {(reference.text, reference.token_ids) for reference in references} == {("ab", (5, 6))}


def test_a_question_that_is_never_answered_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.soak.honest.PATIENCE_SECONDS", 0.5)
    monkeypatch.setattr("bench.soak.honest._PAUSE_SECONDS", 0.05)

    async def never(_: web.Request) -> web.Response:
        return web.Response(status=500)

    records = asked_until_over(never, tmp_path)
    assert [lost.reason[:3] for lost in of(Lost, records)] == ["500"]
    assert of(Broken, records)


def asked_until_over(handler: Handler, folder: Path) -> list[Any]:
    """The records of a client that asks for a short time."""

    async def status(request: web.Request) -> web.Response:
        pod = {"phase": "ready", "port": request.url.port}
        return web.json_response({"services": [{"name": "soak", "revisions": [{"pods": [pod]}]}]})

    async def scenario() -> None:
        routes = (web.get("/admin/status", status), web.post("/{path:.*}", handler))
        async with serving(*routes) as url, session_of() as session:
            with Recorder(folder / "records") as recorder:
                await AskingClient(session, plan(url, seconds=0.3), recorder, "honest 0", 0).keep_asking()

    asyncio.run(scenario())
    return read_records(folder / "records")


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
        async with session_of() as session:
            target = Target(asked, session)
            target._ports = {"gateway 0": port, "stage 0": port}
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
        seen = {"held to the end"} if name == STAYS else {"400", "left"} if name.startswith("vanishes") else {"400"}
        assert set(counts) <= seen | {"closed"}, (name, counts)


def test_hostile_clients_attack_until_the_plan_is_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def answered(_: Target, __: random.Random, outcomes: Outcomes) -> None:
        outcomes["400"] += 1

    async def refused(_: Target, __: random.Random, ___: Outcomes) -> None:
        raise ConnectionRefusedError

    async def waits(_: Target, __: random.Random, ___: Outcomes) -> None:
        await asyncio.Event().wait()

    kinds = {"answered": answered, "refused": refused, "waits": waits}
    monkeypatch.setattr(clients, "KINDS", tuple(Kind(name, attack, 0.01) for name, attack in kinds.items()))

    async def scenario() -> None:
        async with serving(web.get("/admin/status", nothing_runs)) as url, session_of() as session:
            with Recorder(tmp_path / "records") as recorder:
                await clients.attack(Target(plan(url, seconds=0.5), session), recorder)

    async def nothing_runs(_: web.Request) -> web.Response:
        return web.json_response({"services": []})

    asyncio.run(scenario())
    attempts = of(Attempt, read_records(tmp_path / "records"))
    outcomes = {name: [attempt.outcomes for attempt in attempts if attempt.name == name] for name in kinds}
    assert outcomes["waits"] == [{"unanswered at the end": 1}]
    assert {"400": 1} in outcomes["answered"]
    assert {"closed": 1} in outcomes["refused"]
