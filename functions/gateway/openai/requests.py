"""Requests of the OpenAI API, as far as they are served. What is not served is refused, never dropped in silence."""

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
from eventing.wire.tools import ToolCall, ToolChoice, Tools, callable_tools, forced_tools
from functions.gateway.openai.structured import StructuredOptions

MaxTokens = Annotated[int, Meta(ge=1, le=MAX_POSITION)]


class TextPart(Struct, frozen=True, tag_field="type", tag="text", forbid_unknown_fields=True):
    text: str


def _text(content: str | tuple[TextPart, ...]) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)


class ChatMessage(Struct, frozen=True, kw_only=True):
    """One turn. What clients put into it beside, such as `type` or fields of an answer that they send back, counts for nothing.

    What would have to be answered otherwise must be null.
    """

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | tuple[TextPart, ...] | None = None
    """None beside tool calls only."""
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
        text = "" if self.content is None else _text(self.content)
        return Message(role, text, self.tool_calls or (), self.tool_call_id, self.name if self.role == "tool" else None)


class StreamOptions(Struct, frozen=True, forbid_unknown_fields=True):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None
    continuous_usage_stats: bool | None = None
    """With `include_usage`: the usage so far with every chunk."""


class Prediction(Struct, frozen=True, tag_field="type", tag="content", forbid_unknown_fields=True):
    """Predicted outputs: a text that much of the answer is expected to be."""

    content: str | tuple[TextPart, ...]

    @property
    def text(self) -> str:
        return _text(self.content)


class Options(StructuredOptions, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What both requests have. `top_k`, `min_p` and `repetition_penalty` are extensions that other servers have too.

    Whatever stands behind `seed` is taken only with the value that changes nothing, or says nothing about the answer.
    """

    model: str
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    """None: 1, as in the OpenAI API; the CloudEvents door's is 0."""
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1, lt=2**31)] | None = None
    """-1 and 0 keep all."""
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Meta(gt=0, le=100)] | None = None
    presence_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    logit_bias: Annotated[dict[str, Annotated[float, Meta(ge=-100, le=100)]], Meta(max_length=MAX_BIASES)] | None = None
    """By token id, in decimal."""
    min_tokens: Annotated[int, Meta(ge=0, le=MAX_POSITION)] | None = None
    ignore_eos: bool | None = None
    stop: StopString | Annotated[tuple[StopString, ...], Meta(max_length=MAX_STOP_STRINGS)] | None = None
    stop_token_ids: Annotated[tuple[TokenId, ...], Meta(max_length=MAX_STOP_TOKENS)] | None = None
    include_stop_str_in_output: bool | None = None
    max_tokens: MaxTokens | None = None
    """None: what the prompt leaves of the model's context."""
    n: Annotated[int, Meta(ge=1, le=MAX_CHOICES)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
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
        """For a GenerateRequest."""
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
            "structured_outputs": self.asked_structure(),
        }


class ChatRequest(Options, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`POST /v1/chat/completions`."""

    messages: Annotated[tuple[ChatMessage, ...], Meta(min_length=1)]
    max_completion_tokens: MaxTokens | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    tools: Tools | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    functions: tuple[()] | None = None
    function_call: Literal["none", "auto"] | None = None
    modalities: tuple[Literal["text"], ...] | None = None
    audio: None = None
    reasoning_effort: Annotated[str, Meta(max_length=64)] | None = None
    """Where the model's chat template knows it."""
    chat_template_kwargs: dict[str, Any] | None = None
    """Further variables of the chat template, which must know them."""
    verbosity: Literal["medium"] | None = None
    web_search_options: None = None
    prediction: Prediction | None = None

    @property
    def callable_tools(self) -> Tools:
        """Those that the answer may call."""
        return callable_tools(self.tools or (), self.tool_choice or "auto")

    @property
    def constrained(self) -> bool:
        """The answer has a grammar."""
        return bool(forced_tools(self.tools or (), self.tool_choice or "auto")) or self.asked_structure() is not None

    def generate_request(self) -> GenerateRequest:
        messages = tuple(message.message() for message in self.messages)
        if self.top_logprobs and not self.logprobs:
            raise ValueError(f"top_logprobs is {self.top_logprobs}, which takes `logprobs`: true")
        return GenerateRequest(
            messages=messages,
            max_tokens=self.max_completion_tokens or self.max_tokens,
            prediction="" if self.prediction is None else self.prediction.text,
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
    max_tokens: Annotated[int, Meta(ge=0, le=MAX_POSITION)] | None = None
    """0: nothing, with `echo`."""
    echo: bool | None = None
    best_of: Annotated[int, Meta(ge=1, le=MAX_CHOICES)] | None = None
    """As many as `n`, of which the best are all."""
    logprobs: Annotated[int, Meta(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    suffix: None = None

    def generate_request(self) -> GenerateRequest:
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise ValueError(f"best_of is {self.best_of} and n is {self.n or 1}; only as many as are wanted are drawn")
        return GenerateRequest(
            prompt=self.prompt,
            max_tokens=self.max_tokens,
            logprobs=self.logprobs,
            echo=bool(self.echo),
            **self.sampling_fields(),
        )
