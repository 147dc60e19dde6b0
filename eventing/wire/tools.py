"""Functions that a model may call, and its calls, as the OpenAI API writes them."""

from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

MAX_TOOLS = 128
ToolName = Annotated[str, Meta(pattern=r"^[a-zA-Z0-9_.\-]{1,128}$")]


class ToolFunction(Struct, frozen=True, omit_defaults=True):
    name: ToolName
    description: str | None = None
    parameters: dict[str, Any] | None = None  # JSON schema of the object of its arguments; None: any arguments
    strict: bool | None = None  # has no effect: arguments of forced calls fit the schema, others are the model's own


class Tool(Struct, frozen=True):
    type: Literal["function"]
    function: ToolFunction


class FunctionName(Struct, frozen=True):
    name: str


class NamedTool(Struct, frozen=True):
    """A tool choice that names one function: the model must call it exactly once."""

    type: Literal["function"]
    function: FunctionName


ToolChoice = Literal["none", "auto", "required"] | NamedTool
Tools = Annotated[tuple[Tool, ...], Meta(max_length=MAX_TOOLS)]


class FunctionCall(Struct, frozen=True):
    name: str
    arguments: str  # JSON, as the model wrote it


class ToolCall(Struct, frozen=True):
    id: str
    function: FunctionCall
    type: Literal["function"] = "function"
