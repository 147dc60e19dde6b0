"""Answers of `/v1/responses`: a document of items, or the events that build it up.

https://platform.openai.com/docs/api-reference/responses-streaming
"""

from collections.abc import Iterator, Sequence
from itertools import count
from typing import Any, Final

import msgspec

from eventing.http.sse import HEARTBEAT, encode_sse
from eventing.problems import Problem
from eventing.wire.generation import FinishReason, TokenLogprob
from functions.gateway.answers.generation import Generation
from functions.gateway.answers.streaming import spoken
from functions.gateway.openai.documents import Envelope
from functions.gateway.openai.errors import error_document
from functions.gateway.openai.logprobs import chat_logprobs
from functions.gateway.openai.responses_requests import ResponsesRequest
from functions.gateway.openai.responses_tools import CallItem
from functions.gateway.text import tool_calls
from functions.gateway.text.reasoning import Part
from functions.gateway.text.tokenizer import ModelText

Event = dict[str, Any]


class Item:
    """A message, or the thoughts before it."""

    def __init__(self, kind: str, request_id: str, index: int) -> None:
        self._is_message = kind == "content"
        self._prefix = "response.output_text" if self._is_message else "response.reasoning_text"
        id_ = ("msg_" if self._is_message else "rs_") + request_id.partition("_")[2] + (f"_{index}" if index else "")
        self._where = {"item_id": id_, "output_index": index, "content_index": 0}
        self._index = index
        self._id = id_
        self.kind = kind
        self.text = ""
        self.logprobs: list[Any] = []

    def document(self, status: str) -> dict[str, Any]:
        content = [] if status == "in_progress" else [self._part()]
        if self._is_message:
            return {"id": self._id, "type": "message", "role": "assistant", "status": status, "content": content}
        return {"id": self._id, "type": "reasoning", "summary": [], "status": status, "content": content}

    def begin(self) -> Iterator[Event]:
        item = self.document("in_progress")
        yield {"type": "response.output_item.added", "output_index": self._index, "item": item}
        yield {"type": "response.content_part.added", **self._where, "part": self._part()}

    def push(self, text: str, logprobs: list[Any]) -> Event:
        self.text += text
        self.logprobs += logprobs
        return {"type": f"{self._prefix}.delta", **self._where, "delta": text, **self._with(logprobs)}

    def end(self, status: str) -> Iterator[Event]:
        yield {"type": f"{self._prefix}.done", **self._where, "text": self.text, **self._with(self.logprobs)}
        yield {"type": "response.content_part.done", **self._where, "part": self._part()}
        yield {"type": "response.output_item.done", "output_index": self._index, "item": self.document(status)}

    def _with(self, logprobs: list[Any]) -> dict[str, Any]:
        return {"logprobs": logprobs} if self._is_message else {}

    def _part(self) -> dict[str, Any]:
        if self._is_message:
            return {"type": "output_text", "text": self.text, "annotations": [], "logprobs": self.logprobs}
        return {"type": "reasoning_text", "text": self.text}


class Output:
    """The items of an answer, as its text comes."""

    def __init__(self, reply: Generation, text: ModelText, asked: ResponsesRequest) -> None:
        self._reply = reply
        self._text = text
        self._reasoning = None if asked.constrained else text.reasoning(reply.answers[0].prompt_ids)
        self._calls = text.tools.parser(tools) if (tools := asked.callable_tools) else None
        self._waiting: list[TokenLogprob] = []
        self.items: list[Item | CallItem] = []

    def token(self, text: str, logprob: TokenLogprob | None) -> Iterator[Event]:
        if logprob is not None:
            self._waiting.append(logprob)
        if text:
            yield from self._parts([Part("content", text)] if self._reasoning is None else self._reasoning.push(text))

    def end(self, status: str) -> Iterator[Event]:
        yield from self._parts([] if self._reasoning is None else self._reasoning.finish())
        yield from self._called([] if self._calls is None else self._calls.finish())
        if not self.items or (self._waiting and self.items[-1].kind != CallItem.kind):
            yield from self._said("content", "")
        yield from self.items[-1].end(status)

    def _parts(self, parts: list[Part]) -> Iterator[Event]:
        for kind, text in parts:
            if kind == "content" and self._calls is not None:
                yield from self._called(self._calls.push(text))
            else:
                yield from self._said(kind, text)

    def _called(self, parts: Sequence[tool_calls.Part]) -> Iterator[Event]:
        for part in parts:
            if part.content:
                yield from self._said("content", part.content)
            if part.name is not None:
                yield from self._add(CallItem(self._text.tools.format.new_id(), part.name, len(self.items)))
            if part.arguments:
                yield self.items[-1].push(part.arguments, [])

    def _said(self, kind: str, text: str) -> Iterator[Event]:
        if not self.items or self.items[-1].kind != kind:
            yield from self._add(Item(kind, self._reply.request_id, len(self.items)))
        logprobs = chat_logprobs(self._text, self._waiting)["content"] if self._waiting else []
        self._waiting = []
        yield self.items[-1].push(text, logprobs)

    def _add(self, item: Item | CallItem) -> Iterator[Event]:
        if self.items:
            yield from self.items[-1].end("completed")
        self.items.append(item)
        yield from item.begin()


class ResponsesDocument:
    """Implements Document."""

    def __init__(self, envelope: Envelope, asked: ResponsesRequest) -> None:
        self._envelope = envelope
        self._asked = asked
        self._numbers: Final = count()

    def whole(self, reply: Generation, text: ModelText) -> dict[str, Any]:
        reply.response()
        choice = reply.answers[0].choice()
        output = Output(reply, text, self._asked)
        for logprob in choice.logprobs or ():
            list(output.token("", logprob))
        list(output.token(choice.text, None))
        list(output.end(_status(choice.finish_reason)))
        return self._document(reply, output, choice.finish_reason)

    def stream(self, reply: Generation, text: ModelText) -> Iterator[bytes]:
        output = Output(reply, text, self._asked)
        begun = False
        for token in spoken(reply.tokens()):
            if not begun:
                begun = True
                yield from self._begin(reply, output)
            if token is None:
                yield HEARTBEAT
            else:
                yield from map(self._sent, output.token(token.text, token.logprob))
        if not begun:
            yield from self._begin(reply, output)
        reason = reply.response().finish_reason
        status = _status(reason)
        yield from map(self._sent, output.end(status))
        yield self._sent({"type": f"response.{status}", "response": self._document(reply, output, reason)})

    def failure(self, problem: Problem) -> bytes:
        error = error_document(problem.status, str(problem), problem.name)["error"]
        return self._sent({"type": "error", "code": error["code"], "message": error["message"], "param": None})

    def _begin(self, reply: Generation, output: Output) -> Iterator[bytes]:
        for type_ in ("response.created", "response.in_progress"):
            yield self._sent({"type": type_, "response": self._document(reply, output, None)})

    def _sent(self, event: Event) -> bytes:
        numbered = {**event, "sequence_number": next(self._numbers)}
        return encode_sse(msgspec.json.encode(numbered), event=event["type"])

    def _document(self, reply: Generation, output: Output, reason: FinishReason | None) -> dict[str, Any]:
        """reason: None while it comes."""
        asked = self._asked
        status = "in_progress" if reason is None else _status(reason)
        effort = None if asked.reasoning is None else asked.reasoning.effort
        return {
            "id": self._envelope.id,
            "object": "response",
            "created_at": self._envelope.created,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": asked.instructions,
            "max_output_tokens": asked.max_output_tokens,
            "metadata": asked.metadata or {},
            "model": self._envelope.model,
            "output": [] if reason is None else self._items(output, status),
            "parallel_tool_calls": True if asked.parallel_tool_calls is None else asked.parallel_tool_calls,
            "previous_response_id": None,
            "reasoning": {"effort": effort, "summary": None},
            "service_tier": "default",
            "store": False,
            "temperature": 1.0 if asked.temperature is None else asked.temperature,
            "text": {"format": {"type": "text"} if asked.text is None else asked.text.format or {"type": "text"}},
            "tool_choice": asked.tool_choice or "auto",
            "tools": asked.tools or (),
            "top_logprobs": asked.top_logprobs or 0,
            "top_p": 1.0 if asked.top_p is None else asked.top_p,
            "truncation": "disabled",
            "usage": None if reason is None else _usage(reply),
            "user": asked.user,
        }

    def _items(self, output: Output, status: str) -> list[dict[str, Any]]:
        return [*(item.document("completed") for item in output.items[:-1]), output.items[-1].document(status)]


def _status(reason: FinishReason) -> str:
    return "incomplete" if reason == "length" else "completed"


def _usage(reply: Generation) -> dict[str, Any]:
    usage = reply.usage()
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.prompt_tokens_details.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.total_tokens,
    }
