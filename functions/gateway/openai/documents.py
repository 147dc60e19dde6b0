"""Chat completions and completions: a document with choices, or a stream of chunks that have some."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec

from eventing.http.sse import HEARTBEAT, encode_sse
from eventing.problems import Problem
from functions.gateway.answers.generation import Generation
from functions.gateway.answers.streaming import spoken
from functions.gateway.openai.errors import error_document
from functions.gateway.openai.requests import StreamOptions
from functions.gateway.openai.writers import Shape, Writer
from functions.gateway.text.tokenizer import ModelText


@dataclass(frozen=True, slots=True)
class Envelope:
    """What all documents of one request have in common."""

    id: str
    created: int
    model: str
    pipeline: str


class Document(Protocol):
    """How one request is answered."""

    def whole(self, reply: Generation, text: ModelText) -> dict[str, Any]:
        """Once it is complete."""

    def stream(self, reply: Generation, text: ModelText) -> Iterator[bytes]:
        """Server-sent events, and heartbeats between them."""

    def failure(self, problem: Problem) -> bytes:
        """The last event of a stream that breaks off."""


class Choices:
    """Implements Document."""

    def __init__(self, envelope: Envelope, shape: Shape, options: StreamOptions | None) -> None:
        self._envelope = envelope
        self._shape = shape
        self._with_usage = options is not None and bool(options.include_usage)
        self._continuous = options is not None and bool(options.continuous_usage_stats)

    def whole(self, reply: Generation, text: ModelText) -> dict[str, Any]:
        response = reply.response()
        writers = self._writers(reply, text)
        choices = [writer.whole(answer.choice()) for writer, answer in zip(writers, reply.answers, strict=True)]
        return self._document(self._shape.object, choices, usage=response.usage)

    def stream(self, reply: Generation, text: ModelText) -> Iterator[bytes]:
        writers = self._writers(reply, text)

        def sent(choices: list[dict[str, Any]], *, at_the_end: bool = False) -> bytes:
            usage = reply.usage() if self._continuous or at_the_end else None
            more = {"usage": usage} if self._with_usage else {}
            return encode_sse(msgspec.json.encode(self._document(self._shape.chunk_object, choices, **more)))

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
        if self._with_usage:
            yield sent([], at_the_end=True)
        yield encode_sse("[DONE]")

    def failure(self, problem: Problem) -> bytes:
        return encode_sse(msgspec.json.encode(error_document(problem.status, str(problem), problem.name)))

    def _writers(self, reply: Generation, text: ModelText) -> list[Writer]:
        return [self._shape.writer(index, answer.prompt_ids, text) for index, answer in enumerate(reply.answers)]

    def _document(self, object_: str, choices: Sequence[dict[str, Any]], **more: object) -> dict[str, Any]:
        return {
            "id": self._envelope.id,
            "object": object_,
            "created": self._envelope.created,
            "model": self._envelope.model,
            "system_fingerprint": self._envelope.pipeline,
            "choices": choices,
            **more,
        }
