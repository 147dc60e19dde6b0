"""Presents tools to a model: by its chat template, or in Hermes' prompt format if the template has no tools."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from eventing.wire.generation import Message
from eventing.wire.tools import Tool, ToolCall
from functions.gateway.text.tool_formats import ToolFormat

# Hermes 2 Pro's prompt format
_SYSTEM_PROMPT: Final = """\
You are a function calling AI model. You are provided with function signatures within <tools></tools> XML tags. You may call \
one or more functions to assist with the user query. Don't make assumptions about what values to plug into functions.
<tools>
{tools}
</tools>
For each function call return a JSON object with the function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-dict>}}
</tool_call>"""


@dataclass(frozen=True, slots=True)
class ModelTools:
    format: ToolFormat
    in_template: bool  # the chat template presents tools
    special: Mapping[str, int]  # special tokens by text; encoding never yields them, and decoding only on request

    def presented(self, turns: list[dict[str, Any]], tools: list[dict[str, Any]]) -> tuple[Any, Any]:
        """Returns the turns and tools that the chat template gets.

        If the template presents no tools, the returned turns describe the tools, and the returned tools are empty. `turn_of`
        makes the turns, `described` the tools.
        """
        if self.in_template:
            return turns, tools
        turns = [_plain_turn(turn) for turn in turns]
        if tools:
            prompt = _SYSTEM_PROMPT.format(tools="\n".join(json.dumps(each, ensure_ascii=False) for each in tools))
            if turns[0]["role"] == "system":
                turns[0]["content"] = f"{turns[0]['content']}\n\n{prompt}"
            else:
                turns.insert(0, {"role": "system", "content": prompt})
        return turns, []


def described(tools: Sequence[Tool]) -> list[dict[str, Any]]:
    """Returns tools as dicts, which chat templates read."""
    found = []
    for tool in tools:
        function = tool.function
        parameters = function.parameters or {"type": "object", "properties": {}}
        fields = {"name": function.name, "description": function.description or "", "parameters": parameters}
        found.append({"type": "function", "function": fields})
    return found


def turn_of(message: Message) -> dict[str, Any]:
    """Returns a message as a dict, which chat templates read."""
    turn: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.tool_calls:
        turn["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.function.name, "arguments": _arguments(call)}}
            for call in message.tool_calls
        ]
    if message.tool_call_id is not None:
        turn["tool_call_id"] = message.tool_call_id
    if message.name is not None:
        turn["name"] = message.name
    return turn


def _plain_turn(turn: dict[str, Any]) -> dict[str, Any]:
    """Returns the turn for a template without tools: calls and their results are written as text."""
    role, content = turn["role"], turn["content"]
    if role == "tool":
        return {"role": "user", "content": f"<tool_response>\n{content}\n</tool_response>"}
    if "tool_calls" not in turn:
        return {name: value for name, value in turn.items() if name in ("role", "content", "reasoning_content")}
    parts = [content] if content else []
    for call in turn["tool_calls"]:
        function = call["function"]
        written = json.dumps({"name": function["name"], "arguments": function["arguments"]}, ensure_ascii=False)
        parts.append(f"<tool_call>\n{written}\n</tool_call>")
    return {"role": role, "content": "\n".join(parts)}


def _arguments(call: ToolCall) -> Any:
    """Returns the call's arguments as a dict, which templates write in their own way. As text if they are no JSON object."""
    try:
        arguments = msgspec.json.decode(call.function.arguments)  # refuses lone surrogates, which no text can hold
    except (ValueError, RecursionError):
        return call.function.arguments
    return arguments if isinstance(arguments, dict) else call.function.arguments
