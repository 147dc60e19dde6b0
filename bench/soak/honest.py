"""Clients that ask the same questions by every API, again and again, and wait as they are told to.

Each honest client has a key and asks one question at a time. The greedy one does the same by many connections with one key.
"""

import asyncio
import contextlib
import random
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Final, Literal

import aiohttp
import msgspec

from bench.records import Recorder
from bench.soak.records import GATEWAY, Answer, Broken, Lost, Plan, Reference, Refused, is_gateway, named_pods
from eventing.http.binding import from_http, to_binary_http
from eventing.http.sse import EVENT_STREAM_CONTENT_TYPE, ServerSentEvent, SSEDecoder
from eventing.wire.cloud_event import json_event
from eventing.wire.events import EventType
from eventing.wire.generation import GenerateRequest, GenerateResponse, Message, TokenEvent

_TEXTS: Final = (
    "What is the capital of France?",
    "Name three rivers of Europe.",
    "The lighthouse keeper climbed the stairs and",
    "Why does ice float on water?",
    "1, 1, 2, 3, 5, 8,",
    "Write one sentence about a winter morning.",
)
_TOKENS: Final = (16, 24, 32)


@dataclass(frozen=True, slots=True)
class Question:
    name: str
    text: str
    chat: bool  # by the chat template; else the text is continued
    max_tokens: int
    temperature: float
    seed: int

    def event_data(self) -> GenerateRequest:
        options: dict[str, Any] = {"max_tokens": self.max_tokens, "temperature": self.temperature, "seed": self.seed}
        if self.chat:
            return GenerateRequest(messages=(Message("user", self.text),), **options)
        return GenerateRequest(prompt=self.text, **options)

    def openai_body(self, model: str, stream: bool) -> dict[str, Any]:
        asked = {"messages": [{"role": "user", "content": self.text}]} if self.chat else {"prompt": self.text}
        more = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
        options = {"max_tokens": self.max_tokens, "temperature": self.temperature, "seed": self.seed}
        return {"model": model, **asked, **options, **more}


QUESTIONS: Final = tuple(
    Question(
        f"{'chat' if chat else 'text'} {number}{' drawn' if drawn else ''}",
        text,
        chat,
        _TOKENS[number % len(_TOKENS)],
        0.8 if drawn else 0.0,
        number,
    )
    for number, text in enumerate(_TEXTS)
    for chat in (True, False)
    for drawn in (False, True)
)


PATIENCE_SECONDS: Final = 300.0  # for one answer, refusals and broken attempts included; after that it counts as lost
_PAUSE_SECONDS: Final = 1.0  # after a refusal that names no time
_LONGEST_PAUSE_SECONDS: Final = 30.0
_COME_AGAIN: Final = (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE)

Api = Literal["event", "event stream", "openai", "openai stream"]
APIS: Final[tuple[Api, ...]] = ("event", "event stream", "openai", "openai stream")


class ComeAgain(Exception):
    def __init__(self, status: int, retry_after: str | None) -> None:
        super().__init__(status)
        self.status = status
        self.retry_after = retry_after


class NoAnswer(Exception):
    """The reply is no answer, or not a complete one."""


@dataclass(frozen=True, slots=True)
class Given:
    text: str
    completion_tokens: int
    token_ids: tuple[int, ...] | None = None
    replays: int = 0


class AskingClient:
    """Asks one question at a time, each time of a random gateway, and again with the same key if its answer breaks."""

    def __init__(self, session: aiohttp.ClientSession, plan: Plan, recorder: Recorder, client: str, number: int) -> None:
        self._session = session
        self._plan = plan
        self._recorder = recorder
        self._client = client
        self._dice = random.Random(f"asking {plan.seed} {number}")

    async def keep_asking(self) -> None:
        """Asks until the plan is over, and awaits the last answer."""
        until = self._recorder.now + self._plan.seconds
        while self._recorder.now < until:
            await self._ask(self._dice.choice(APIS), self._dice.choice(QUESTIONS))

    async def _ask(self, api: Api, question: Question) -> None:
        id_, started, broken = str(uuid.uuid4()), self._recorder.now, 0
        reason = "refused again and again"
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(PATIENCE_SECONDS):
                while True:
                    gateway, url = await self._choose_gateway()
                    asked = self._recorder.now
                    try:
                        given = await ask(self._session, self._plan, api, question, self._client, id_, url)
                    except ComeAgain as refusal:
                        status, told = refusal.status, refusal.retry_after
                        self._recorder.write(Refused(self._recorder.now, self._client, api, status, told))
                        pause = float(told) if told and told.isdigit() else _PAUSE_SECONDS
                        await asyncio.sleep(min(pause, _LONGEST_PAUSE_SECONDS))
                    except (NoAnswer, OSError, aiohttp.ClientError, msgspec.MsgspecError) as error:
                        broken += 1
                        reason = str(error) or type(error).__name__
                        attempt = (self._client, question.name, api, gateway, asked, reason)
                        self._recorder.write(Broken(self._recorder.now, *attempt))
                        await asyncio.sleep(_PAUSE_SECONDS)
                    else:
                        told_by = (given.text, given.completion_tokens, given.token_ids, given.replays)
                        question_asked = (self._client, question.name, api, started)
                        self._recorder.write(Answer(self._recorder.now, *question_asked, *told_by, broken))
                        return
        self._recorder.write(Lost(self._recorder.now, self._client, question.name, api, started, reason))

    async def _choose_gateway(self) -> tuple[str, str]:
        """Name and URL of a ready gateway, so that a broken answer can be told from others; of the Service if there is none."""
        async with self._session.get(f"{self._plan.admin_url}/status") as reply:
            pods = named_pods(await reply.json(), self._plan.services)
        ready = [(name, pod) for name, pod in pods.items() if is_gateway(name) and pod["phase"] == "ready"]
        if not ready:
            return GATEWAY, self._plan.url
        name, pod = self._dice.choice(ready)
        return name, f"http://127.0.0.1:{pod['port']}"


async def take_references(plan: Plan, recorder: Recorder) -> None:
    """Records the undisturbed answers, one after the other. Raises NoAnswer, ComeAgain."""
    async with session_of() as session:
        for question in QUESTIONS:
            given = await ask(session, plan, "event", question, plan.honest[0], str(uuid.uuid4()), plan.url)
            found = Reference(recorder.now, question.name, given.text, given.token_ids or (), given.completion_tokens)
            recorder.write(found)


def session_of() -> aiohttp.ClientSession:
    """Uses a connection for each request: one that broke with its pod must not fail the next request."""
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=30)
    return aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0, force_close=True))


async def ask(
    session: aiohttp.ClientSession, plan: Plan, api: Api, question: Question, client: str, id_: str, url: str
) -> Given:
    """Asks the gateway at `url` with the client's key. Two requests with one id are the same one.

    Raises ComeAgain, NoAnswer, aiohttp.ClientError, msgspec.MsgspecError.
    """
    path, headers, body = _request(plan.model, api, question, id_)
    headers["authorization"] = f"Bearer {plan.keys[client]}"
    async with session.post(url + path, data=body, headers=headers) as reply:
        if reply.status in _COME_AGAIN:
            raise ComeAgain(reply.status, reply.headers.get("retry-after"))
        if reply.status != HTTPStatus.OK:
            raise NoAnswer(f"{reply.status}: {(await reply.read())[:300].decode(errors='replace')}")
        match api:
            case "event":
                return _of_response(msgspec.json.decode(await reply.read(), type=GenerateResponse))
            case "event stream":
                return await _of_events(_messages(reply))
            case "openai":
                document = await reply.json()
                choice = document["choices"][0]
                text = choice["message"]["content"] if question.chat else choice["text"]
                return Given(text, document["usage"]["completion_tokens"])
            case "openai stream":
                return await _of_chunks(_messages(reply))


def _request(model: str, api: Api, question: Question, id_: str) -> tuple[str, dict[str, str], bytes]:
    if api.startswith("openai"):
        body = question.openai_body(model, stream=api == "openai stream")
        path = "/v1/chat/completions" if question.chat else "/v1/completions"
        return path, {"content-type": "application/json", "idempotency-key": id_}, msgspec.json.encode(body)
    headers, pieces = to_binary_http(json_event(EventType.GENERATE_REQUEST, "bench/soak", question.event_data(), id=id_))
    if api == "event stream":
        headers["accept"] = EVENT_STREAM_CONTENT_TYPE
    return "/", headers, b"".join(pieces)


async def _messages(reply: aiohttp.ClientResponse) -> AsyncIterator[ServerSentEvent]:
    decoder = SSEDecoder()
    async for chunk in reply.content.iter_any():
        for message in decoder.feed(chunk):
            yield message


def _of_response(response: GenerateResponse) -> Given:
    return Given(response.text, response.usage.completion_tokens, response.token_ids, response.timings.replays)


async def _of_events(messages: AsyncIterator[ServerSentEvent]) -> Given:
    """Checks that the last event repeats the tokens of the stream."""
    tokens: list[TokenEvent] = []
    async for message in messages:
        event = from_http({"content-type": "application/cloudevents+json"}, message.data.encode())
        data = bytes(event.get_data() or b"")  # type: ignore[arg-type]
        if event.get_type() == EventType.TOKEN:
            tokens.append(msgspec.json.decode(data, type=TokenEvent))
        elif event.get_type() == EventType.GENERATE_RESPONSE:
            given = _of_response(msgspec.json.decode(data, type=GenerateResponse))
            text, ids = "".join(token.text for token in tokens), tuple(token.token_id for token in tokens)
            if (text, ids) != (given.text, given.token_ids):
                raise NoAnswer("the stream's tokens are not those of its last event")
            return given
        else:
            raise NoAnswer(f"the stream ended with {event.get_type()}: {data[:300].decode(errors='replace')}")
    raise NoAnswer("the stream ended before its last event")


async def _of_chunks(messages: AsyncIterator[ServerSentEvent]) -> Given:
    text: list[str] = []
    completion_tokens = -1
    async for message in messages:
        if message.data == "[DONE]":
            return Given("".join(text), completion_tokens)
        document = msgspec.json.decode(message.data.encode())
        if "error" in document:
            raise NoAnswer(f"the stream ended with an error: {message.data[:300]}")
        for choice in document["choices"]:
            text.append(choice["text"] if "text" in choice else choice["delta"].get("content", ""))
        if document.get("usage"):
            completion_tokens = document["usage"]["completion_tokens"]
    raise NoAnswer("the stream ended before [DONE]")
