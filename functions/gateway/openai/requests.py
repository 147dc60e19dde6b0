"""Types of requests for chat completions and completions. An option that is not listed here is refused by its name."""

from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from eventing.wire.events import MAX_BIASES, MAX_POSITION, MAX_TOP_LOGPROBS, TokenId
from eventing.wire.generation import (
    MAX_CHOICES,
    MAX_STOP_STRINGS,
    MAX_STOP_TOKENS,
    GenerateRequest,
    Message,
    Prompts,
    StopString,
)
from eventing.wire.structured_outputs import MAX_CHOICES as MAX_GUIDED_CHOICES
from eventing.wire.structured_outputs import GrammarText, StructuredOutputs
from eventing.wire.tools import ToolCall, ToolChoice, Tools, callable_tools, forced_tools

MaxTokens = Annotated[int, Meta(ge=1, le=MAX_POSITION)]
TopLogprobs = Annotated[int, Meta(ge=0, le=MAX_TOP_LOGPROBS)]
ReasoningEffort = Annotated[str, Meta(max_length=64)]


class TextPart(Struct, frozen=True, tag_field="type", tag="text", forbid_unknown_fields=True):
    text: str


Content = str | tuple[TextPart, ...]


def join_text(content: Any) -> str:
    """A message's content as one string. content: a string, or parts, whose `text` fields are joined."""
    return content if isinstance(content, str) else "".join(part.text for part in content)


class ChatMessage(Struct, frozen=True, kw_only=True):
    """One message of a conversation. Fields that are not listed are ignored: clients send back answers with all their fields.

    `audio` and `function_call` would change the answer and are not served, so they must be null.
    """

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content | None = None  # None is allowed beside tool_calls only
    name: str | None = None
    audio: None = None
    tool_calls: tuple[ToolCall, ...] | None = None
    tool_call_id: str | None = None
    function_call: None = None

    def __post_init__(self) -> None:
        if self.content is None and not self.tool_calls:
            raise ValueError("a message has no content; null is for one with tool_calls")
        if self.tool_calls and self.role != "assistant":
            raise ValueError(f"tool_calls are the assistant's, not of a message whose role is {self.role}")

    def message(self) -> Message:
        role = "system" if self.role == "developer" else self.role
        text = "" if self.content is None else join_text(self.content)
        return Message(role, text, self.tool_calls or (), self.tool_call_id, self.name if self.role == "tool" else None)


class StreamOptions(Struct, frozen=True, forbid_unknown_fields=True):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None
    continuous_usage_stats: bool | None = None  # with include_usage: every chunk has the usage so far


class Prediction(Struct, frozen=True, tag_field="type", tag="content", forbid_unknown_fields=True):
    """A text that much of the answer is expected to repeat."""

    content: Content


class TextFormat(Struct, frozen=True, tag_field="type", tag="text"):
    pass


class JSONObjectFormat(Struct, frozen=True, tag_field="type", tag="json_object", forbid_unknown_fields=True):
    pass


class JSONSchema(Struct, frozen=True, forbid_unknown_fields=True):
    name: str
    schema: dict[str, Any] | None = None
    description: str | None = None
    strict: bool | None = None  # has no effect: an answer always follows the schema


class JSONSchemaFormat(Struct, frozen=True, tag_field="type", tag="json_schema", forbid_unknown_fields=True):
    json_schema: JSONSchema


class Options(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Options that all kinds of requests share. Fields after `seed` do not change the answer: they are accepted and ignored.

    `top_k`, `min_p`, `repetition_penalty` and `structured_outputs` are vLLM's extensions, `guided_*` its names until 0.11.
    """

    model: str
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None  # None: 1, as in the OpenAI API; the CloudEvents API has 0
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1, lt=2**31)] | None = None  # -1 and 0: all tokens
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Meta(gt=0, le=100)] | None = None
    presence_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    logit_bias: Annotated[dict[str, Annotated[float, Meta(ge=-100, le=100)]], Meta(max_length=MAX_BIASES)] | None = None
    min_tokens: Annotated[int, Meta(ge=0, le=MAX_POSITION)] | None = None
    ignore_eos: bool | None = None
    stop: StopString | Annotated[tuple[StopString, ...], Meta(max_length=MAX_STOP_STRINGS)] | None = None
    stop_token_ids: Annotated[tuple[TokenId, ...], Meta(max_length=MAX_STOP_TOKENS)] | None = None
    include_stop_str_in_output: bool | None = None
    max_tokens: MaxTokens | None = None  # None: up to the end of the model's context
    n: Annotated[int, Meta(ge=1, le=MAX_CHOICES)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: TextFormat | JSONObjectFormat | JSONSchemaFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | GrammarText | None = None
    guided_regex: GrammarText | None = None
    guided_choice: Annotated[tuple[GrammarText, ...], Meta(min_length=1, max_length=MAX_GUIDED_CHOICES)] | None = None
    guided_grammar: GrammarText | None = None
    guided_decoding_backend: str | None = None
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    user: str | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    def __post_init__(self) -> None:
        wrong = [token for token in self.logit_bias or {} if not (token.isascii() and token.isdecimal() and len(token) < 10)]
        if wrong:
            raise ValueError(f"logit_bias has {wrong[0][:40]!r}; its keys are token ids in decimal")

    def sampling_fields(self) -> dict[str, Any]:
        """These options as fields of a GenerateRequest. Raises ValueError as `structure` does."""
        return {
            "temperature": 1.0 if self.temperature is None else self.temperature,
            "top_p": 1.0 if self.top_p is None else self.top_p,
            "top_k": max(0, self.top_k or 0),
            "min_p": self.min_p or 0.0,
            "repetition_penalty": 1.0 if self.repetition_penalty is None else self.repetition_penalty,
            "presence_penalty": self.presence_penalty or 0.0,
            "frequency_penalty": self.frequency_penalty or 0.0,
            "logit_bias": {int(token): bias for token, bias in (self.logit_bias or {}).items()},
            "min_tokens": self.min_tokens or 0,
            "ignore_eos": bool(self.ignore_eos),
            "seed": None if self.seed is None else self.seed % 2**63,
            "stop": self.stop or (),
            "stop_token_ids": self.stop_token_ids or (),
            "include_stop_str_in_output": bool(self.include_stop_str_in_output),
            "n": self.n or 1,
            "structured_outputs": self.structure(),
        }

    def structure(self) -> StructuredOutputs | None:
        """The structure that the answer must have; None: any text. Raises ValueError if several options name one."""
        given = [self.structured_outputs] if self.structured_outputs is not None else []
        match self.response_format:
            case JSONObjectFormat():
                given.append(StructuredOutputs(json_object=True))
            case JSONSchemaFormat(json_schema):
                given.append(StructuredOutputs(json=json_schema.schema or {}))
        for kind in ("json", "regex", "choice", "grammar"):
            if (guide := getattr(self, f"guided_{kind}")) is not None:
                given.append(StructuredOutputs(**{kind: guide}))
        if len(given) > 1:
            raise ValueError("what the answer must look like is said more than once; keep one of its options")
        return given[0] if given else None


class ChatRequest(Options, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`POST /v1/chat/completions`."""

    messages: Annotated[tuple[ChatMessage, ...], Meta(min_length=1)]
    max_completion_tokens: MaxTokens | None = None
    logprobs: bool | None = None
    top_logprobs: TopLogprobs | None = None
    tools: Tools | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    functions: tuple[()] | None = None
    function_call: Literal["none", "auto"] | None = None
    modalities: tuple[Literal["text"], ...] | None = None
    audio: None = None
    reasoning_effort: ReasoningEffort | None = None  # a variable of the chat template, which must use it
    chat_template_kwargs: dict[str, Any] | None = None  # further such variables
    verbosity: Literal["medium"] | None = None
    web_search_options: None = None
    prediction: Prediction | None = None

    @property
    def callable_tools(self) -> Tools:
        return callable_tools(self.tools or (), self.tool_choice or "auto")

    @property
    def constrained(self) -> bool:
        """Whether a grammar constrains the answer: tool calls are forced, or a structure is required."""
        return bool(forced_tools(self.tools or (), self.tool_choice or "auto")) or self.structure() is not None

    def generate_request(self) -> GenerateRequest:
        """This request in the form that AnswerService takes. Raises ValueError if options contradict each other."""
        if self.top_logprobs and not self.logprobs:
            raise ValueError(f"top_logprobs is {self.top_logprobs}, which takes `logprobs`: true")
        return GenerateRequest(
            messages=tuple(message.message() for message in self.messages),
            max_tokens=self.max_completion_tokens or self.max_tokens,
            prediction="" if self.prediction is None else join_text(self.prediction.content),
            logprobs=(self.top_logprobs or 0) if self.logprobs else None,
            chat_template_kwargs=self.chat_template_kwargs or {},
            reasoning_effort=self.reasoning_effort,
            tools=self.tools or (),
            tool_choice=self.tool_choice or "auto",
            parallel_tool_calls=self.parallel_tool_calls is not False,
            **self.sampling_fields(),
        )


class CompletionRequest(Options, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`POST /v1/completions`: prompts as texts or token ids, without the chat template."""

    prompt: Prompts
    max_tokens: Annotated[int, Meta(ge=0, le=MAX_POSITION)] | None = None  # 0: no tokens, with `echo`
    echo: bool | None = None
    best_of: Annotated[int, Meta(ge=1, le=MAX_CHOICES)] | None = None  # must equal n
    logprobs: TopLogprobs | None = None
    suffix: None = None

    def generate_request(self) -> GenerateRequest:
        """This request in the form that AnswerService takes. Raises ValueError if options contradict each other."""
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise ValueError(f"best_of is {self.best_of} and n is {self.n or 1}; both must be the same")
        return GenerateRequest(
            prompt=self.prompt,
            max_tokens=self.max_tokens,
            logprobs=self.logprobs,
            echo=bool(self.echo),
            **self.sampling_fields(),
        )
