"""Tools of `/v1/responses`: asked flat, answered as items of their own."""

import secrets
from collections.abc import Iterator
from typing import Any, Literal

from msgspec import Struct

from eventing.wire.tools import FunctionName, NamedTool, Tool, ToolChoice, ToolFunction, ToolName, Tools


class ResponseTool(Struct, frozen=True):
    """A function. Tools that a server would have to run itself are not served."""

    type: Literal["function"]
    name: ToolName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ResponseNamedTool(Struct, frozen=True):
    type: Literal["function"]
    name: str


ResponseToolChoice = Literal["none", "auto", "required"] | ResponseNamedTool


def tools_of(asked: tuple[ResponseTool, ...] | None) -> Tools:
    return tuple(Tool("function", ToolFunction(one.name, one.description, one.parameters, one.strict)) for one in asked or ())


def choice_of(asked: ResponseToolChoice | None) -> ToolChoice:
    return NamedTool("function", FunctionName(asked.name)) if isinstance(asked, ResponseNamedTool) else asked or "auto"


class CallItem:
    """A call of a function, as it comes."""

    kind = "call"

    def __init__(self, call_id: str, name: str, index: int) -> None:
        self._call = {"call_id": call_id, "name": name}
        self._id = f"fc_{secrets.token_hex(12)}"
        self._index = index
        self._where = {"item_id": self._id, "output_index": index}
        self.text = ""
        """Its arguments."""

    def document(self, status: str) -> dict[str, Any]:
        return {"id": self._id, "type": "function_call", "status": status, **self._call, "arguments": self.text}

    def begin(self) -> Iterator[dict[str, Any]]:
        item = self.document("in_progress")
        yield {"type": "response.output_item.added", "output_index": self._index, "item": item}

    def push(self, text: str, _: list[Any]) -> dict[str, Any]:
        self.text += text
        return {"type": "response.function_call_arguments.delta", **self._where, "delta": text}

    def end(self, status: str) -> Iterator[dict[str, Any]]:
        said = {"name": self._call["name"], "arguments": self.text}
        yield {"type": "response.function_call_arguments.done", **self._where, **said}
        yield {"type": "response.output_item.done", "output_index": self._index, "item": self.document(status)}
