"""Answers as the documents of the OpenAI API: chat completions and completions, whole and in chunks."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

from eventing.wire.generation import Choice, TokenEvent, TokenLogprob
from functions.gateway.openai.logprobs import chat_logprobs, completion_logprobs
from functions.gateway.text.reasoning import Part, Reasoning
from functions.gateway.text.tokenizer import ModelText

_FIELDS: Final = {"reasoning": "reasoning_content", "content": "content"}
"""Of a message, by the part of a text."""


class Writer(Protocol):
    """Writes one of a request's answers, as it comes or as a whole."""

    def first(self) -> list[dict[str, Any]]:
        """Chunks that come before its first token."""

    def chunks(self, token: TokenEvent) -> list[dict[str, Any]]:
        """What `token` adds."""

    def last(self, choice: Choice) -> list[dict[str, Any]]:
        """What is left behind the last token, and how it ended."""

    def whole(self, choice: Choice) -> dict[str, Any]: ...


class Shape(Protocol):
    """How the answers to one request are written."""

    object: str
    chunk_object: str

    def writer(self, index: int, prompt_ids: Sequence[int], text: ModelText) -> Writer: ...


class ChatShape:
    object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def __init__(self, *, constrained: bool) -> None:
        """constrained: by a grammar, which has no thoughts."""
        self._constrained = constrained

    def writer(self, index: int, prompt_ids: Sequence[int], text: ModelText) -> Writer:
        return ChatWriter(index, text, self._reasoning(prompt_ids, text))

    def _reasoning(self, prompt_ids: Sequence[int], text: ModelText) -> Reasoning | None:
        return None if self._constrained else text.reasoning(prompt_ids)


class CompletionShape:
    object = "text_completion"
    chunk_object = "text_completion"

    def __init__(self, top_logprobs: int) -> None:
        self._top_logprobs = top_logprobs

    def writer(self, index: int, prompt_ids: Sequence[int], text: ModelText) -> Writer:
        return CompletionWriter(index, text, self._top_logprobs)


@dataclass(slots=True)
class ChatWriter:
    index: int
    text: ModelText
    reasoning: Reasoning | None
    waiting: list[TokenLogprob] = field(default_factory=list)
    """Of tokens whose text has not come yet."""

    def first(self) -> list[dict[str, Any]]:
        return [self._chunk({"role": "assistant", "content": ""})]

    def chunks(self, token: TokenEvent) -> list[dict[str, Any]]:
        if token.logprob is not None:
            self.waiting.append(token.logprob)
        return [self._chunk({_FIELDS[kind]: text}) for kind, text in self._parts(token.text)] if token.text else []

    def last(self, choice: Choice) -> list[dict[str, Any]]:
        left = [] if self.reasoning is None else [self._chunk({_FIELDS[kind]: text}) for kind, text in self.reasoning.finish()]
        left += [self._chunk({"content": ""})] if self.waiting else []
        return [*left, self._chunk({}, choice.finish_reason)]

    def whole(self, choice: Choice) -> dict[str, Any]:
        message = {"role": "assistant", "content": choice.text, "refusal": None}
        if self.reasoning is not None:
            parts = [*self._parts(choice.text), *self.reasoning.finish()]
            message |= {_FIELDS[kind]: "".join(part.text for part in parts if part.kind == kind) for kind in _FIELDS}
        logprobs = None if choice.logprobs is None else chat_logprobs(self.text, choice.logprobs)
        return {"index": self.index, "message": message, "finish_reason": choice.finish_reason, "logprobs": logprobs}

    def _parts(self, text: str) -> list[Part]:
        return [Part("content", text)] if self.reasoning is None else self.reasoning.push(text)

    def _chunk(self, delta: dict[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
        logprobs = chat_logprobs(self.text, self.waiting) if self.waiting else None
        self.waiting = []
        return {"index": self.index, "delta": delta, "finish_reason": finish_reason, "logprobs": logprobs}


@dataclass(slots=True)
class CompletionWriter:
    index: int
    text: ModelText
    top_logprobs: int
    waiting: list[TokenLogprob] = field(default_factory=list)
    offset: int = 0

    def first(self) -> list[dict[str, Any]]:
        return []

    def chunks(self, token: TokenEvent) -> list[dict[str, Any]]:
        if token.logprob is not None:
            self.waiting.append(token.logprob)
        return [self._chunk(token.text, None)] if token.text else []

    def last(self, choice: Choice) -> list[dict[str, Any]]:
        return [self._chunk("", choice.finish_reason)]

    def whole(self, choice: Choice) -> dict[str, Any]:
        self.waiting = list(choice.logprobs or ())
        return self._chunk(choice.text, choice.finish_reason)

    def _chunk(self, text: str, finish_reason: str | None) -> dict[str, Any]:
        logprobs = None
        if self.waiting:
            logprobs = completion_logprobs(self.text, self.waiting, self.offset, self.top_logprobs)
            self.offset = logprobs["text_offset"][-1] + len(logprobs["tokens"][-1])
            self.waiting = []
        return {"index": self.index, "text": text, "finish_reason": finish_reason, "logprobs": logprobs}
