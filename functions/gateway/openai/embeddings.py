"""The routes of embeddings and scores: /v1/embeddings as in the OpenAI API, /score and /rerank as in vLLM's and Jina's.

/score and /rerank are also served below /v1.
"""

import base64
import math
import secrets
import sys
import time
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal, TypeVar

from flask import Blueprint, Flask, Response, g, request
from msgspec import Meta, Struct

from eventing.problems import InvalidRequest, ModelNotFound
from eventing.wire.events import MAX_POSITION, Pooling, TokenId
from eventing.wire.generation import PromptIds, PromptText
from functions.configuration.config import GatewayConfig
from functions.gateway.answers.access_log import log_entry
from functions.gateway.answers.adapters import is_not_served
from functions.gateway.answers.authentication import Clients
from functions.gateway.answers.generation import ClientLeft
from functions.gateway.answers.service import RequestContext
from functions.gateway.answers.streaming import CLIENT_CLOSED_REQUEST, request_context
from functions.gateway.answers.vectors import Vectors, VectorService
from functions.gateway.openai.errors import add_error_handlers
from functions.gateway.openai.requests import HINT
from functions.gateway.openai.validation import read_request
from functions.hosting.web import json_response

EMBEDDINGS: Final = "/v1/embeddings"
MAX_INPUTS: Final = 2048  # of one request, as in the OpenAI API

Inputs = PromptText | Annotated[tuple[PromptText | TokenId | PromptIds, ...], Meta(min_length=1)]
Texts = PromptText | Annotated[tuple[PromptText, ...], Meta(min_length=1, max_length=MAX_INPUTS)]
Truncated = Annotated[
    Annotated[int, Meta(ge=-1, le=MAX_POSITION)] | None,
    Meta(description="longer texts lose the tokens after so many (vLLM); -1: those that the model cannot take"),
]


class EmbeddingRequest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    model: Annotated[str, Meta(description="the served model's name; another gets 404")]
    input: Annotated[Inputs, Meta(description="one text or several, or their token ids")]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Annotated[
        Annotated[int, Meta(ge=1)] | None, Meta(description="shorter vectors, if the model was trained for it")
    ] = None
    user: Annotated[str | None, HINT] = None
    truncate_prompt_tokens: Truncated = None
    normalize: Annotated[bool | None, Meta(description="to length 1 (vLLM); default: as the model is published")] = None
    pooling: Annotated[
        Literal["mean", "last"] | None,
        Meta(description="of a model that generates text, whose default is the last token; an embedder has its own"),
    ] = None

    @property
    def inputs(self) -> Sequence[str | Sequence[int]]:
        """Returns the inputs one by one. Raises InvalidRequest if their kinds are mixed, or if there are too many."""
        if isinstance(self.input, str):
            return (self.input,)
        kinds = {type(part) for part in self.input}
        if len(kinds) > 1:
            raise InvalidRequest("`input` mixes texts, token ids and lists of them; send one kind")
        if kinds == {int}:
            return (self.input,)  # type: ignore[return-value]
        if len(self.input) > MAX_INPUTS:
            raise InvalidRequest(f"`input` has {len(self.input)} texts; the most is {MAX_INPUTS}")
        return self.input  # type: ignore[return-value]


class ScoringRequest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A request to score pairs of texts: one text_1 with each text_2, or as many texts in both."""

    model: str | None = None
    text_1: Texts
    text_2: Texts
    user: Annotated[str | None, HINT] = None
    truncate_prompt_tokens: Truncated = None

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """Returns the pairs to score. Raises InvalidRequest if the numbers of texts do not fit together."""
        left, right = ([texts] if isinstance(texts, str) else list(texts) for texts in (self.text_1, self.text_2))
        if len(left) == 1:
            left = left * len(right)
        if len(left) != len(right):
            raise InvalidRequest(
                f"`text_1` has {len(left)} texts and `text_2` {len(right)}; send one text_1, or as many of both"
            )
        return list(zip(left, right, strict=True))


class RerankDocument(Struct, frozen=True):
    text: PromptText


class RerankRequest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    model: str | None = None
    query: PromptText
    documents: Annotated[tuple[PromptText | RerankDocument, ...], Meta(min_length=1, max_length=MAX_INPUTS)]
    top_n: Annotated[Annotated[int, Meta(ge=0)] | None, Meta(description="so many of the best; 0 and null: all")] = None
    return_documents: Annotated[bool, Meta(description="each result has its document (Jina)")] = True
    user: Annotated[str | None, HINT] = None
    truncate_prompt_tokens: Truncated = None


T = TypeVar("T", EmbeddingRequest, ScoringRequest, RerankRequest)


@dataclass(frozen=True, slots=True)
class EmbeddingsAPI:
    _service: VectorService
    _clients: Clients
    _config: GatewayConfig

    def register(self, app: Flask) -> None:
        routes = Blueprint("embeddings", __name__, url_prefix="/v1")
        routes.post("/embeddings")(self._embed)
        routes.post("/score")(self._score)
        routes.post("/rerank")(self._rerank)
        add_error_handlers(routes)
        for place in (routes, app):
            place.register_error_handler(ClientLeft, lambda _: Response(status=CLIENT_CLOSED_REQUEST))
        app.register_blueprint(routes)
        app.post("/score", endpoint="score")(self._score)
        for path in ("/rerank", "/v2/rerank"):
            app.post(path, endpoint=path.replace("/", "-"))(self._rerank)

    def _embed(self) -> Response:
        context, body = self._read("embd-", EmbeddingRequest)
        g.answering = True  # VectorService counts it
        document = embeddings_document(self._service, body, context, int(time.time()))
        log_entry().prompt_tokens = document["usage"]["prompt_tokens"]
        return json_response(document)

    def _score(self) -> Response:
        context, body = self._read("score-", ScoringRequest)
        scores, made = self._scores(body.pairs, context, body.truncate_prompt_tokens)
        data = [{"index": number, "object": "score", "score": score} for number, score in enumerate(scores)]
        return json_response(
            {"id": context.request_id, "object": "list", "created": int(time.time())}
            | {"model": self._config.model, "data": data, "usage": _usage(made)}
        )

    def _rerank(self) -> Response:
        context, body = self._read("rerank-", RerankRequest)
        texts = [each if isinstance(each, str) else each.text for each in body.documents]
        scores, made = self._scores([(body.query, text) for text in texts], context, body.truncate_prompt_tokens)
        best = sorted(range(len(texts)), key=lambda number: -scores[number])[: body.top_n or None]
        results = [
            {"index": number, "relevance_score": scores[number]}
            | ({"document": {"text": texts[number]}} if body.return_documents else {})
            for number in best
        ]
        return json_response({"id": context.request_id, "model": self._config.model, "usage": _usage(made), "results": results})

    def _scores(
        self, pairs: Sequence[tuple[str, str]], context: RequestContext, truncate: int | None
    ) -> tuple[list[float], Vectors]:
        """Returns the score of each pair, and the vectors that were computed for it.

        With a classifier the score is its probability, from 0 to 1. Otherwise it is the cosine of the two texts' vectors.
        """
        service = self._service
        if service.classifies:
            made = self._made(lambda text: [service.checked(pair, text, truncate) for pair in pairs], context, Pooling.LAST)
            return [1 / (1 + math.exp(-logit)) if logit > -700 else 0.0 for (logit,) in made.vectors], made
        texts = list(dict.fromkeys(text for pair in pairs for text in pair))
        made = self._made(lambda text: [service.checked(each, text, truncate) for each in texts], context, None)
        unit = {text: shaped(vector, None, normalize=True) for text, vector in zip(texts, made.vectors, strict=True)}
        return [sum(map(float.__mul__, unit[left], unit[right])) for left, right in pairs], made

    def _made(self, encode: Any, context: RequestContext, pooling: Pooling | None) -> Vectors:
        g.answering = True  # VectorService counts it
        made = self._service.make(encode, context, pooling)
        log_entry().prompt_tokens = made.prompt_tokens
        return made

    def _read(self, prefix: str, type_: type[T]) -> tuple[RequestContext, T]:
        """Reads the current request: its context and its body. The request's id begins with `prefix`.

        Raises Unauthorized, MalformedEvent or ModelNotFound.
        """
        entry = log_entry()
        entry.client_id = client_id = self._clients.identify(request)
        g.request_id = entry.request_id = id_ = prefix + secrets.token_hex(12)
        body = read_request(request.get_data(cache=False), type_)
        if body.model not in (None, self._config.model):
            raise ModelNotFound(is_not_served(body.model, self._config.model))
        return request_context(id_, client_id, 0, self._config.request_timeout_seconds), body


def embeddings_document(
    service: VectorService, body: EmbeddingRequest, context: RequestContext, created: int
) -> dict[str, Any]:
    """Computes the vectors of a request and returns the reply. `created` is a Unix time. Raises the errors of VectorService."""
    inputs, pooling = body.inputs, None if body.pooling is None else Pooling(body.pooling)
    size = service.checked_dimensions(body.dimensions, pooling)
    made = service.make(
        lambda text: [service.checked(each, text, body.truncate_prompt_tokens) for each in inputs], context, pooling
    )
    normalize = service.normalizes if body.normalize is None else body.normalize
    vectors = [shaped(vector, size, normalize=normalize) for vector in made.vectors]
    encoded: list[Any] = [_base64(each) for each in vectors] if body.encoding_format == "base64" else vectors
    data = [{"object": "embedding", "index": number, "embedding": each} for number, each in enumerate(encoded)]
    named = {"id": context.request_id, "object": "list", "created": created, "model": body.model}
    return named | {"data": data, "usage": _usage(made)}


def shaped(vector: Sequence[float], size: int | None, *, normalize: bool) -> list[float]:
    """Returns the vector's first `size` numbers, or all if `size` is None. If `normalize`, divides them by their length."""
    kept = list(vector[:size])
    length = math.hypot(*kept) if normalize else 1.0
    return [number / length for number in kept] if length else kept


def _base64(vector: Sequence[float]) -> str:
    numbers = array("f", vector)
    if sys.byteorder == "big":
        numbers.byteswap()
    return base64.b64encode(numbers.tobytes()).decode()


def _usage(made: Vectors) -> dict[str, int]:
    return {"prompt_tokens": made.prompt_tokens, "total_tokens": made.prompt_tokens, "completion_tokens": 0}
