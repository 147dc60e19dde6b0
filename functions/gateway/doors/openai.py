"""The door for clients of the OpenAI API: chat completions, completions and the list of models."""

import logging
import secrets
import time
from collections.abc import Callable, Iterator
from typing import Any, Final, TypeVar

import msgspec
from flask import Blueprint, Flask, Response, g, request
from werkzeug.exceptions import HTTPException

from eventing.http.sse import HEARTBEAT, encode_sse
from eventing.problems import ContextExceeded, InvalidRequest, MalformedEvent, Problem
from eventing.wire.generation import GenerateRequest
from functions.gateway.doors.access_log import entry
from functions.gateway.doors.answers import Answers, Asker
from functions.gateway.doors.clients import Clients
from functions.gateway.doors.openai_documents import ChatShape, CompletionShape, Envelope, Shape, Writer
from functions.gateway.doors.openai_requests import read_request
from functions.gateway.doors.openai_types import ChatRequest, CompletionRequest, StreamOptions
from functions.gateway.doors.reply import Reply
from functions.gateway.doors.streaming import arrived, client_gone, spoken, stream_response, whole_response
from functions.gateway.text.tokenizer import ModelText
from functions.hosting.web import json_response, not_served, with_allow, with_retry_after
from functions.observing.tracing import read_traceparent

_log: Final = logging.getLogger(__name__)
_INVALID: Final = 400
_NOT_FOUND: Final = 404
_NOT_ROUTED: Final = (404, 405)
_PROMPT: Final = {"/v1/chat/completions": "messages", "/v1/completions": "prompt", "/v1/responses": "input"}
"""The parameter that has the prompt."""

R = TypeVar("R", ChatRequest, CompletionRequest)


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
        return self._answer(ChatRequest, lambda _: ChatShape())

    def _complete(self) -> Response:
        return self._answer(CompletionRequest, lambda asked: CompletionShape(asked.logprobs or 0))

    def _models(self) -> Response:
        self._clients.identify(request)
        return json_response({"object": "list", "data": [self._model_document()]})

    def _one_model(self, model: str) -> Response:
        self._clients.identify(request)
        return json_response(self._model_document()) if model == self._model else self._model_not_found(model)

    def _answer(self, type_: type[R], shape_of: Callable[[R], Shape]) -> Response:
        began = arrived()
        client_id = entry().client_id = self._clients.identify(request)
        asked = read_request(request.get_data(cache=False), type_)
        if asked.model != self._model:
            return self._model_not_found(asked.model)
        shape = shape_of(asked)
        g.request_id = entry().request_id = id_ = shape.id_prefix + secrets.token_hex(12)
        envelope = Envelope(shape, id_, int(time.time()), self._model, self._pipeline)
        answers = self._answers()
        reply = self._begin(answers, _wanted(asked), id_, client_id, began)
        g.answering = True
        text = answers.text
        if asked.stream:
            return stream_response(reply, _stream(envelope, reply, text, asked.stream_options), _failure)
        return whole_response(reply, lambda: _whole(envelope, reply, text))

    def _begin(self, answers: Answers, wanted: GenerateRequest, id_: str, client_id: str, began: float) -> Reply:
        trace = read_traceparent(request.headers.get("traceparent"))
        asker = Asker(id_, client_id, secrets.randbits(63), self._timeout_seconds, began, client_gone(), trace)
        entry().wanted = wanted
        entry().answer = reply = answers.begin(wanted, asker)
        return reply

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


def _writers(shape: Shape, reply: Reply, text: ModelText) -> list[Writer]:
    return [shape.writer(index, answer.prompt_ids, text) for index, answer in enumerate(reply.answers)]


def _whole(envelope: Envelope, reply: Reply, text: ModelText) -> Response:
    response = reply.response()
    writers = _writers(envelope.shape, reply, text)
    choices = [writer.whole(answer.choice()) for writer, answer in zip(writers, reply.answers, strict=True)]
    return json_response(envelope.document(envelope.shape.object, choices, usage=response.usage))


def _stream(envelope: Envelope, reply: Reply, text: ModelText, options: StreamOptions | None) -> Iterator[bytes]:
    with_usage = options is not None and bool(options.include_usage)
    continuous = options is not None and bool(options.continuous_usage_stats)
    writers = _writers(envelope.shape, reply, text)

    def sent(choices: list[dict[str, Any]], *, at_the_end: bool = False) -> bytes:
        usage = reply.usage() if continuous or at_the_end else None
        more = {"usage": usage} if with_usage else {}
        return encode_sse(msgspec.json.encode(envelope.document(envelope.shape.chunk_object, choices, **more)))

    begun = False
    for token in spoken(reply.tokens()):
        if not begun:
            begun = True
            yield from (sent([chunk]) for writer in writers for chunk in writer.first())
        if token is None:
            yield HEARTBEAT
        else:
            yield from (sent([chunk]) for chunk in writers[token.choice].chunks(token))
    if not begun:
        yield from (sent([chunk]) for writer in writers for chunk in writer.first())
    reply.response()
    for writer, answer in zip(writers, reply.answers, strict=True):
        yield from (sent([chunk]) for chunk in writer.last(answer.choice()))
    if with_usage:
        yield sent([], at_the_end=True)
    yield encode_sse("[DONE]")


def _failure(problem: Problem) -> bytes:
    return encode_sse(msgspec.json.encode(_error_document(problem.status, str(problem), problem.name)))


def _refused(problem: Problem) -> Response:
    """Where the API has a status of its own for what cannot be served, it is 400."""
    status = _INVALID if isinstance(problem, InvalidRequest) else problem.status
    parameter = _PROMPT.get(request.path) if isinstance(problem, ContextExceeded) else None
    return with_retry_after(_error(status, str(problem), problem.name, parameter), problem)


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
