"""The door that says how a text is read: /tokenize and /detokenize, as vLLM has them, and /health and /version."""

from collections.abc import Callable
from typing import Annotated, Final

from flask import Flask, Response, request
from msgspec import Meta, Struct

from eventing.problems import InvalidRequest
from functions.gateway.answers.access_log import entry
from functions.gateway.answers.clients import Clients
from functions.gateway.answers.service import AnswerService
from functions.gateway.openai.requests import ChatMessage
from functions.gateway.openai.validation import read_request
from functions.hosting.web import json_response

VERSION: Final = "0.1.0"
_MOST_TOKENS: Final = 2**20


class TokenizeRequest(Struct, frozen=True, kw_only=True):
    """Exactly one of `prompt` and `messages`. `add_special_tokens` is that of prompts: a chat's template writes its own."""

    model: str | None = None
    prompt: str | None = None
    messages: tuple[ChatMessage, ...] | None = None
    add_special_tokens: bool = True

    def __post_init__(self) -> None:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("exactly one of `prompt` and `messages` must be given")


class DetokenizeRequest(Struct, frozen=True, kw_only=True):
    tokens: Annotated[tuple[Annotated[int, Meta(ge=0, lt=2**31)], ...], Meta(max_length=_MOST_TOKENS)]
    model: str | None = None


class TokensAPI:
    def __init__(self, answers: Callable[[], AnswerService], clients: Clients) -> None:
        self._answers = answers
        self._clients = clients

    def register(self, app: Flask) -> None:
        app.post("/tokenize")(self._tokenize)
        app.post("/detokenize")(self._detokenize)
        app.get("/health")(_health)
        app.get("/version")(_version)

    def _tokenize(self) -> Response:
        entry().client_id = self._clients.identify(request)
        asked = read_request(request.get_data(cache=False), TokenizeRequest)
        text = self._answers().text
        if asked.messages is not None:
            token_ids = text.encode_messages([message.message() for message in asked.messages])
        else:
            prompt = asked.prompt or ""
            token_ids = text.encode(prompt) if asked.add_special_tokens else text.encode_expected(prompt)
        return json_response({"count": len(token_ids), "max_model_len": text.context_length, "tokens": token_ids})

    def _detokenize(self) -> Response:
        entry().client_id = self._clients.identify(request)
        asked = read_request(request.get_data(cache=False), DetokenizeRequest)
        tokenizer = self._answers().text.tokenizer
        size = tokenizer.get_vocab_size(with_added_tokens=True)
        if unknown := [token for token in asked.tokens if token >= size]:
            raise InvalidRequest(f"token {unknown[0]} is outside of the vocabulary of {size}")
        return json_response({"prompt": tokenizer.decode(asked.tokens, skip_special_tokens=False)})


def _health() -> Response:
    return Response(status=200)


def _version() -> Response:
    return json_response({"version": VERSION})
