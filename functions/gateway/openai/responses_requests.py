"""Types of requests to `/v1/responses`. Each request contains the whole conversation, because the gateway stores none."""

from typing import Annotated, Any, Literal

from msgspec import Meta, Struct
from msgspec.structs import replace

from eventing.wire.generation import GenerateRequest, Message, ReasoningEffort, TopLogprobs
from eventing.wire.structured_outputs import StructuredOutputs
from eventing.wire.tools import MAX_TOOLS, FunctionCall, FunctionName, NamedTool, Tool, ToolCall, ToolFunction, ToolName
from functions.gateway.openai.requests import (
    EFFORT,
    HINT,
    NOT_SERVED,
    TEMPLATE_VARIABLES,
    JSONObjectFormat,
    MaxTokens,
    Options,
    TextFormat,
    Verbosity,
    join_text,
)


class ContentPart(Struct, frozen=True):
    type: Literal["input_text", "output_text", "text"]
    text: str


class InputItem(Struct, frozen=True, kw_only=True):
    """A message, or an item of an earlier response that the client sends back. Unknown fields are ignored."""

    type: Literal["message", "reasoning", "function_call", "function_call_output"] = "message"
    role: Literal["system", "developer", "user", "assistant"] | None = None
    content: str | tuple[ContentPart, ...] | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None  # of a function_call
    output: str | tuple[ContentPart, ...] | None = None  # of a function_call_output

    def message(self, number: int) -> Message:
        """Converts the item to a Message. Raises ValueError if a required field is missing.

        `number` is the item's index in `input`, for error messages.
        """
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
    """A function that the model may call. Tools that the server itself would have to run are refused."""

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
    format: Annotated[
        TextFormat | JSONObjectFormat | ResponseSchema | None,
        Meta(description="the answer's form: any text, JSON, or a schema's"),
    ] = None
    verbosity: Annotated[Verbosity | None, HINT] = None


class ReasoningOptions(Struct, frozen=True, forbid_unknown_fields=True):
    """Options for the model's thoughts. Thoughts are always returned in full, and left out of the prompt in later turns."""

    effort: Annotated[ReasoningEffort | None, EFFORT] = None
    summary: Annotated[str | None, HINT] = None
    generate_summary: Annotated[str | None, HINT] = None
    context: Annotated[str | None, HINT] = None
    mode: Annotated[str | None, HINT] = None


Includable = Literal[
    "message.output_text.logprobs",
    "reasoning.encrypted_content",
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "message.input_image.image_url",
    "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
]


class ResponsesRequest(Options, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The body of `POST /v1/responses`, with the same Options as chat completions."""

    input: Annotated[
        Annotated[str, Meta(min_length=1)] | Annotated[tuple[InputItem, ...], Meta(min_length=1)],
        Meta(description="the whole conversation, with the items of earlier answers"),
    ]
    instructions: Annotated[str | None, Meta(description="a system message before `input`")] = None
    max_output_tokens: Annotated[MaxTokens | None, Meta(description="as `max_tokens`, before which it goes")] = None
    text: Annotated[ResponseText | None, Meta(description="details of the answer's text")] = None
    reasoning: Annotated[ReasoningOptions | None, Meta(description="details of the model's thoughts")] = None
    top_logprobs: Annotated[TopLogprobs | None, Meta(description="alternatives to each token; with `include`")] = None
    include: Annotated[
        tuple[Includable, ...] | None, Meta(description="log-probabilities; of what no answer has here, nothing is included")
    ] = None
    chat_template_kwargs: Annotated[dict[str, Any] | None, TEMPLATE_VARIABLES] = None
    tools: Annotated[
        Annotated[tuple[ResponseTool, ...], Meta(max_length=MAX_TOOLS)] | None,
        Meta(description="functions that the answer may call"),
    ] = None
    tool_choice: Annotated[
        ResponseToolChoice | None, Meta(description="whether to call one; a function by its name is called exactly once")
    ] = None
    parallel_tool_calls: Annotated[bool | None, Meta(description="`false`: a forced call is the only one")] = None
    max_tool_calls: Annotated[int | None, HINT] = None
    truncation: Annotated[
        Literal["auto", "disabled"] | None, Meta(description="an input that exceeds the context is refused, whatever it says")
    ] = None
    context_management: Annotated[tuple[Any, ...] | None, HINT] = None
    image: Annotated[dict[str, Any] | None, HINT] = None
    access_programs: Annotated[dict[str, Any] | None, HINT] = None
    background_options: Annotated[dict[str, Any] | None, HINT] = None
    background: Annotated[Literal[False] | None, NOT_SERVED] = None
    previous_response_id: Annotated[None, NOT_SERVED] = None
    conversation: Annotated[None, NOT_SERVED] = None
    prompt: Annotated[None, NOT_SERVED] = None

    def messages(self) -> tuple[Message, ...]:
        """Returns the conversation for the chat template. Raises ValueError if an item is incomplete."""
        messages = [] if self.instructions is None else [Message("system", self.instructions)]
        if isinstance(self.input, str):
            return (*messages, Message("user", self.input))
        calls: list[list[ToolCall]] = [[] for _ in messages]  # of each message, to join many in linear time
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

    def forms(self) -> list[StructuredOutputs]:
        match None if self.text is None else self.text.format:
            case JSONObjectFormat():
                return [StructuredOutputs(json_object=True), *Options.forms(self)]
            case ResponseSchema(_, schema):
                return [StructuredOutputs(json=schema), *Options.forms(self)]
        return Options.forms(self)

    def generate_request(self) -> GenerateRequest:
        """Converts the request to the type that AnswerService takes. Raises ValueError if options contradict each other."""
        if self.n not in (None, 1):
            raise ValueError(f"n is {self.n}; a response has one answer")
        logprobs = "message.output_text.logprobs" in (self.include or ())
        if self.top_logprobs and not logprobs:
            raise ValueError('top_logprobs takes `include`: ["message.output_text.logprobs"]')
        tools = (ToolFunction(tool.name, tool.description, tool.parameters, tool.strict) for tool in self.tools or ())
        choice = self.tool_choice or "auto"
        return GenerateRequest(
            messages=self.messages(),
            max_tokens=self.max_output_tokens or self.max_tokens,
            logprobs=(self.top_logprobs or 0) if logprobs else None,
            chat_template_kwargs=self.chat_template_kwargs or {},
            reasoning_effort=None if self.reasoning is None else self.reasoning.effort,
            tools=tuple(Tool("function", tool) for tool in tools),
            tool_choice=choice if isinstance(choice, str) else NamedTool("function", FunctionName(choice.name)),
            parallel_tool_calls=self.parallel_tool_calls is not False,
            **self.sampling_fields(),
        )
