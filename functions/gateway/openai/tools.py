"""Answers that call tools, as the documents of the OpenAI API."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from eventing.wire.generation import Choice, TokenEvent
from eventing.wire.tools import Tools
from functions.gateway.openai.writers import ChatShape, ChatWriter, Writer
from functions.gateway.text import reasoning
from functions.gateway.text.tokenizer import ModelText
from functions.gateway.text.tool_calls import Part, ToolCallParser


@dataclass(slots=True)
class ToolWriter(ChatWriter):
    """A chat's answer in which calls are looked for, behind its thoughts."""

    parser: ToolCallParser = field(kw_only=True)
    new_id: Callable[[], str] = field(kw_only=True)

    def chunks(self, token: TokenEvent) -> list[dict[str, Any]]:
        if token.logprob is not None:
            self.waiting.append(token.logprob)
        return [self._chunk(delta) for delta in self._deltas(self._parts(token.text))]

    def last(self, choice: Choice) -> list[dict[str, Any]]:
        chunks = [self._chunk(delta) for delta in self._left()]
        chunks += [self._chunk({"content": ""})] if self.waiting else []
        return [*chunks, self._chunk({}, self._finish_reason(choice))]

    def whole(self, choice: Choice) -> dict[str, Any]:
        document = ChatWriter.whole(self, choice)
        message = document["message"]
        calls: list[dict[str, Any]] = []
        content = ""
        for part in [*self.parser.push(message["content"]), *self.parser.finish()]:
            content += part.content
            if part.name is not None:
                calls.append(self._begun(part.name, ""))
            if part.arguments:
                calls[-1]["function"]["arguments"] += part.arguments
        message["content"] = content if content.strip() or not calls else None
        message |= {"tool_calls": calls} if calls else {}
        return {**document, "finish_reason": self._finish_reason(choice)}

    def _left(self) -> Iterator[dict[str, Any]]:
        if self.reasoning is not None:
            yield from self._deltas(self.reasoning.finish())
        yield from map(self._delta, self.parser.finish())

    def _deltas(self, parts: Sequence[reasoning.Part]) -> Iterator[dict[str, Any]]:
        for kind, text in parts:
            if kind == "content":
                yield from map(self._delta, self.parser.push(text))
            else:
                yield {"reasoning_content": text}

    def _delta(self, part: Part) -> dict[str, Any]:
        if part.call is None:
            return {"content": part.content}
        if part.name is None:
            return {"tool_calls": [{"index": part.call, "function": {"arguments": part.arguments}}]}
        return {"tool_calls": [{"index": part.call, **self._begun(part.name, part.arguments)}]}

    def _begun(self, name: str, arguments: str) -> dict[str, Any]:
        return {"id": self.new_id(), "type": "function", "function": {"name": name, "arguments": arguments}}

    def _finish_reason(self, choice: Choice) -> str:
        return "tool_calls" if self.parser.calls and choice.finish_reason == "stop" else choice.finish_reason


class ToolShape(ChatShape):
    """tools: that may be called."""

    def __init__(self, tools: Tools, *, constrained: bool) -> None:
        super().__init__(constrained=constrained)
        self._tools = tools

    def writer(self, index: int, prompt_ids: Sequence[int], text: ModelText) -> Writer:
        thoughts = self._reasoning(prompt_ids, text)
        return ToolWriter(index, text, thoughts, parser=text.tools.parser(self._tools), new_id=text.tools.format.new_id)
