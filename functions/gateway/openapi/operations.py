"""Every path of the gateway with its types and statuses, for the OpenAPI document. A test compares them with the routes."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from eventing.http.binding import STRUCTURED_CONTENT_TYPE
from eventing.http.sse import EVENT_STREAM_CONTENT_TYPE
from eventing.wire.events import EventType
from eventing.wire.generation import GenerateRequest, GenerateResponse
from functions.gateway.jobs.batches_api import BatchRequest
from functions.gateway.openai.embeddings import EmbeddingRequest, RerankRequest, ScoringRequest
from functions.gateway.openai.requests import ChatRequest, CompletionRequest
from functions.gateway.openai.responses_requests import ResponsesRequest
from functions.gateway.openai.tokens import DetokenizeRequest, TokenizeRequest
from functions.gateway.openapi import replies
from functions.gateway.page.pipeline_state import PipelineState

JSON: Final = "application/json"
HTML: Final = "text/html"
TEXT: Final = "text/plain"
FORM: Final = "multipart/form-data"
BYTES: Final = "application/octet-stream"
Content = Mapping[str, type | None]
"""Media type → type of the body; None: a text."""

_CE_HEADERS: Final[Mapping[str, Mapping[str, object]]] = {
    "ce-specversion": {"enum": ["1.0"]},
    "ce-id": {"minLength": 1},
    "ce-source": {"minLength": 1},
    "ce-type": {"enum": [EventType.GENERATE_REQUEST]},
    "ce-expirytime": {"format": "date-time"},
    "ce-model": {},
}
_SITE_ERRORS: Final = (403, 421)  # a page of another site asks
_BODY_ERRORS: Final = (400, *_SITE_ERRORS, 413, 415, 429)
_ANSWER_ERRORS: Final = (500, 503, 504)


@dataclass(frozen=True, slots=True)
class Operation:
    method: str
    path: str
    summary: str
    replies: Content | None  # with status 200; None: no body
    request: Content = field(default_factory=dict)
    errors: tuple[int, ...] = _SITE_ERRORS  # statuses
    keyed: bool = True  # requires an API key if the gateway has keys
    events: type | None = None  # data of each server-sent event, if the reply is a stream; an error may end it
    patched: bool = False  # events after the first are JSON merge patches of it
    headers: Mapping[str, Mapping[str, object]] = field(default_factory=dict)  # name → JSON schema without `type: string`
    query: Mapping[str, Mapping[str, object]] = field(default_factory=dict)  # name → JSON schema, a string's if it has no type
    negative: type | None = None  # body of status 503, if that is a regular reply


def operations(*, with_page: bool, with_jobs: bool = False) -> Iterator[Operation]:
    if with_page:
        yield Operation("get", "/", "The page: chat, and the live pipeline", {HTML: None}, keyed=False)
    yield Operation(
        "post",
        "/",
        f"A CloudEvent `{EventType.GENERATE_REQUEST}`, answered by a `{EventType.GENERATE_RESPONSE}`, or by a stream of events "
        "if `Accept` names one",
        {JSON: GenerateResponse, STRUCTURED_CONTENT_TYPE: replies.GenerateResponseEvent, EVENT_STREAM_CONTENT_TYPE: None},
        {STRUCTURED_CONTENT_TYPE: replies.GenerateRequestEvent, JSON: GenerateRequest},
        (*_BODY_ERRORS, 410, 422, *_ANSWER_ERRORS),
        events=replies.CloudEvent,
        headers=_CE_HEADERS,
    )
    for path, summary, request, reply, event in (
        ("chat/completions", "Continue a conversation", ChatRequest, replies.ChatCompletion, replies.ChatCompletionChunk),
        ("completions", "Continue a text", CompletionRequest, replies.Completion, replies.Completion),
        (
            "responses",
            "Continue a conversation, which is sent whole",
            ResponsesRequest,
            replies.ResponseObject,
            replies.ResponseEvent,
        ),
    ):
        yield Operation(
            "post",
            f"/v1/{path}",
            f"{summary}; with `stream`, by server-sent events",
            {JSON: reply, EVENT_STREAM_CONTENT_TYPE: None},
            {JSON: request},
            (*_BODY_ERRORS, 404, *_ANSWER_ERRORS),
            events=event,
            headers={"Idempotency-Key": {}},
        )
    for path, summary, asked, answer in (
        ("/v1/embeddings", "Vectors of texts", EmbeddingRequest, replies.EmbeddingReply),
        ("/v1/score", "How alike two texts are, for each pair", ScoringRequest, replies.ScoreReply),
        ("/score", "The same as /v1/score", ScoringRequest, replies.ScoreReply),
        ("/v1/rerank", "Documents in the order in which they answer a query", RerankRequest, replies.RerankReply),
        ("/rerank", "The same as /v1/rerank", RerankRequest, replies.RerankReply),
        ("/v2/rerank", "The same as /v1/rerank", RerankRequest, replies.RerankReply),
    ):
        refused = () if path.startswith("/v1") else (422,)
        yield Operation("post", path, summary, {JSON: answer}, {JSON: asked}, (*_BODY_ERRORS, 404, *refused, *_ANSWER_ERRORS))
    if with_jobs:
        yield from _jobs()
    yield Operation("get", "/v1/models", "The one model that is served", {JSON: replies.ModelList})
    yield Operation("get", "/v1/models/{model}", "The same by its name", {JSON: replies.ModelCard}, errors=(*_SITE_ERRORS, 404))
    yield Operation(
        "get",
        "/v1/pipeline/events",
        "The pipeline as server-sent events: `snapshot`, then `change` with merge patches of it (RFC 7396)",
        {EVENT_STREAM_CONTENT_TYPE: None},
        errors=(*_SITE_ERRORS, 429),
        events=PipelineState,
        patched=True,
    )
    token_errors = (*_BODY_ERRORS, 422, 503)
    yield Operation("post", "/tokenize", "The tokens of a text", {JSON: replies.Tokens}, {JSON: TokenizeRequest}, token_errors)
    yield Operation("post", "/detokenize", "The text of tokens", {JSON: replies.Text}, {JSON: DetokenizeRequest}, token_errors)
    yield Operation("get", "/health", "Replies if the process is alive", None, keyed=False)
    yield Operation("get", "/version", "Lamina's version", {JSON: replies.VersionReply}, keyed=False)
    yield Operation("get", "/openapi.json", "This document", {JSON: dict[str, Any]}, keyed=False)
    for path, summary, verdict in (
        ("/healthz", "Whether it is alive", replies.AliveReply),
        ("/readyz", "Whether it takes work", replies.ReadyReply),
    ):
        yield Operation("get", path, summary, {JSON: verdict}, errors=(), keyed=False, negative=verdict)


def _jobs() -> Iterator[Operation]:
    found = (*_SITE_ERRORS, 404, 500, 503)
    page: Mapping[str, Mapping[str, object]] = {"limit": {"type": "integer"}, "after": {}}
    upload = "Send a file of requests, with the purpose `batch`"
    create = "Have the requests of a file answered within a window"
    yield Operation("post", "/v1/files", upload, {JSON: replies.FileReply}, {FORM: replies.FileForm}, (400, 413, *found))
    yield Operation("get", "/v1/files", "Files, newest first", {JSON: replies.FileList}, errors=(400, *found), query=page)
    yield Operation("get", "/v1/files/{id}", "One file", {JSON: replies.FileReply}, errors=found)
    yield Operation("delete", "/v1/files/{id}", "Delete it", {JSON: replies.FileDeleted}, errors=(400, *found))
    yield Operation("get", "/v1/files/{id}/content", "Its content", {BYTES: None}, errors=found)
    yield Operation(
        "post",
        "/v1/batches",
        create,
        {JSON: replies.BatchReply},
        {JSON: BatchRequest},
        (*_BODY_ERRORS, 404, 500, 503),
        headers={"Idempotency-Key": {}},
    )
    yield Operation("get", "/v1/batches", "Batches, newest first", {JSON: replies.BatchList}, errors=(400, *found), query=page)
    keep = "Waits for half a minute: a gateway asks its own Service while batches are open, which keeps it from scaling to zero"
    yield Operation("get", "/v1/batches/hold", keep, {TEXT: None}, errors=(*_SITE_ERRORS, 500, 503), keyed=False)
    yield Operation("get", "/v1/batches/{id}", "One batch", {JSON: replies.BatchReply}, errors=found)
    yield Operation("post", "/v1/batches/{id}/cancel", "Cancel it", {JSON: replies.BatchReply}, errors=(413, 415, *found))
