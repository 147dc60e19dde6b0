"""The door for clients of the OpenAI API: chat completions, completions and the list of models."""

import logging
import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final, Protocol, TypeVar

import msgspec
from flask import Blueprint, Flask, Response, g, request
from werkzeug.exceptions import HTTPException

from eventing.http.sse import HEARTBEAT, encode_sse
from eventing.problems import MalformedEvent, Problem
from eventing.wire.generation import GenerateRequest, Usage
from functions.gateway.doors.access_log import entry
from functions.gateway.doors.answers import Answer, Answers, Asker
from functions.gateway.doors.clients import Clients
from functions.gateway.doors.openai_requests import read_request
from functions.gateway.doors.openai_types import ChatRequest, CompletionRequest
from functions.gateway.doors.streaming import arrived, client_gone, spoken, stream_response, whole_response
from functions.hosting.web import json_response, not_served, with_allow, with_retry_after
from functions.observing.tracing import read_traceparent

_log: Final = logging.getLogger(__name__)
_NOT_FOUND: Final = 404
_NOT_ROUTED: Final = (404, 405)

R = TypeVar("R", ChatRequest, CompletionRequest)


class Shape(Protocol):
    """How an answer is written: as a chat completion or as a completion."""

    object: str
    chunk_object: str
    id_prefix: str

    def choice(self, text: str, finish_reason: str) -> dict[str, Any]: ...

    def first_chunk(self) -> dict[str, Any] | None: ...

    def chunk(self, text: str, finish_reason: str | None) -> dict[str, Any]: ...


class ChatShape:
    object = "chat.completion"
    chunk_object = "chat.completion.chunk"
    id_prefix = "chatcmpl-"

    def choice(self, text: str, finish_reason: str) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"index": 0, "message": message, "finish_reason": finish_reason, "logprobs": None}

    def first_chunk(self) -> dict[str, Any] | None:
        return {"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None, "logprobs": None}

    def chunk(self, text: str, finish_reason: str | None) -> dict[str, Any]:
        delta = {"content": text} if finish_reason is None else {}
        return {"index": 0, "delta": delta, "finish_reason": finish_reason, "logprobs": None}


class CompletionShape:
    object = "text_completion"
    chunk_object = "text_completion"
    id_prefix = "cmpl-"

    def choice(self, text: str, finish_reason: str) -> dict[str, Any]:
        return self.chunk(text, finish_reason)

    def first_chunk(self) -> dict[str, Any] | None:
        return None

    def chunk(self, text: str, finish_reason: str | None) -> dict[str, Any]:
        return {"index": 0, "text": text, "finish_reason": finish_reason, "logprobs": None}


@dataclass(frozen=True, slots=True)
class Envelope:
    """What all documents of one answer have in common."""

    shape: Shape
    id: str
    created: int
    model: str
    pipeline: str

    def document(self, object_: str, choices: list[dict[str, Any]], **more: object) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": object_,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.pipeline,
            "choices": choices,
            **more,
        }


class OpenAIDoor:
    """model: the one model that is served. pipeline: its fingerprint."""

    def __init__(
        self, answers: Callable[[], Answers], clients: Clients, model: str, pipeline: str, request_timeout_seconds: float
    ) -> None:
        self._answers = answers
        self._clients = clients
        self._model = model
        self._pipeline = pipeline
        self._timeout_seconds = request_timeout_seconds
        self._started = int(time.time())

    def register(self, app: Flask) -> None:
        door = Blueprint("openai", __name__, url_prefix="/v1")
        door.post("/chat/completions")(self._chat)
        door.post("/completions")(self._complete)
        door.get("/models")(self._models)
        door.get("/models/<model>")(self._one_model)
        door.errorhandler(Problem)(_refused)
        door.errorhandler(HTTPException)(_not_served)
        door.errorhandler(Exception)(_unexpected)
        app.register_blueprint(door)
        for status in _NOT_ROUTED:
            app.register_error_handler(status, _not_served)

    def _chat(self) -> Response:
        return self._answer(ChatRequest, ChatShape())

    def _complete(self) -> Response:
        return self._answer(CompletionRequest, CompletionShape())

    def _models(self) -> Response:
        self._clients.identify(request)
        return json_response({"object": "list", "data": [self._model_document()]})

    def _one_model(self, model: str) -> Response:
        self._clients.identify(request)
        return json_response(self._model_document()) if model == self._model else self._model_not_found(model)

    def _answer(self, type_: type[R], shape: Shape) -> Response:
        began = arrived()
        client_id = entry().client_id = self._clients.identify(request)
        asked = read_request(request.get_data(cache=False), type_)
        if asked.model != self._model:
            return self._model_not_found(asked.model)
        g.request_id = entry().request_id = id_ = shape.id_prefix + secrets.token_hex(12)
        envelope = Envelope(shape, id_, int(time.time()), self._model, self._pipeline)
        answer = self._begin(_wanted(asked), id_, client_id, began)
        g.answering = True
        if asked.stream:
            with_usage = asked.stream_options is not None and bool(asked.stream_options.include_usage)
            return stream_response(answer, _stream(envelope, answer, with_usage), _failure)
        return whole_response(answer, lambda: _whole(envelope, answer))

    def _begin(self, wanted: GenerateRequest, id_: str, client_id: str, began: float) -> Answer:
        trace = read_traceparent(request.headers.get("traceparent"))
        asker = Asker(id_, client_id, secrets.randbits(63), self._timeout_seconds, began, client_gone(), trace)
        entry().wanted = wanted
        entry().answer = answer = self._answers().begin(wanted, asker)
        return answer

    def _model_document(self) -> dict[str, Any]:
        return {"id": self._model, "object": "model", "created": self._started, "owned_by": "lamina"}

    def _model_not_found(self, model: str) -> Response:
        message = f"The model {model!r} is not served here; this gateway serves {self._model!r}"
        return _error(_NOT_FOUND, message, "model_not_found", "model")


def _wanted(asked: ChatRequest | CompletionRequest) -> GenerateRequest:
    """Raises MalformedEvent where options contradict each other."""
    try:
        return asked.generate_request()
    except ValueError as error:
        raise MalformedEvent(f"the request cannot be served: {error}") from error


def _whole(envelope: Envelope, answer: Answer) -> Response:
    response = answer.response()
    choices = [envelope.shape.choice(response.text, response.finish_reason)]
    return json_response(envelope.document(envelope.shape.object, choices, usage=response.usage))


def _stream(envelope: Envelope, answer: Answer, with_usage: bool) -> Iterator[bytes]:
    def sent(choices: list[dict[str, Any]], usage: Usage | None = None) -> bytes:
        more = {"usage": usage} if with_usage else {}
        return encode_sse(msgspec.json.encode(envelope.document(envelope.shape.chunk_object, choices, **more)))

    first = envelope.shape.first_chunk()
    for token in spoken(answer.tokens()):
        if first is not None:
            yield sent([first])
            first = None
        if token is None:
            yield HEARTBEAT
        elif token.text:
            yield sent([envelope.shape.chunk(token.text, None)])
    response = answer.response()
    yield sent([envelope.shape.chunk("", response.finish_reason)])
    if with_usage:
        yield sent([], response.usage)
    yield encode_sse("[DONE]")


def _failure(problem: Problem) -> bytes:
    return encode_sse(msgspec.json.encode(_error_document(problem.status, str(problem), problem.name)))


def _refused(problem: Problem) -> Response:
    return with_retry_after(_error(problem.status, str(problem), problem.name), problem)


def _not_served(error: HTTPException) -> Response:
    """Also where no door has the path."""
    if not request.path.startswith("/v1"):
        return not_served(error)
    message = f"{request.method} {request.path}: {error.description or error.name}"
    return with_allow(_error(error.code or _NOT_FOUND, message, error.name.lower().replace(" ", "_")), error)


def _unexpected(error: Exception) -> Response:
    _log.error("unexpected error", exc_info=error)
    return _error(500, f"{type(error).__name__}; the log of this instance has the traceback", "internal")


def _error(status: int, message: str, code: str, parameter: str | None = None) -> Response:
    return json_response(_error_document(status, message, code, parameter), status)


def _error_document(status: int, message: str, code: str, parameter: str | None = None) -> dict[str, Any]:
    types = {401: "authentication_error", 429: "rate_limit_error"}
    kind = types.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": parameter, "code": code.replace("-", "_")}}
