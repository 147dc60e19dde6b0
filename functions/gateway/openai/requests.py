"""Types of requests for chat completions and completions. An option without a field here is refused with its name."""

from typing import Annotated, Any, Final, Literal

from msgspec import Meta, Struct

from eventing.wire.events import MAX_BIASES, MAX_POSITION
from eventing.wire.generation import (
    MAX_CHOICES,
    AnswerTokens,
    Bias,
    CacheSalt,
    Choices,
    GenerateRequest,
    Message,
    MinP,
    Penalty,
    Prompts,
    ReasoningEffort,
    RepetitionPenalty,
    Seed,
    StopStrings,
    StopTokens,
    TopK,
    TopLogprobs,
    TopP,
)
from eventing.wire.structured_outputs import MAX_CHOICES as MAX_GUIDED_CHOICES
from eventing.wire.structured_outputs import GrammarText, StructuredOutputs
from eventing.wire.tools import ToolCall, ToolChoice, Tools

MaxTokens = Annotated[int, Meta(ge=1, le=MAX_POSITION)]
Verbosity = Literal["low", "medium", "high"]

# Options have descriptions, from which docs/openai.md and the OpenAPI document are generated.
HINT: Final = Meta(description="taken, and has no effect here")
NOT_SERVED: Final = Meta(description="would change the answer and is not served")
EFFORT: Final = Meta(
    description="a variable of the chat template. One that has `enable_thinking` or `thinking` instead does not think at `none`"
)
TEMPLATE_VARIABLES: Final = Meta(
    description="further variables of the chat template. It must use them, but for `enable_thinking` and `thinking`"
)
# Options that have the same name, meaning and default in a GenerateRequest.
_SAME_OPTIONS: Final = (
    *("model", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "min_tokens", "ignore_eos"),
    *("stop", "stop_token_ids", "include_stop_str_in_output", "n", "seed", "cache_salt"),
)
_GUIDED: Final = Meta(description="vLLM's older name for a part of `structured_outputs`")


class TextPart(Struct, frozen=True, tag_field="type", tag="text"):
    """A text in a message. Further fields are ignored: they are hints for caches."""

    text: str


Content = str | tuple[TextPart, ...]


def join_text(content: Any) -> str:
    """Returns a message's content as one string. `content` is a string, or parts, whose texts are joined."""
    return content if isinstance(content, str) else "".join(part.text for part in content)


class ChatMessage(Struct, frozen=True, kw_only=True):
    """One message of a conversation. Unknown fields are ignored, because clients send back answers with all their fields.

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
    include_usage: Annotated[bool | None, Meta(description="the last chunk has the usage")] = None
    include_obfuscation: Annotated[bool | None, HINT] = None
    continuous_usage_stats: Annotated[
        bool | None, Meta(description="with `include_usage`: every chunk has the usage so far (vLLM)")
    ] = None
    include_progress: Annotated[
        bool | None, Meta(description="while no tokens come, chunks without choices say in `progress` what is awaited")
    ] = None


class Prediction(Struct, frozen=True, tag_field="type", tag="content", forbid_unknown_fields=True):
    """A text that the answer is expected to repeat for the most part."""

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
    """Options that all kinds of requests share. Options that would make the answer wrong are refused; hints are accepted."""

    model: Annotated[str, Meta(description="the served model's name, or MODEL:ADAPTER; another gets 404")]
    temperature: Annotated[
        Annotated[float, Meta(ge=0, le=2)] | None, Meta(description="default 1, but 0 in the CloudEvents API; 0 is greedy")
    ] = None
    top_p: Annotated[TopP | None, Meta(description="as in transformers")] = None
    top_k: Annotated[TopK | None, Meta(description="as in transformers; -1 and 0: all tokens")] = None
    min_p: Annotated[MinP | None, Meta(description="as in transformers")] = None
    repetition_penalty: Annotated[RepetitionPenalty | None, Meta(description="applied before the temperature")] = None
    presence_penalty: Annotated[Penalty | None, Meta(description="applied before the temperature")] = None
    frequency_penalty: Annotated[Penalty | None, Meta(description="applied before the temperature")] = None
    logit_bias: Annotated[
        Annotated[dict[str, Bias], Meta(max_length=MAX_BIASES)] | None,
        Meta(description="by token id in decimal; applied before the temperature"),
    ] = None
    min_tokens: Annotated[
        AnswerTokens | None, Meta(description="until then the model's end token and `stop_token_ids` are not drawn")
    ] = None
    ignore_eos: Annotated[bool | None, Meta(description="the model's end token does not end the answer")] = None
    stop: Annotated[StopStrings | None, Meta(description="the answer ends before the first of these strings")] = None
    stop_token_ids: Annotated[StopTokens | None, Meta(description="the answer ends before the first of these tokens")] = None
    include_stop_str_in_output: Annotated[
        bool | None, Meta(description="the answer has the stop string, or the stop token, at its end")
    ] = None
    max_tokens: Annotated[
        MaxTokens | None,
        Meta(description="default: what the prompt leaves of the context. Memory is then reserved as the answer grows"),
    ] = None
    n: Annotated[
        Choices | None,
        Meta(description="answers to each prompt, with different seeds; their prompt is computed once. In responses 1"),
    ] = None
    stream: Annotated[bool | None, Meta(description="server-sent events")] = None
    stream_options: Annotated[StreamOptions | None, Meta(description="details of a stream")] = None
    structured_outputs: Annotated[
        StructuredOutputs | None,
        Meta(description="the answer's form: `json`, `json_object`, `regex`, `choice`, `grammar` (vLLM)"),
    ] = None
    guided_json: Annotated[dict[str, Any] | GrammarText | None, _GUIDED] = None
    guided_regex: Annotated[GrammarText | None, _GUIDED] = None
    guided_choice: Annotated[
        Annotated[tuple[GrammarText, ...], Meta(min_length=1, max_length=MAX_GUIDED_CHOICES)] | None, _GUIDED
    ] = None
    guided_grammar: Annotated[GrammarText | None, _GUIDED] = None
    guided_decoding_backend: Annotated[str | None, HINT] = None
    seed: Annotated[Seed | None, Meta(description="the same seed gives the same answer")] = None
    user: Annotated[str | None, HINT] = None
    metadata: Annotated[dict[str, str] | None, HINT] = None
    store: Annotated[bool | None, Meta(description="taken; nothing is stored")] = None
    service_tier: Annotated[str | None, HINT] = None
    safety_identifier: Annotated[str | None, HINT] = None
    prompt_cache_key: Annotated[str | None, HINT] = None
    prompt_cache_options: Annotated[dict[str, Any] | None, HINT] = None
    prompt_cache_retention: Annotated[str | None, HINT] = None
    cache_salt: Annotated[
        CacheSalt | None,
        Meta(description="random: requests with the same one reuse each other's keys and values, and no others do (vLLM)"),
    ] = None
    moderation: Annotated[None, NOT_SERVED] = None

    def __post_init__(self) -> None:
        wrong = [token for token in self.logit_bias or {} if not (token.isascii() and token.isdecimal() and len(token) < 10)]
        if wrong:
            raise ValueError(f"logit_bias has {wrong[0][:40]!r}; its keys are token ids in decimal")

    def sampling_fields(self) -> dict[str, Any]:
        """Returns these options as fields of a GenerateRequest.

        Raises ValueError if several options specify the answer's form.
        """
        options = self.stream_options
        fields = {name: value for name in _SAME_OPTIONS if (value := getattr(self, name)) is not None}
        return {
            **fields,
            "temperature": 1.0 if self.temperature is None else self.temperature,
            "top_k": max(0, self.top_k or 0),
            "logit_bias": {int(token): bias for token, bias in (self.logit_bias or {}).items()},
            "structured_outputs": self.structure(),
            "include_progress": options is not None and bool(options.include_progress),
        }

    def forms(self) -> list[StructuredOutputs]:
        """Returns the forms that the options require of the answer. `structure` refuses more than one."""
        given = [] if self.structured_outputs is None else [self.structured_outputs]
        guides = {kind: getattr(self, f"guided_{kind}") for kind in ("json", "regex", "choice", "grammar")}
        return given + [StructuredOutputs(**{kind: guide}) for kind, guide in guides.items() if guide is not None]

    def structure(self) -> StructuredOutputs | None:
        """Returns the form that the answer must have; None if it may be any text.

        Raises ValueError if several options specify a form.
        """
        given = self.forms()
        if len(given) > 1:
            raise ValueError("what the answer must look like is said more than once; keep one of its options")
        return given[0] if given else None


class FormattedOptions(Options, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Options that only chat completions and completions share.

    `/v1/responses` specifies the answer's form in another field.
    """

    response_format: Annotated[
        TextFormat | JSONObjectFormat | JSONSchemaFormat | None,
        Meta(description="the answer's form: any text, JSON, or a schema's"),
    ] = None

    def forms(self) -> list[StructuredOutputs]:
        match self.response_format:
            case JSONObjectFormat():
                return [StructuredOutputs(json_object=True), *Options.forms(self)]
            case JSONSchemaFormat(json_schema):
                return [StructuredOutputs(json=json_schema.schema or {}), *Options.forms(self)]
        return Options.forms(self)


class ChatRequest(FormattedOptions, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The body of `POST /v1/chat/completions`."""

    messages: Annotated[
        Annotated[tuple[ChatMessage, ...], Meta(min_length=1)],
        Meta(description="the conversation, for the chat template; its text has no control tokens; other fields are ignored"),
    ]
    max_completion_tokens: Annotated[MaxTokens | None, Meta(description="as `max_tokens`, before which it goes")] = None
    logprobs: Annotated[
        bool | None, Meta(description="log-probabilities of the model's own distribution, before penalties, biases and filters")
    ] = None
    top_logprobs: Annotated[TopLogprobs | None, Meta(description="alternatives to each token; with `logprobs`")] = None
    tools: Annotated[Tools | None, Meta(description="functions that the answer may call")] = None
    tool_choice: Annotated[
        ToolChoice | None, Meta(description="whether to call one; a function by its name is called exactly once")
    ] = None
    parallel_tool_calls: Annotated[bool | None, Meta(description="`false`: a forced call is the only one")] = None
    functions: Annotated[tuple[()] | None, NOT_SERVED] = None
    function_call: Annotated[Literal["none", "auto"] | None, HINT] = None
    modalities: Annotated[tuple[Literal["text"], ...] | None, Meta(description="answers are texts")] = None
    audio: Annotated[None, NOT_SERVED] = None
    reasoning_effort: Annotated[ReasoningEffort | None, EFFORT] = None
    chat_template_kwargs: Annotated[dict[str, Any] | None, TEMPLATE_VARIABLES] = None
    verbosity: Annotated[Verbosity | None, HINT] = None
    web_search_options: Annotated[None, NOT_SERVED] = None
    prediction: Annotated[
        Prediction | None, Meta(description="a text that much of the answer repeats: faster, the same answer")
    ] = None

    def generate_request(self) -> GenerateRequest:
        """Converts the request to the type that AnswerService takes. Raises ValueError if options contradict each other."""
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


class CompletionRequest(FormattedOptions, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The body of `POST /v1/completions`: prompts as texts or token ids, without the chat template."""

    prompt: Annotated[
        Prompts, Meta(description=f"a text, several texts, token ids, or lists of them; prompts × `n` ≤ {MAX_CHOICES}")
    ]
    max_tokens: Annotated[
        AnswerTokens | None, Meta(description="default: what the prompt leaves of the context; 0 samples nothing, with `echo`")
    ] = None
    echo: Annotated[
        bool | None, Meta(description="the answer begins with the prompt, with `logprobs` also its log-probabilities")
    ] = None
    best_of: Annotated[Choices | None, Meta(description="must equal `n`")] = None
    logprobs: Annotated[
        TopLogprobs | None, Meta(description="log-probabilities, and alternatives to each token; the drawn one is among them")
    ] = None
    suffix: Annotated[None, NOT_SERVED] = None

    def generate_request(self) -> GenerateRequest:
        """Converts the request to the type that AnswerService takes. Raises ValueError if options contradict each other."""
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise ValueError(f"best_of is {self.best_of} and n is {self.n or 1}; both must be the same")
        return GenerateRequest(
            prompt=self.prompt,
            max_tokens=self.max_tokens,
            logprobs=self.logprobs,
            echo=bool(self.echo),
            **self.sampling_fields(),
        )
