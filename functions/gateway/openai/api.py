"""The door for clients of the OpenAI API: chat completions, completions, responses and the list of models."""

import secrets
import time
from collections.abc import Callable
from typing import Any, Final, TypeVar

from flask import Blueprint, Flask, Response, g, request
from werkzeug.exceptions import HTTPException

from eventing.problems import MalformedEvent, Problem
from eventing.wire.generation import GenerateRequest
from functions.gateway.answers.access_log import entry
from functions.gateway.answers.clients import Clients
from functions.gateway.answers.generation import Generation
from functions.gateway.answers.service import AnswerService, RequestContext
from functions.gateway.answers.streaming import arrived, client_gone, stream_response, whole_response
from functions.gateway.openai.documents import Choices, Document, Envelope
from functions.gateway.openai.errors import model_not_found, path_not_served, refused, unexpected
from functions.gateway.openai.requests import ChatRequest, CompletionRequest
from functions.gateway.openai.responses import ResponsesDocument
from functions.gateway.openai.responses_requests import ResponsesRequest
from functions.gateway.openai.tools import ToolShape
from functions.gateway.openai.validation import read_request
from functions.gateway.openai.writers import ChatShape, CompletionShape
from functions.hosting.web import json_response
from functions.observing.tracing import read_traceparent

_NOT_ROUTED: Final = (404, 405)

R = TypeVar("R", ChatRequest, CompletionRequest, ResponsesRequest)


class OpenAIAPI:
    """model: the one model that is served. pipeline: its fingerprint."""

    def __init__(
        self, answers: Callable[[], AnswerService], clients: Clients, model: str, pipeline: str, request_timeout_seconds: float
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
        door.post("/responses")(self._respond)
        door.get("/models")(self._models)
        door.get("/models/<path:model>")(self._one_model)
        door.errorhandler(Problem)(refused)
        door.errorhandler(HTTPException)(path_not_served)
        door.errorhandler(Exception)(unexpected)
        app.register_blueprint(door)
        for status in _NOT_ROUTED:
            app.register_error_handler(status, path_not_served)

    def _chat(self) -> Response:
        return self._answer(ChatRequest, "chatcmpl-", _chat_document)

    def _complete(self) -> Response:
        def document(own: Envelope, asked: CompletionRequest) -> Document:
            return Choices(own, CompletionShape(asked.logprobs or 0), asked.stream_options)

        return self._answer(CompletionRequest, "cmpl-", document)

    def _respond(self) -> Response:
        return self._answer(ResponsesRequest, "resp_", ResponsesDocument)

    def _models(self) -> Response:
        self._clients.identify(request)
        return json_response({"object": "list", "data": [self._model_document()]})

    def _one_model(self, model: str) -> Response:
        self._clients.identify(request)
        return json_response(self._model_document()) if model == self._model else model_not_found(model, self._model)

    def _answer(self, type_: type[R], id_prefix: str, document_of: Callable[[Envelope, R], Document]) -> Response:
        began = arrived()
        client_id = entry().client_id = self._clients.identify(request)
        asked = read_request(request.get_data(cache=False), type_)
        if asked.model != self._model:
            return model_not_found(asked.model, self._model)
        g.request_id = entry().request_id = id_ = id_prefix + secrets.token_hex(12)
        wanted = _wanted(asked)
        document = document_of(Envelope(id_, int(time.time()), self._model, self._pipeline), asked)
        answers = self._answers()
        reply = self._begin(answers, wanted, id_, client_id, began)
        g.answering = True
        if asked.stream:
            return stream_response(reply, document.stream(reply, answers.text), document.failure)
        return whole_response(reply, lambda: json_response(document.whole(reply, answers.text)))

    def _begin(self, answers: AnswerService, wanted: GenerateRequest, id_: str, client_id: str, began: float) -> Generation:
        trace = read_traceparent(request.headers.get("traceparent"))
        asker = RequestContext(id_, client_id, secrets.randbits(63), self._timeout_seconds, began, client_gone(), trace)
        entry().wanted = wanted
        entry().answer = reply = answers.begin(wanted, asker)
        return reply

    def _model_document(self) -> dict[str, Any]:
        return {"id": self._model, "object": "model", "created": self._started, "owned_by": "lamina"}


def _chat_document(own: Envelope, asked: ChatRequest) -> Document:
    tools, constrained = asked.callable_tools, asked.constrained
    shape = ToolShape(tools, constrained=constrained) if tools else ChatShape(constrained=constrained)
    return Choices(own, shape, asked.stream_options)


def _wanted(asked: ChatRequest | CompletionRequest | ResponsesRequest) -> GenerateRequest:
    """Raises MalformedEvent where options contradict each other."""
    try:
        return asked.generate_request()
    except ValueError as error:
        raise MalformedEvent(f"the request cannot be served: {error}") from error
