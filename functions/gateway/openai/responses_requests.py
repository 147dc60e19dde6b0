"""Requests of `/v1/responses`. Nothing is kept between them: a conversation is sent whole."""

from typing import Annotated, Any, Literal

from msgspec import Meta, Struct
from msgspec.structs import replace

from eventing.wire.events import MAX_TOP_LOGPROBS
from eventing.wire.generation import GenerateRequest, Message
from eventing.wire.structured_outputs import StructuredOutputs
from eventing.wire.tools import MAX_TOOLS, FunctionCall, ToolCall, Tools, callable_tools, forced_tools
from functions.gateway.openai.requests import MaxTokens, Options
from functions.gateway.openai.responses_tools import ResponseTool, ResponseToolChoice, choice_of, tools_of
from functions.gateway.openai.structured import JSONObjectFormat, TextFormat


class ContentPart(Struct, frozen=True):
    type: Literal["input_text", "output_text", "text"]
    text: str


class InputItem(Struct, frozen=True, kw_only=True):
    """A message, or an item of an earlier response as it came; of its other fields none counts."""

    type: Literal["message", "reasoning", "function_call", "function_call_output"] = "message"
    role: Literal["system", "developer", "user", "assistant"] | None = None
    content: str | tuple[ContentPart, ...] | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    """Of a call."""
    output: str | tuple[ContentPart, ...] | None = None
    """What came of it."""


class ResponseSchema(Struct, frozen=True, tag_field="type", tag="json_schema", forbid_unknown_fields=True):
    """`strict` changes nothing: an answer is always as the schema says."""

    name: str
    schema: dict[str, Any]
    description: str | None = None
    strict: bool | None = None


class ResponseText(Struct, frozen=True, forbid_unknown_fields=True):
    format: TextFormat | JSONObjectFormat | ResponseSchema | None = None
    verbosity: Literal["medium"] | None = None

    def structure(self) -> StructuredOutputs | None:
        match self.format:
            case JSONObjectFormat():
                return StructuredOutputs(json_object=True)
            case ResponseSchema(_, schema):
                return StructuredOutputs(json=schema)
        return None


class ReasoningOptions(Struct, frozen=True, forbid_unknown_fields=True):
    """Thoughts are answered as they are, whatever is said of a summary."""

    effort: Annotated[str, Meta(max_length=64)] | None = None
    summary: str | None = None
    generate_summary: str | None = None


class ResponsesRequest(Options, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`POST /v1/responses`. What stands in Options is taken here, too."""

    input: Annotated[str, Meta(min_length=1)] | Annotated[tuple[InputItem, ...], Meta(min_length=1)]
    instructions: str | None = None
    max_output_tokens: MaxTokens | None = None
    text: ResponseText | None = None
    reasoning: ReasoningOptions | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    include: tuple[Literal["message.output_text.logprobs", "reasoning.encrypted_content"], ...] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: Annotated[tuple[ResponseTool, ...], Meta(max_length=MAX_TOOLS)] | None = None
    tool_choice: ResponseToolChoice | None = None
    parallel_tool_calls: bool | None = None
    max_tool_calls: int | None = None
    truncation: Literal["disabled"] | None = None
    background: Literal[False] | None = None
    previous_response_id: None = None
    conversation: None = None
    prompt: None = None

    def messages(self) -> tuple[Message, ...]:
        """Raises ValueError where an item is no message."""
        first = [] if self.instructions is None else [Message("system", self.instructions)]
        if isinstance(self.input, str):
            return (*first, Message("user", self.input))
        found = [_message(number, item) for number, item in enumerate(self.input) if item.type != "reasoning"]
        return (*first, *_joined(found))

    @property
    def callable_tools(self) -> Tools:
        """Those that the answer may call."""
        return callable_tools(tools_of(self.tools), choice_of(self.tool_choice))

    @property
    def constrained(self) -> bool:
        """The answer has a grammar."""
        structure = self.asked_structure() is not None or (self.text is not None and self.text.structure() is not None)
        return structure or bool(forced_tools(tools_of(self.tools), choice_of(self.tool_choice)))

    def generate_request(self) -> GenerateRequest:
        fields = self.sampling_fields()
        if fields["n"] != 1:
            raise ValueError(f"n is {fields['n']}; a response has one answer")
        structure = None if self.text is None else self.text.structure()
        if structure is not None and fields["structured_outputs"] is not None:
            raise ValueError("what the answer must look like is said more than once; keep one of its options")
        logprobs = "message.output_text.logprobs" in (self.include or ())
        if self.top_logprobs and not logprobs:
            raise ValueError('top_logprobs takes `include`: ["message.output_text.logprobs"]')
        return GenerateRequest(
            messages=self.messages(),
            max_tokens=self.max_output_tokens or self.max_tokens,
            logprobs=(self.top_logprobs or 0) if logprobs else None,
            chat_template_kwargs=self.chat_template_kwargs or {},
            reasoning_effort=None if self.reasoning is None else self.reasoning.effort,
            tools=tools_of(self.tools),
            tool_choice=choice_of(self.tool_choice),
            parallel_tool_calls=self.parallel_tool_calls is not False,
            **(fields if structure is None else fields | {"structured_outputs": structure}),
        )


def _message(number: int, item: InputItem) -> Message:
    if item.type == "function_call":
        if item.call_id is None or item.name is None or item.arguments is None:
            raise ValueError(f"input[{number}] is a function_call and lacks `call_id`, `name` or `arguments`")
        return Message("assistant", "", (ToolCall(item.call_id, FunctionCall(item.name, item.arguments)),))
    if item.type == "function_call_output":
        if item.call_id is None or item.output is None:
            raise ValueError(f"input[{number}] is a function_call_output and lacks `call_id` or `output`")
        return Message("tool", _text(item.output), tool_call_id=item.call_id)
    if item.role is None or item.content is None:
        raise ValueError(f"input[{number}] lacks `role` or `content`")
    return Message("system" if item.role == "developer" else item.role, _text(item.content))


def _text(content: str | tuple[ContentPart, ...]) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)


def _joined(messages: list[Message]) -> list[Message]:
    """Calls belong to the assistant's turn that they come behind: items have them apart, templates do not."""
    joined: list[Message] = []
    calls: list[list[ToolCall]] = []
    for message in messages:
        if message.tool_calls and joined and joined[-1].role == "assistant":
            calls[-1] += message.tool_calls
        else:
            joined.append(message)
            calls.append([*message.tool_calls])
    return [replace(message, tool_calls=tuple(own)) for message, own in zip(joined, calls, strict=True)]
