"""Types of requests of `/v1/responses`. The gateway stores no conversation, so each request has all of it."""

from typing import Annotated, Any, Literal

from msgspec import Meta, Struct
from msgspec.structs import replace

from eventing.wire.generation import GenerateRequest, Message
from eventing.wire.structured_outputs import StructuredOutputs
from eventing.wire.tools import (
    MAX_TOOLS,
    FunctionCall,
    FunctionName,
    NamedTool,
    Tool,
    ToolCall,
    ToolChoice,
    ToolFunction,
    ToolName,
    Tools,
    callable_tools,
    forced_tools,
)
from functions.gateway.openai.requests import (
    JSONObjectFormat,
    MaxTokens,
    Options,
    ReasoningEffort,
    TextFormat,
    TopLogprobs,
    join_text,
)


class ContentPart(Struct, frozen=True):
    type: Literal["input_text", "output_text", "text"]
    text: str


class InputItem(Struct, frozen=True, kw_only=True):
    """A message, or an item of an earlier response that the client sends back. Fields that are not listed are ignored."""

    type: Literal["message", "reasoning", "function_call", "function_call_output"] = "message"
    role: Literal["system", "developer", "user", "assistant"] | None = None
    content: str | tuple[ContentPart, ...] | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None  # of a function_call
    output: str | tuple[ContentPart, ...] | None = None  # of a function_call_output

    def message(self, number: int) -> Message:
        """The item as a Message. number: its index in `input`, for errors. Raises ValueError if a required field is missing."""
        if self.type == "function_call":
            if self.call_id is None or self.name is None or self.arguments is None:
                raise ValueError(f"input[{number}] is a function_call and lacks `call_id`, `name` or `arguments`")
            return Message("assistant", "", (ToolCall(self.call_id, FunctionCall(self.name, self.arguments)),))
        if self.type == "function_call_output":
            if self.call_id is None or self.output is None:
                raise ValueError(f"input[{number}] is a function_call_output and lacks `call_id` or `output`")
            return Message("tool", join_text(self.output), tool_call_id=self.call_id)
        if self.role is None or self.content is None:
            raise ValueError(f"input[{number}] lacks `role` or `content`")
        return Message("system" if self.role == "developer" else self.role, join_text(self.content))


class ResponseTool(Struct, frozen=True):
    """A function that the model may call. Tools that the server itself would have to run are not served."""

    type: Literal["function"]
    name: ToolName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ResponseNamedTool(Struct, frozen=True):
    type: Literal["function"]
    name: str


ResponseToolChoice = Literal["none", "auto", "required"] | ResponseNamedTool


class ResponseSchema(Struct, frozen=True, tag_field="type", tag="json_schema", forbid_unknown_fields=True):
    name: str
    schema: dict[str, Any]
    description: str | None = None
    strict: bool | None = None  # has no effect: an answer always follows the schema


class ResponseText(Struct, frozen=True, forbid_unknown_fields=True):
    format: TextFormat | JSONObjectFormat | ResponseSchema | None = None
    verbosity: Literal["medium"] | None = None


class ReasoningOptions(Struct, frozen=True, forbid_unknown_fields=True):
    """Options for the model's thoughts. They are always returned in full, so the two options for a summary have no effect."""

    effort: ReasoningEffort | None = None
    summary: str | None = None
    generate_summary: str | None = None


class ResponsesRequest(Options, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`POST /v1/responses`, with the same Options as chat completions."""

    input: Annotated[str, Meta(min_length=1)] | Annotated[tuple[InputItem, ...], Meta(min_length=1)]
    instructions: str | None = None
    max_output_tokens: MaxTokens | None = None
    text: ResponseText | None = None
    reasoning: ReasoningOptions | None = None
    top_logprobs: TopLogprobs | None = None
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
        """The conversation for the chat template. Raises ValueError if an item is incomplete."""
        messages = [] if self.instructions is None else [Message("system", self.instructions)]
        if isinstance(self.input, str):
            return (*messages, Message("user", self.input))
        calls: list[list[ToolCall]] = [
            [] for _ in messages
        ]  # of each message; lists, so that many calls are joined in linear time
        for number, item in enumerate(self.input):
            if item.type == "reasoning":
                continue
            message = item.message(number)
            # In the input, calls are items after the assistant's message; chat templates expect them inside the message.
            if message.tool_calls and messages and messages[-1].role == "assistant":
                calls[-1] += message.tool_calls
            else:
                messages.append(message)
                calls.append([*message.tool_calls])
        return tuple(replace(message, tool_calls=tuple(own)) for message, own in zip(messages, calls, strict=True))

    def structure(self) -> StructuredOutputs | None:
        structure = Options.structure(self)
        match None if self.text is None else self.text.format:
            case JSONObjectFormat():
                own = StructuredOutputs(json_object=True)
            case ResponseSchema(_, schema):
                own = StructuredOutputs(json=schema)
            case _:
                return structure
        if structure is not None:
            raise ValueError("what the answer must look like is said more than once; keep one of its options")
        return own

    @property
    def wire_tools(self) -> tuple[Tools, ToolChoice]:
        """`tools` and `tool_choice` as the fields of a GenerateRequest."""
        tools = tuple(
            Tool("function", ToolFunction(tool.name, tool.description, tool.parameters, tool.strict))
            for tool in self.tools or ()
        )
        if isinstance(self.tool_choice, ResponseNamedTool):
            return tools, NamedTool("function", FunctionName(self.tool_choice.name))
        return tools, self.tool_choice or "auto"

    @property
    def callable_tools(self) -> Tools:
        return callable_tools(*self.wire_tools)

    @property
    def constrained(self) -> bool:
        """Whether a grammar constrains the answer: tool calls are forced, or a structure is required."""
        return self.structure() is not None or bool(forced_tools(*self.wire_tools))

    def generate_request(self) -> GenerateRequest:
        """This request in the form that AnswerService takes. Raises ValueError if options contradict each other."""
        if self.n not in (None, 1):
            raise ValueError(f"n is {self.n}; a response has one answer")
        logprobs = "message.output_text.logprobs" in (self.include or ())
        if self.top_logprobs and not logprobs:
            raise ValueError('top_logprobs takes `include`: ["message.output_text.logprobs"]')
        tools, tool_choice = self.wire_tools
        return GenerateRequest(
            messages=self.messages(),
            max_tokens=self.max_output_tokens or self.max_tokens,
            logprobs=(self.top_logprobs or 0) if logprobs else None,
            chat_template_kwargs=self.chat_template_kwargs or {},
            reasoning_effort=None if self.reasoning is None else self.reasoning.effort,
            tools=tools,
            tool_choice=tool_choice,
            parallel_tool_calls=self.parallel_tool_calls is not False,
            **self.sampling_fields(),
        )
