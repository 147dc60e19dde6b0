"""One question to a gateway, as an HTTP CloudEvent, and its answer as it streams."""

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any, Final

import aiohttp
import msgspec

from eventing.http.binding import from_http, to_binary_http
from eventing.http.sse import EVENT_STREAM_CONTENT_TYPE, ServerSentEvent, SSEDecoder
from eventing.problems import MalformedEvent, problem_from_document
from eventing.wire.cloud_event import json_event
from eventing.wire.events import EventType
from eventing.wire.generation import ErrorEvent, GenerateRequest, GenerateResponse, Message, TokenEvent

_SOURCE: Final = "lamina/cli"
_SENTENCE_ENDS: Final = ("?", ".", "!", "…", "？", "。", "！", "؟", "।")
_TYPES: Final[dict[str, type[TokenEvent | GenerateResponse | ErrorEvent]]] = {
    "dev.lamina.generate.token": TokenEvent,
    "dev.lamina.generate.response": GenerateResponse,
    "dev.lamina.generate.error": ErrorEvent,
}

Answer = TokenEvent | GenerateResponse


class AskFailed(Exception):
    """The gateway did not answer, or refused. The message says why."""


@dataclass(frozen=True, slots=True)
class Question:
    text: str
    max_tokens: int
    temperature: float = 0.0
    chat: bool = True
    """Through the model's chat template; False: continue the text as it is."""
    api_key: str | None = None
    timeout_seconds: float = 900.0
    host: str | None = None
    """Where the URL is an ingress's own: the host that it knows the gateway by."""


def is_question(text: str) -> bool:
    """Whether a text is to be answered rather than continued: it ends like a sentence."""
    return text.rstrip().rstrip("\"')").endswith(_SENTENCE_ENDS)


async def ask(url: str, question: Question) -> AsyncIterator[Answer]:
    """Token events as they come, then the response. Raises AskFailed."""
    headers, body = _request(question)
    timeout = aiohttp.ClientTimeout(total=question.timeout_seconds, sock_connect=10)
    try:
        async with aiohttp.ClientSession(timeout=timeout) as session, session.post(url, data=body, headers=headers) as reply:
            if reply.status != 200:
                raise AskFailed(f"{url} answered {reply.status}: {_reason(await reply.read())}")
            async for answer in _answers(reply):
                yield answer
    except aiohttp.ClientConnectorError as error:
        raise AskFailed(f"{url}: nobody listens there ({error.strerror or error}); is the pipeline running?") from error
    except (aiohttp.ClientError, TimeoutError) as error:
        raise AskFailed(f"{url}: {error or f'no answer in {question.timeout_seconds:g} seconds'}") from error


def _request(question: Question) -> tuple[dict[str, str], bytes]:
    sampling: dict[str, Any] = {"max_tokens": question.max_tokens, "temperature": question.temperature}
    if question.chat:
        data = GenerateRequest(messages=(Message(role="user", content=question.text),), **sampling)
    else:
        data = GenerateRequest(prompt=question.text, **sampling)
    headers, pieces = to_binary_http(json_event(EventType.GENERATE_REQUEST, _SOURCE, data))
    headers["accept"] = EVENT_STREAM_CONTENT_TYPE
    if question.api_key is not None:
        headers["authorization"] = f"Bearer {question.api_key}"
    if question.host is not None:
        headers["host"] = question.host
    return headers, b"".join(pieces)


async def _answers(reply: aiohttp.ClientResponse) -> AsyncIterator[Answer]:
    decoder = SSEDecoder()
    async for chunk in reply.content.iter_any():
        for event in decoder.feed(chunk):
            answer = _read(event)
            if isinstance(answer, ErrorEvent):
                raise AskFailed(f"the answer broke off: {answer.title}: {answer.detail}")
            yield answer
            if isinstance(answer, GenerateResponse):
                return
    raise AskFailed("the answer broke off: the stream ended before its last event")


def _read(event: ServerSentEvent) -> TokenEvent | GenerateResponse | ErrorEvent:
    """Each message of the stream is a CloudEvent in structured mode."""
    try:
        cloud_event = from_http({"content-type": "application/cloudevents+json"}, event.data.encode())
        return msgspec.json.decode(cloud_event.get_data() or b"", type=_TYPES[cloud_event.get_type()])  # type: ignore[arg-type]
    except (MalformedEvent, KeyError, msgspec.MsgspecError) as error:
        raise AskFailed(f"the stream holds what is no event of an answer: {event.data[:200]!r}") from error


def _reason(body: bytes) -> str:
    problem = problem_from_document(body)
    return str(problem) if problem is not None else body[:300].decode(errors="replace").strip() or "nothing"
