"""How a model is told of tools, and how it calls them: by its chat template, or as Hermes was trained where that knows none."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from eventing.wire.generation import Message
from eventing.wire.tools import Tool, ToolCall
from functions.gateway.text.tool_calls import ToolCallParser
from functions.gateway.text.tool_formats import ToolFormat

_TOLD: Final = """\
You are a function calling AI model. You are provided with function signatures within <tools></tools> XML tags. You may call \
one or more functions to assist with the user query. Don't make assumptions about what values to plug into functions.
<tools>
{tools}
</tools>
For each function call return a JSON object with the function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-dict>}}
</tool_call>"""
"""After Hermes 2 Pro's prompt format."""


@dataclass(frozen=True, slots=True)
class ModelTools:
    format: ToolFormat
    told_by_template: bool
    """The chat template knows `tools`."""
    special: Mapping[str, int]
    """Special tokens: no text becomes them, and no text is made of them unless that is asked for."""

    @property
    def marked_specially(self) -> bool:
        """A call begins with a special token."""
        return self.format.marker in self.special

    def parser(self, tools: Sequence[Tool]) -> ToolCallParser:
        return ToolCallParser(self.format, frozenset(tool.function.name for tool in tools))

    def grammar(self, tools: Sequence[Tool], parallel: bool) -> str:
        """The source of a grammar of answers that call one of `tools` at least once."""
        return self.format.grammar(tools, parallel, self.special)

    def turns(self, messages: Sequence[Message], tools: Sequence[Tool]) -> list[dict[str, Any]]:
        """For the template. tools: that it is not told otherwise."""
        if self.told_by_template:
            return [_turn(message) for message in messages]
        turns = [_plain_turn(message) for message in messages]
        if tools:
            told = _TOLD.format(tools="\n".join(json.dumps(each, ensure_ascii=False) for each in described(tools)))
            if turns[0]["role"] == "system":
                turns[0]["content"] = f"{turns[0]['content']}\n\n{told}"
            else:
                turns.insert(0, {"role": "system", "content": told})
        return turns


def described(tools: Sequence[Tool]) -> list[dict[str, Any]]:
    """As templates take them."""
    found = []
    for tool in tools:
        function = tool.function
        parameters = function.parameters or {"type": "object", "properties": {}}
        about = {"name": function.name, "description": function.description or "", "parameters": parameters}
        found.append({"type": "function", "function": about})
    return found


def _turn(message: Message) -> dict[str, Any]:
    turn: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.tool_calls:
        turn["tool_calls"] = [_call(call) for call in message.tool_calls]
    if message.tool_call_id is not None:
        turn["tool_call_id"] = message.tool_call_id
    if message.name is not None:
        turn["name"] = message.name
    return turn


def _call(call: ToolCall) -> dict[str, Any]:
    """Arguments as an object, which templates write as they need it."""
    function = {"name": call.function.name, "arguments": _arguments(call)}
    return {"id": call.id, "type": "function", "function": function}


def _arguments(call: ToolCall) -> Any:
    try:
        arguments = msgspec.json.decode(call.function.arguments)  # no half of a surrogate pair, which is no text
    except (ValueError, RecursionError):
        return call.function.arguments
    return arguments if isinstance(arguments, dict) else call.function.arguments


def _plain_turn(message: Message) -> dict[str, Any]:
    """Calls and what came of them as text, for a template that knows neither."""
    if message.role == "tool":
        return {"role": "user", "content": f"<tool_response>\n{message.content}\n</tool_response>"}
    said = [message.content] if message.content else []
    for call in message.tool_calls:
        made = json.dumps({"name": call.function.name, "arguments": _arguments(call)}, ensure_ascii=False)
        said.append(f"<tool_call>\n{made}\n</tool_call>")
    return {"role": message.role, "content": "\n".join(said) if message.tool_calls else message.content}
