"""Replies of `/v1/responses`: one document of items, or the stream of events that builds it.

https://platform.openai.com/docs/api-reference/responses-streaming
"""

from collections.abc import Iterable, Iterator
from itertools import count
from typing import Any, Final

import msgspec

from eventing.http.sse import encode_sse
from eventing.problems import Problem
from eventing.wire.generation import FinishReason, ProgressEvent, TokenLogprob
from functions.gateway.answers.deduplication import PassingBytes
from functions.gateway.answers.generation import Generation
from functions.gateway.answers.streaming import begun
from functions.gateway.openai.documents import Envelope, chat_logprobs
from functions.gateway.openai.errors import error_document
from functions.gateway.openai.responses_requests import ResponsesRequest
from functions.gateway.text.reasoning import TextDelta
from functions.gateway.text.tokenizer import ModelText
from functions.gateway.text.tool_calls import AnswerPart

Event = dict[str, Any]


class TextItem:
    """An output item with text: a message (`kind` is content), or the model's thoughts before it (`kind` is reasoning).

    `begin`, `push` and `end` return the events that build the item in a stream; `document` returns the item itself.
    """

    def __init__(self, kind: str, request_id: str, index: int) -> None:
        self.kind = kind
        self.text = ""
        self._is_message = kind == "content"
        self._prefix = "response.output_text" if self._is_message else "response.reasoning_text"
        self._id = ("msg_" if self._is_message else "rs_") + request_id.partition("_")[2] + (f"_{index}" if index else "")
        self._index = index
        self._position = {"item_id": self._id, "output_index": index, "content_index": 0}
        self._logprobs: list[Any] = []

    def document(self, status: str) -> dict[str, Any]:
        content = [] if status == "in_progress" else [self._part()]
        if self._is_message:
            return {"id": self._id, "type": "message", "role": "assistant", "status": status, "content": content}
        return {"id": self._id, "type": "reasoning", "summary": [], "status": status, "content": content}

    def begin(self) -> Iterator[Event]:
        item = self.document("in_progress")
        yield {"type": "response.output_item.added", "output_index": self._index, "item": item}
        yield {"type": "response.content_part.added", **self._position, "part": self._part()}

    def push(self, text: str, logprobs: list[Any]) -> Event:
        self.text += text
        self._logprobs += logprobs
        return {"type": f"{self._prefix}.delta", **self._position, "delta": text, **self._logprobs_field(logprobs)}

    def end(self, status: str) -> Iterator[Event]:
        done = {"text": self.text, **self._logprobs_field(self._logprobs)}
        yield {"type": f"{self._prefix}.done", **self._position, **done}
        yield {"type": "response.content_part.done", **self._position, "part": self._part()}
        yield {"type": "response.output_item.done", "output_index": self._index, "item": self.document(status)}

    def _logprobs_field(self, logprobs: list[Any]) -> dict[str, Any]:
        return {"logprobs": logprobs} if self._is_message else {}

    def _part(self) -> dict[str, Any]:
        if self._is_message:
            return {"type": "output_text", "text": self.text, "annotations": [], "logprobs": self._logprobs}
        return {"type": "reasoning_text", "text": self.text}


class CallItem:
    """An output item that calls a function. `text` has the arguments so far, as JSON. Has the same methods as TextItem."""

    kind = "call"

    def __init__(self, call_id: str, name: str, index: int) -> None:
        self.text = ""
        self._call = {"call_id": call_id, "name": name}
        self._id = f"fc_{call_id.removeprefix('call_')}"
        self._index = index
        self._position = {"item_id": self._id, "output_index": index}

    def document(self, status: str) -> dict[str, Any]:
        return {"id": self._id, "type": "function_call", "status": status, **self._call, "arguments": self.text}

    def begin(self) -> Iterator[Event]:
        item = self.document("in_progress")
        yield {"type": "response.output_item.added", "output_index": self._index, "item": item}

    def push(self, text: str, _: list[Any]) -> Event:
        self.text += text
        return {"type": "response.function_call_arguments.delta", **self._position, "delta": text}

    def end(self, status: str) -> Iterator[Event]:
        done = {"name": self._call["name"], "arguments": self.text}
        yield {"type": "response.function_call_arguments.done", **self._position, **done}
        yield {"type": "response.output_item.done", "output_index": self._index, "item": self.document(status)}


class Output:
    """Splits an answer into output items.

    `token` and `end` yield the events that build the items; the caller must iterate each of these to its end.
    """

    def __init__(self, generation: Generation, text: ModelText) -> None:
        self.items: list[TextItem | CallItem] = []
        self._request_id = generation.request_id
        self._text = text
        self._parts = text.parts(generation.answers[0].prompt_ids, generation.request)
        self._logprobs: list[TokenLogprob] = []  # of tokens whose text is not yet certain

    def token(self, text: str, logprob: TokenLogprob | None) -> Iterator[Event]:
        if logprob is not None:
            self._logprobs.append(logprob)
        yield from self._add(self._parts.push(text))

    def end(self, status: str) -> Iterator[Event]:
        yield from self._add(self._parts.finish())
        if not self.items or (self._logprobs and self.items[-1].kind != CallItem.kind):
            yield from self._add_text("content", "")
        yield from self.items[-1].end(status)

    def documents(self, status: str) -> list[dict[str, Any]]:
        """Returns all items as the reply lists them. `status` is the status of the last item; the others are completed."""
        return [*(item.document("completed") for item in self.items[:-1]), self.items[-1].document(status)]

    def _add(self, parts: Iterable[AnswerPart]) -> Iterator[Event]:
        for part in parts:
            if isinstance(part, TextDelta):
                yield from self._add_text(*part)
                continue
            if part.name is not None:
                call_id = self._text.tools.format.call_id(self._request_id, 0, len(self.items))
                yield from self._begin_item(CallItem(call_id, part.name, len(self.items)))
            if part.arguments:
                yield self.items[-1].push(part.arguments, [])

    def _add_text(self, kind: str, text: str) -> Iterator[Event]:
        if not self.items or self.items[-1].kind != kind:
            yield from self._begin_item(TextItem(kind, self._request_id, len(self.items)))
        logprobs = chat_logprobs(self._text, self._logprobs)["content"] if self._logprobs else []
        self._logprobs = []
        yield self.items[-1].push(text, logprobs)

    def _begin_item(self, item: TextItem | CallItem) -> Iterator[Event]:
        if self.items:
            yield from self.items[-1].end("completed")
        self.items.append(item)
        yield from item.begin()


class ResponsesDocument:
    """Writes the reply of /v1/responses, whole or as a stream. Has the same methods as ChoicesDocument."""

    def __init__(self, envelope: Envelope, request: ResponsesRequest) -> None:
        self._envelope = envelope
        self._request = request
        self._sequence_numbers: Final = count()

    def whole(self, generation: Generation, text: ModelText) -> dict[str, Any]:
        generation.response()
        choice = generation.answers[0].choice()
        output = Output(generation, text)
        for logprob in choice.logprobs or ():
            list(output.token("", logprob))
        list(output.token(choice.text, None))
        list(output.end(_status(choice.finish_reason)))
        return self._document(generation, output, choice.finish_reason)

    def stream(self, generation: Generation, text: ModelText) -> Iterator[bytes | None]:
        output = Output(generation, text)
        tokens = yield from begun(generation.tokens())
        for type_ in ("response.created", "response.in_progress"):
            yield self._encode({"type": type_, "response": self._document(generation, output, None)})
        for token in tokens:
            if isinstance(token, ProgressEvent):
                yield PassingBytes(self._encode({"type": "response.progress", "progress": token}))
                continue
            built = [] if token is None else [*output.token(token.text, token.logprob)]
            yield from map(self._encode, built) if built else (None,)
        reason = generation.response().finish_reason
        status = _status(reason)
        yield from map(self._encode, output.end(status))
        yield self._encode({"type": f"response.{status}", "response": self._document(generation, output, reason)})

    def failure(self, problem: Problem) -> bytes:
        error = error_document(problem.status, str(problem), problem.name)["error"]
        return self._encode({"type": "error", "code": error["code"], "message": error["message"], "param": None})

    def _encode(self, event: Event) -> bytes:
        numbered = {**event, "sequence_number": next(self._sequence_numbers)}
        return encode_sse(msgspec.json.encode(numbered), event=event["type"])

    def _document(self, generation: Generation, output: Output, reason: FinishReason | None) -> dict[str, Any]:
        """Returns the `response` object. `reason` says why the answer ended.

        While the answer goes on, `reason` is None, and the object has no output and no usage.
        """
        request = self._request
        status = "in_progress" if reason is None else _status(reason)
        text_format = None if request.text is None else request.text.format
        return {
            "id": self._envelope.id,
            "object": "response",
            "created_at": self._envelope.created,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": request.instructions,
            "max_output_tokens": request.max_output_tokens,
            "metadata": request.metadata or {},
            "model": self._envelope.model,
            "output": [] if reason is None else output.documents(status),
            "parallel_tool_calls": request.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": None if request.reasoning is None else request.reasoning.effort, "summary": None},
            "service_tier": "default",
            "store": False,
            "temperature": 1.0 if request.temperature is None else request.temperature,
            "text": {"format": text_format or {"type": "text"}},
            "tool_choice": request.tool_choice or "auto",
            "tools": request.tools or (),
            "top_logprobs": request.top_logprobs or 0,
            "top_p": 1.0 if request.top_p is None else request.top_p,
            "truncation": "disabled",
            "usage": None if reason is None else _usage(generation),
            "user": request.user,
        }


def _status(reason: FinishReason) -> str:
    return "incomplete" if reason == "length" else "completed"


def _usage(generation: Generation) -> dict[str, Any]:
    usage = generation.usage()
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.prompt_tokens_details.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.total_tokens,
    }
