"""The routes of the OpenAI API: chat completions, completions, responses and models."""

import hashlib
import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

import msgspec
from flask import Blueprint, Flask, Response, g, request

from eventing.problems import MalformedEvent, ModelNotFound
from functions.configuration.config import GatewayConfig
from functions.gateway.answers.access_log import log_entry
from functions.gateway.answers.adapters import ServedModels
from functions.gateway.answers.authentication import Clients
from functions.gateway.answers.deduplication import Deduplicator
from functions.gateway.answers.generation import Generation
from functions.gateway.answers.service import AnswerService
from functions.gateway.answers.streaming import Answering, client_gone, request_context, stream_response, whole_response
from functions.gateway.openai.documents import ChoicesDocument, Envelope
from functions.gateway.openai.errors import add_error_handlers, path_not_served
from functions.gateway.openai.requests import ChatRequest, CompletionRequest
from functions.gateway.openai.responses import ResponsesDocument
from functions.gateway.openai.responses_requests import ResponsesRequest
from functions.gateway.openai.validation import read_request
from functions.gateway.text.tokenizer import ModelText
from functions.hosting.web import json_response


@dataclass(frozen=True, slots=True)
class AnswerKind:
    """How requests to one path are read and answered."""

    type_: type[ChatRequest | CompletionRequest | ResponsesRequest]
    id_prefix: str
    document: Callable[[Envelope, Any], ChoicesDocument | ResponsesDocument]


ENDPOINTS: Final = {
    "/v1/chat/completions": AnswerKind(ChatRequest, "chatcmpl-", ChoicesDocument),
    "/v1/completions": AnswerKind(CompletionRequest, "cmpl-", ChoicesDocument),
    "/v1/responses": AnswerKind(ResponsesRequest, "resp_", ResponsesDocument),
}


@dataclass(frozen=True)
class OpenAIAPI:
    _service: Callable[[], AnswerService]  # raises NotReady before the tokenizer is loaded
    _clients: Clients
    _config: GatewayConfig
    _served: ServedModels
    _deduplicator: Deduplicator[bytes] = field(default_factory=Deduplicator)
    _began: int = field(default_factory=lambda: int(time.time()))

    def register(self, app: Flask) -> None:
        routes = Blueprint("openai", __name__, url_prefix="/v1")
        for path, kind in ENDPOINTS.items():
            routes.post(path.removeprefix("/v1"), endpoint=path.replace("/", "-"))(partial(self._answer, kind))
        routes.get("/models")(self._models)
        routes.get("/models/<path:model>")(self._one_model)
        add_error_handlers(routes)
        app.register_blueprint(routes)
        for status in (404, 405):  # a path without a route belongs to no blueprint
            app.register_error_handler(status, path_not_served)

    def _models(self) -> Response:
        self._clients.identify(request)
        return json_response({"object": "list", "data": [self._model_document(name) for name in self._served.names()]})

    def _one_model(self, model: str) -> Response:
        self._clients.identify(request)
        self._served.check(model)
        if model not in self._served.names():
            raise ModelNotFound(f"The model {model!r} is not served here; GET /v1/models lists those that are")
        return json_response(self._model_document(model))

    def _model_document(self, name: str) -> dict[str, Any]:
        document = {"id": name, "object": "model", "created": self._began, "owned_by": "lamina"}
        return document if name == self._config.model else {**document, "parent": self._config.model}

    def _answer(self, kind: AnswerKind) -> Response:
        entry, config = log_entry(), self._config
        client_id = entry.client_id = self._clients.identify(request)
        data = request.get_data(cache=False)
        body = read_request(data, kind.type_)
        self._served.check(body.model)
        key = request.headers.get("Idempotency-Key")
        # Without a key every request is new. With one, id and seed follow from it: every gateway gives the same answer.
        hashed = hashlib.sha256(f"{len(key)} {key} {request.path} ".encode() if key else secrets.token_bytes(32))
        if key:
            hashed.update(data)
        del data  # it would stay in memory, and in the budget of bodies, while the answer runs
        digest = hashed.digest()
        g.request_id = entry.request_id = id_ = kind.id_prefix + digest[:12].hex()
        try:
            generate_request = body.generate_request()
        except ValueError as error:
            raise MalformedEvent(f"the request cannot be served: {error}") from error
        document = kind.document(Envelope(id_, int(time.time()), body.model, config.pipeline), body)
        service = self._service()
        entry.request = generate_request

        def begin(gone: Callable[[], bool]) -> Generation:
            seed = int.from_bytes(digest[12:20]) >> 1
            context = request_context(id_, client_id, seed, config.request_timeout_seconds, gone)
            entry.generation = service.begin(generate_request, context)
            return entry.generation

        items_of = document.stream if body.stream else partial(_whole, document)
        source: Answering
        if key:
            shared_key = hashlib.sha256(client_id.encode() + digest).digest()
            source = self._deduplicator.listen(
                shared_key, id_, lambda abandoned: items_of(begin(abandoned), service.text), client_gone()
            )
            items = source.items()
        else:
            source = begin(client_gone())
            items = items_of(source, service.text)
        g.answering = True
        if body.stream:
            return stream_response(source, items, document.failure, config.keep_alive_seconds)
        return whole_response(items, lambda whole: Response(whole, content_type="application/json"))


def _whole(document: ChoicesDocument | ResponsesDocument, generation: Generation, text: ModelText) -> Iterator[bytes | None]:
    """Yields None while the answer is not complete, and then the whole reply as one item."""
    for _ in generation.tokens():
        yield None
    yield msgspec.json.encode(document.whole(generation, text))
