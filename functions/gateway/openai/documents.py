"""Replies to chat completions and completions: one document with choices, or a stream of chunks."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from eventing.http.sse import encode_sse
from eventing.problems import Problem
from eventing.wire.generation import Choice, ProgressEvent, TokenEvent, TokenLogprob
from functions.gateway.answers.deduplication import PassingBytes
from functions.gateway.answers.generation import Generation
from functions.gateway.answers.streaming import begun
from functions.gateway.openai.errors import error_document
from functions.gateway.openai.requests import ChatRequest, CompletionRequest
from functions.gateway.text.reasoning import TextDelta
from functions.gateway.text.tokenizer import ModelText
from functions.gateway.text.tool_calls import AnswerPart, AnswerParts


@dataclass(frozen=True, slots=True)
class Envelope:
    id: str
    created: int  # in Unix time
    model: str
    pipeline: str  # its fingerprint


class ChoicesDocument:
    """Writes the reply to a request for completions, whole or as a stream. `choices` in it has an entry for each answer.

    Has the same methods as ResponsesDocument.
    """

    def __init__(self, envelope: Envelope, request: ChatRequest | CompletionRequest) -> None:
        self._envelope = envelope
        self._is_chat = isinstance(request, ChatRequest)
        self._object = "chat.completion" if self._is_chat else "text_completion"
        self._chunk_object = "chat.completion.chunk" if self._is_chat else "text_completion"
        options = request.stream_options
        self._with_usage = options is not None and bool(options.include_usage)
        self._with_continuous_usage = self._with_usage and options is not None and bool(options.continuous_usage_stats)

    def whole(self, generation: Generation, text: ModelText) -> dict[str, Any]:
        """Returns the whole reply. Call it only after the last token."""
        response = generation.response()
        writers = self._writers(generation, text)
        choices = [writer.whole(answer.choice()) for writer, answer in zip(writers, generation.answers, strict=True)]
        return self._document(self._object, choices, usage=response.usage)

    def stream(self, generation: Generation, text: ModelText) -> Iterator[bytes | None]:
        """Yields the reply as server-sent events, and None when there is nothing to send.

        Raises the Problem that ended an answer early.
        """
        writers = self._writers(generation, text)

        def event(choices: Sequence[dict[str, Any]], **more: object) -> bytes:
            usage = {"usage": generation.usage() if self._with_continuous_usage else None} if self._with_usage else {}
            return encode_sse(msgspec.json.encode(self._document(self._chunk_object, choices, **usage, **more)))

        def events(chunks: list[dict[str, Any]]) -> Iterator[bytes]:
            for chunk in chunks:
                yield event([chunk])

        tokens = yield from begun(generation.tokens())
        for writer in writers:
            yield from events(writer.first())
        for token in tokens:
            if isinstance(token, ProgressEvent):
                yield PassingBytes(event([], progress=token))
                continue
            chunks = [] if token is None else writers[token.choice].chunks(token)
            yield from events(chunks) if chunks else (None,)
        response = generation.response()
        for writer, answer in zip(writers, generation.answers, strict=True):
            yield from events(writer.last(answer.choice()))
        if self._with_usage:
            yield encode_sse(msgspec.json.encode(self._document(self._chunk_object, [], usage=response.usage)))
        yield encode_sse("[DONE]")

    def failure(self, problem: Problem) -> bytes:
        """Returns the server-sent event with an error that ends a stream early."""
        return encode_sse(msgspec.json.encode(error_document(problem.status, str(problem), problem.name)))

    def _writers(self, generation: Generation, text: ModelText) -> "list[Writer]":
        request, answers = generation.request, enumerate(generation.answers)
        if not self._is_chat:
            return [CompletionWriter(index, text, top_logprobs=request.logprobs or 0) for index, _ in answers]
        return [ChatWriter(self._envelope.id, index, text, text.parts(answer.prompt_ids, request)) for index, answer in answers]

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


@dataclass(slots=True)
class ChatWriter:
    """Writes the entry of `choices` for one chat answer, split into thoughts, content and tool calls.

    For a whole reply call `whole`, once. For a stream call `first`, then `chunks` with each token, then `last`.
    """

    request_id: str
    index: int
    text: ModelText
    parts: AnswerParts
    logprobs: list[TokenLogprob] = field(default_factory=list)  # of tokens whose text is not yet certain

    def first(self) -> list[dict[str, Any]]:
        """Returns the entries of `choices` to send before the first token, each in a chunk of its own."""
        return [self._chunk({"role": "assistant", "content": ""})]

    def chunks(self, token: TokenEvent) -> list[dict[str, Any]]:
        """Returns the entries of `choices` to send for `token`. There are none while the text is not certain."""
        if token.logprob is not None:
            self.logprobs.append(token.logprob)
        return [self._chunk(self._delta(part)) for part in self.parts.push(token.text)]

    def last(self, choice: Choice) -> list[dict[str, Any]]:
        """Returns the entries of `choices` to send after the last token. The last entry has the finish reason."""
        chunks = [self._chunk(self._delta(part)) for part in self.parts.finish()]
        if self.logprobs:
            chunks.append(self._chunk({"content": ""}))
        return [*chunks, self._chunk({}, self._finish_reason(choice))]

    def whole(self, choice: Choice) -> dict[str, Any]:
        content = thoughts = ""
        calls: list[dict[str, Any]] = []
        for delta in map(self._delta, (*self.parts.push(choice.text), *self.parts.finish())):
            content += delta.get("content", "")
            thoughts += delta.get("reasoning_content", "")
            for call in delta.get("tool_calls", ()):
                if "id" in call:
                    calls.append({name: value for name, value in call.items() if name != "index"})
                else:
                    calls[-1]["function"]["arguments"] += call["function"]["arguments"]
        only_calls = bool(calls) and not content.strip()
        message: dict[str, Any] = {"role": "assistant", "content": None if only_calls else content, "refusal": None}
        if self.parts.reasoning is not None:
            message["reasoning_content"] = thoughts
        if calls:
            message["tool_calls"] = calls
        logprobs = None if choice.logprobs is None else chat_logprobs(self.text, choice.logprobs)
        return {"index": self.index, "message": message, "finish_reason": self._finish_reason(choice), "logprobs": logprobs}

    def _delta(self, part: AnswerPart) -> dict[str, Any]:
        if isinstance(part, TextDelta):
            return {"content" if part.kind == "content" else "reasoning_content": part.text}
        if part.name is None:
            return {"tool_calls": [{"index": part.call, "function": {"arguments": part.arguments}}]}
        function = {"name": part.name, "arguments": part.arguments}
        call_id = self.text.tools.format.call_id(self.request_id, self.index, part.call)
        call = {"index": part.call, "id": call_id, "type": "function", "function": function}
        return {"tool_calls": [call]}

    def _finish_reason(self, choice: Choice) -> str:
        calls = 0 if self.parts.parser is None else self.parts.parser.calls
        return "tool_calls" if calls and choice.finish_reason == "stop" else choice.finish_reason

    def _chunk(self, delta: dict[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
        logprobs = chat_logprobs(self.text, self.logprobs) if self.logprobs else None
        self.logprobs = []
        return {"index": self.index, "delta": delta, "finish_reason": finish_reason, "logprobs": logprobs}


@dataclass(slots=True)
class CompletionWriter:
    """Writes the entry of `choices` for one text completion. Has the same methods as ChatWriter."""

    index: int
    text: ModelText
    top_logprobs: int
    logprobs: list[TokenLogprob] = field(default_factory=list)  # of tokens whose text is not yet certain
    offset: int = 0  # characters written so far, if log-probabilities are wanted

    def first(self) -> list[dict[str, Any]]:
        return []

    def chunks(self, token: TokenEvent) -> list[dict[str, Any]]:
        if token.logprob is not None:
            self.logprobs.append(token.logprob)
        return [self._chunk(token.text, None)] if token.text else []

    def last(self, choice: Choice) -> list[dict[str, Any]]:
        return [self._chunk("", choice.finish_reason)]

    def whole(self, choice: Choice) -> dict[str, Any]:
        self.logprobs = list(choice.logprobs or ())
        return self._chunk(choice.text, choice.finish_reason)

    def _chunk(self, text: str, finish_reason: str | None) -> dict[str, Any]:
        document = {"index": self.index, "text": text, "finish_reason": finish_reason, "logprobs": None}
        if self.logprobs:
            document["logprobs"] = self._logprobs()
            self.logprobs = []
        return document

    def _logprobs(self) -> dict[str, Any]:
        tokens = [self.text.token_text(each.token_id) for each in self.logprobs]
        offsets = []
        for token in tokens:
            offsets.append(self.offset)
            self.offset += len(token)
        return {
            "tokens": tokens,
            "token_logprobs": [each.logprob for each in self.logprobs],
            "top_logprobs": [self._top(each) for each in self.logprobs] if self.top_logprobs else None,
            "text_offset": offsets,
        }

    def _top(self, position: TokenLogprob) -> dict[str, float] | None:
        """Returns the log-probabilities of the likeliest tokens and of the drawn token, by the token's text.

        If several tokens have the same text, the likeliest counts. Returns None for a prompt's first token, which has no
        probability.
        """
        if position.logprob is None:
            return None
        by_text: dict[str, float] = {}
        for token_id, logprob in (*position.top, (position.token_id, position.logprob)):
            by_text.setdefault(self.text.token_text(token_id), logprob)
        return by_text


Writer = ChatWriter | CompletionWriter


def chat_logprobs(text: ModelText, logprobs: Sequence[TokenLogprob]) -> dict[str, Any]:
    known: dict[int, dict[str, Any]] = {}  # by token: most are among the likeliest at several positions

    def one(token_id: int, logprob: float | None) -> dict[str, Any]:
        if token_id not in known:
            raw = text.token_bytes(token_id)
            known[token_id] = {"token": text.token_text(token_id), "bytes": None if raw is None else list(raw)}
        return {"logprob": logprob, **known[token_id]}

    content = [
        one(each.token_id, each.logprob) | {"top_logprobs": [one(token_id, logprob) for token_id, logprob in each.top]}
        for each in logprobs
    ]
    return {"content": content, "refusal": None}
