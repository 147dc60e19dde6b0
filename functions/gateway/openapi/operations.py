"""Every path of the gateway with what it takes and gives, for the OpenAPI document; a test holds it to what is served."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from eventing.http.binding import STRUCTURED_CONTENT_TYPE
from eventing.http.sse import EVENT_STREAM_CONTENT_TYPE
from eventing.wire.events import EventType
from eventing.wire.generation import GenerateRequest, GenerateResponse
from functions.gateway.openai.requests import ChatRequest, CompletionRequest
from functions.gateway.openai.responses_requests import ResponsesRequest
from functions.gateway.openai.tokens import DetokenizeRequest, TokenizeRequest
from functions.gateway.openapi import replies
from functions.gateway.page.pipeline_state import PipelineState

JSON: Final = "application/json"
HTML: Final = "text/html"
Content = Mapping[str, type | None]
"""Media type → what it has; None: a text."""

_CE_HEADERS: Final[Mapping[str, Mapping[str, object]]] = {
    "ce-specversion": {"enum": ["1.0"]},
    "ce-id": {"minLength": 1},
    "ce-source": {"minLength": 1},
    "ce-type": {"enum": [EventType.GENERATE_REQUEST]},
    "ce-expirytime": {"format": "date-time"},
}
_READ: Final = (400, 413, 429)
"""What a body may be refused with."""
_ANSWERED: Final = (500, 503, 504)
"""What an answer may end with before it begins."""


@dataclass(frozen=True, slots=True)
class Operation:
    method: str
    path: str
    summary: str
    replies: Content | None
    """Of status 200; None: without a body."""
    request: Content = field(default_factory=dict)
    refused: tuple[int, ...] = ()
    keyed: bool = True
    """Wants an API key, where there are any."""
    events: type | None = None
    """Data of each server-sent event, where the reply is a stream of them, which an error may end."""
    patched: bool = False
    """Events behind the first are patches of it."""
    headers: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    """With what their values must be beside text (JSON Schema)."""
    verdict: type | None = None
    """Of status 503, where that is an answer like others."""

    @property
    def statuses(self) -> tuple[int, ...]:
        """Of refusals."""
        return tuple(sorted({*self.refused, *((401,) if self.keyed else ())}))


def operations(*, with_page: bool) -> Iterator[Operation]:
    if with_page:
        yield Operation("get", "/", "The page: chat, and the pipeline alive", {HTML: None}, keyed=False)
    yield Operation(
        "post",
        "/",
        f"A CloudEvent `{EventType.GENERATE_REQUEST}`, answered by one of type `{EventType.GENERATE_RESPONSE}`, or by a stream "
        "of events where `Accept` names one",
        {JSON: GenerateResponse, STRUCTURED_CONTENT_TYPE: replies.GenerateResponseEvent, EVENT_STREAM_CONTENT_TYPE: None},
        {STRUCTURED_CONTENT_TYPE: replies.GenerateRequestEvent, JSON: GenerateRequest},
        (*_READ, 410, 415, 422, *_ANSWERED),
        events=replies.CloudEvent,
        headers=_CE_HEADERS,
    )
    yield from _openai()
    yield Operation(
        "post", "/tokenize", "The tokens of a text", {JSON: replies.Tokens}, {JSON: TokenizeRequest}, (*_READ, 422, 503)
    )
    yield Operation(
        "post", "/detokenize", "The text of tokens", {JSON: replies.Text}, {JSON: DetokenizeRequest}, (*_READ, 422, 503)
    )
    yield Operation("get", "/health", "That it answers", None, keyed=False)
    yield Operation("get", "/version", "Which Lamina this is", {JSON: replies.Version}, keyed=False)
    yield Operation("get", "/openapi.json", "This document", {JSON: dict[str, Any]}, keyed=False)
    yield Operation("get", "/healthz", "Whether it is alive", {JSON: replies.Alive}, keyed=False, verdict=replies.Alive)
    yield Operation("get", "/readyz", "Whether it takes work", {JSON: replies.Ready}, keyed=False, verdict=replies.Ready)


def _openai() -> Iterator[Operation]:
    yield Operation(
        "post",
        "/v1/chat/completions",
        "Go on with a conversation; with `stream`, by server-sent events",
        {JSON: replies.ChatCompletion, EVENT_STREAM_CONTENT_TYPE: None},
        {JSON: ChatRequest},
        (*_READ, 404, *_ANSWERED),
        events=replies.ChatCompletionChunk,
    )
    yield Operation(
        "post",
        "/v1/completions",
        "Go on with a text; with `stream`, by server-sent events",
        {JSON: replies.Completion, EVENT_STREAM_CONTENT_TYPE: None},
        {JSON: CompletionRequest},
        (*_READ, 404, *_ANSWERED),
        events=replies.Completion,
    )
    yield Operation(
        "post",
        "/v1/responses",
        "Go on with a conversation, which is sent whole; with `stream`, by server-sent events",
        {JSON: replies.ResponseObject, EVENT_STREAM_CONTENT_TYPE: None},
        {JSON: ResponsesRequest},
        (*_READ, 404, *_ANSWERED),
        events=replies.ResponseEvent,
    )
    yield Operation("get", "/v1/models", "The one model that is served", {JSON: replies.Models})
    yield Operation("get", "/v1/models/{model}", "The same by its name", {JSON: replies.Model}, refused=(404,))
    yield Operation(
        "get",
        "/v1/pipeline/events",
        "The pipeline as server-sent events: `snapshot`, then `change` with merge patches of it (RFC 7396)",
        {EVENT_STREAM_CONTENT_TYPE: None},
        refused=(429,),
        events=PipelineState,
        patched=True,
    )
