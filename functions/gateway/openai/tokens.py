"""The routes /tokenize, /detokenize, /health and /version, with the same fields as in vLLM."""

from collections.abc import Callable
from typing import Annotated, Final

from flask import Flask, Response, request
from msgspec import Meta, Struct

from eventing.wire.events import MAX_POSITION, TokenId
from functions.gateway.answers.access_log import log_entry
from functions.gateway.answers.authentication import Clients
from functions.gateway.answers.service import AnswerService
from functions.gateway.openai.requests import ChatMessage
from functions.gateway.openai.validation import read_request
from functions.gateway.text.tokenizer import ModelText
from functions.hosting.web import json_response

VERSION: Final = "0.1.0"


class TokenizeRequest(Struct, frozen=True, kw_only=True):
    """A request to tokenize either `prompt` or `messages`.

    `add_special_tokens` has no effect on messages: the chat template writes their special tokens.
    """

    model: str | None = None
    prompt: str | None = None
    messages: tuple[ChatMessage, ...] | None = None
    add_special_tokens: bool = True

    def __post_init__(self) -> None:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("exactly one of `prompt` and `messages` must be given")


class DetokenizeRequest(Struct, frozen=True, kw_only=True):
    tokens: Annotated[tuple[TokenId, ...], Meta(max_length=MAX_POSITION)]
    model: str | None = None


class TokensAPI:
    def __init__(self, service: Callable[[], AnswerService], clients: Clients) -> None:
        self._service = service
        self._clients = clients

    def register(self, app: Flask) -> None:
        app.post("/tokenize")(self._tokenize)
        app.post("/detokenize")(self._detokenize)
        app.get("/health", endpoint="health")(lambda: Response(status=200))
        app.get("/version", endpoint="version")(lambda: json_response({"version": VERSION}))

    def _tokenize(self) -> Response:
        client_id = log_entry().client_id = self._clients.identify(request)
        body = read_request(request.get_data(cache=False), TokenizeRequest)

        def encode(text: ModelText) -> list[int]:
            if body.messages is not None:
                return text.encode_messages([message.message() for message in body.messages])
            return text.encoder.encode(body.prompt or "", add_special_tokens=body.add_special_tokens)

        service = self._service()
        token_ids = service.use_text(client_id, encode)
        return json_response({"count": len(token_ids), "max_model_len": service.text.context_length, "tokens": token_ids})

    def _detokenize(self) -> Response:
        client_id = log_entry().client_id = self._clients.identify(request)
        body = read_request(request.get_data(cache=False), DetokenizeRequest)

        def decode(text: ModelText) -> str:
            text.check_ids(body.tokens)
            return text.decode(body.tokens)

        return json_response({"prompt": self._service().use_text(client_id, decode)})
