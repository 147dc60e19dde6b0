"""Requests to generate text and their answers: the JSON data of `dev.lamina.generate.*`.

Requests refuse unknown fields, because a dropped option would change the answer without notice. Replies accept unknown fields,
so that an older client can read a newer gateway's. Bounds are part of the types. `score` and `control` follow the same rules.
"""

from collections.abc import Collection, Sequence
from hashlib import blake2b
from typing import Annotated, Any, Literal

from msgspec import Meta, Struct
from msgspec.structs import replace

from eventing.wire.events import MAX_BIASES, MAX_POSITION, MAX_TOP_LOGPROBS, Grammar, Sampling, TokenId
from eventing.wire.structured_outputs import StructuredOutputs
from eventing.wire.tools import NamedTool, ToolCall, ToolChoice, Tools

MAX_STOP_STRINGS = 16
MAX_STOP_TOKENS = 128
MAX_CHOICES = 128  # answers to one request: its prompts, n times each

# Values of options, with their bounds; the OpenAI API has the same.
Choices = Annotated[int, Meta(ge=1, le=MAX_CHOICES)]
AnswerTokens = Annotated[int, Meta(ge=0, le=MAX_POSITION)]
TopK = Annotated[int, Meta(ge=-1, lt=2**31)]
TopP = Annotated[float, Meta(gt=0, le=1)]
MinP = Annotated[float, Meta(ge=0, le=1)]
RepetitionPenalty = Annotated[float, Meta(gt=0, le=100)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
Bias = Annotated[float, Meta(ge=-100, le=100)]
Seed = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
TopLogprobs = Annotated[int, Meta(ge=0, le=MAX_TOP_LOGPROBS)]
ReasoningEffort = Annotated[str, Meta(max_length=64)]
StopString = Annotated[str, Meta(min_length=1, max_length=256)]
StopStrings = StopString | Annotated[tuple[StopString, ...], Meta(max_length=MAX_STOP_STRINGS)]
StopTokens = Annotated[tuple[TokenId, ...], Meta(max_length=MAX_STOP_TOKENS)]
CacheSalt = Annotated[str, Meta(min_length=22, max_length=256)]  # 22 characters of base64 hold 128 random bits
PromptText = Annotated[str, Meta(min_length=1)]
PromptIds = Annotated[tuple[TokenId, ...], Meta(min_length=1, max_length=MAX_POSITION)]
# One text, several texts, the token ids of one text, or several such lists; not mixed.
Prompts = PromptText | Annotated[tuple[PromptText | TokenId | PromptIds, ...], Meta(min_length=1, max_length=MAX_POSITION)]

# stop: an end token or a stop string; length: max_tokens or the context; cancelled: the client went away.
FinishReason = Literal["stop", "length", "cancelled"]


class Message(Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """One turn of a conversation, for the model's chat template."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str
    tool_calls: tuple[ToolCall, ...] = ()  # made in an assistant's turn
    tool_call_id: str | None = None  # the call that a tool's turn answers
    name: str | None = None


def choice_seed(seed: int, index: int) -> int:
    """Returns the seed of answer number `index` of a request, from the request's own seed.

    Answer 0 has `seed` itself; the seeds of the others are a hash of `seed` and `index`, so answers to requests with
    neighbouring seeds share nothing. Answers are numbered over all prompts of the request. `seed` and the result are below
    2^63.
    """
    if index == 0:
        return seed
    return int.from_bytes(blake2b(index.to_bytes(8), key=seed.to_bytes(8), digest_size=8).digest()) >> 1


class GenerateRequest(Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """Data of `dev.lamina.generate.request`. The client's Accept header, not a field, says whether the answer is streamed."""

    # Text without the chat template, or its tokens. Exactly one of `prompt` and `messages` is given.
    prompt: Prompts | None = None
    messages: Annotated[tuple[Message, ...], Meta(min_length=1)] | None = None
    # The served model, or MODEL:ADAPTER for one of its adapters, or MODEL:ADAPTER@VERSION; None: the served model.
    model: Annotated[str, Meta(max_length=400)] | None = None
    n: Choices = 1  # answers to each prompt
    # None: what the prompt leaves of the model's context. 0: nothing, with `echo`.
    max_tokens: AnswerTokens | None = None
    temperature: Annotated[float, Meta(ge=0, le=100)] = 0.0  # 0 is greedy
    top_k: TopK = 0  # 0 and -1 keep all
    top_p: TopP = 1.0
    min_p: MinP = 0.0
    repetition_penalty: RepetitionPenalty = 1.0
    # None: `cloud_event.reply_seed` of the request, so that a repeated delivery has the same answer.
    seed: Seed | None = None
    # Text that much of the answer is expected to repeat, such as a file to be edited. Changes the speed, not the answer.
    prediction: str = ""
    # A secret of the client, made at random. Requests with the same one may reuse each other's KV.
    cache_salt: CacheSalt | None = None
    # Subtracted from the logit of a token in the answer: once, and once per occurrence.
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    # Added to the logits of these tokens.
    logit_bias: Annotated[dict[TokenId, Bias], Meta(max_length=MAX_BIASES)] = {}
    min_tokens: AnswerTokens = 0  # an end token cannot come earlier
    ignore_eos: bool = False  # the model's end token does not end the answer
    # The text ends before the first of these strings, which is not part of the answer; likewise before one of the tokens.
    stop: StopStrings = ()
    stop_token_ids: StopTokens = ()
    include_stop_str_in_output: bool = False  # the stop string, or the token of `stop_token_ids`, is part of the answer
    # The log-probability of each token is wanted, and of so many alternatives to it.
    logprobs: TopLogprobs | None = None
    echo: bool = False  # answer and log-probabilities begin with the prompt; not with `messages`
    chat_template_kwargs: dict[str, Any] = {}  # variables for the model's chat template, such as `enable_thinking`
    # A further variable for the chat template. One that lacks it and can switch thoughts off does so at `none`.
    reasoning_effort: ReasoningEffort | None = None
    tools: Tools = ()  # functions that the answer may call; calls are part of its text, in the model's own format
    tool_choice: ToolChoice = "auto"
    parallel_tool_calls: bool = True  # a forced call may be followed by others
    structured_outputs: StructuredOutputs | None = None  # the form of the answer, which ends when the form is complete
    include_progress: bool = False  # a stream has `dev.lamina.generate.progress` events while it waits

    def __post_init__(self) -> None:
        if (self.prompt is None) == (self.messages is None):
            given = "neither" if self.prompt is None else "both"
            raise ValueError(f"exactly one of `prompt` and `messages` must be given, not {given}")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens is {self.min_tokens}, more than max_tokens, {self.max_tokens}")
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens is 0, which leaves nothing to answer but with `echo`")
        if self.echo and self.messages is not None:
            raise ValueError("`echo` goes with `prompt`, not with `messages`")
        if self.tools and self.messages is None:
            raise ValueError("`tools` goes with `messages`, not with `prompt`")
        if self.tool_choice == "required" and not self.tools:
            raise ValueError('tool_choice is "required", which takes tools')
        if isinstance(self.tool_choice, NamedTool) and not self.forced_tools:
            raise ValueError(f"tool_choice names {self.tool_choice.function.name!r}, which is none of the tools")
        if self.forced_tools and self.structured_outputs is not None:
            raise ValueError("a forced tool call says already what the answer must look like; leave out one of the two")
        if self.constrained and self.ignore_eos:
            raise ValueError("ignore_eos does not go with structured outputs, which end with the model's own end")
        if (choices := self.n * len(self.prompts)) > MAX_CHOICES:
            raise ValueError(f"{len(self.prompts)} prompts, {self.n} answers to each: {choices}; the most is {MAX_CHOICES}")

    @property
    def callable_tools(self) -> Tools:
        """The tools that the prompt describes to the model; none if `tool_choice` is `none`."""
        return () if self.tool_choice == "none" else self.tools

    @property
    def forced_tools(self) -> Tools:
        """The tools of which the answer must call one; an empty tuple if the model decides whether to call any."""
        if isinstance(self.tool_choice, NamedTool):
            return tuple(tool for tool in self.tools if tool.function.name == self.tool_choice.function.name)
        return self.tools if self.tool_choice == "required" else ()

    @property
    def constrained(self) -> bool:
        """Whether a grammar constrains the answer: tool calls are forced, or a structure is required."""
        return bool(self.forced_tools) or self.structured_outputs is not None

    @property
    def prompts(self) -> Sequence[str | Sequence[int] | None]:
        """Returns the prompts, each a text or token ids. Returns a single None if the request has `messages`.

        Raises ValueError if kinds are mixed.
        """
        if self.prompt is None or isinstance(self.prompt, str):
            return (self.prompt,)
        kinds = {type(part) for part in self.prompt}
        if len(kinds) > 1:
            raise ValueError("`prompt` mixes texts, token ids and lists of them; send one kind")
        return (self.prompt,) if kinds == {int} else self.prompt  # type: ignore[return-value]

    def each(self, seed: int) -> list["GenerateRequest"]:
        """Splits the request into one request per answer: the n answers to the first prompt, then those to the next prompt.

        The first has the request's own seed, or `seed` if the request has none. Each other has `choice_seed` of that seed.
        """
        seed = seed if self.seed is None else self.seed % 2**63
        prompts = [prompt for prompt in self.prompts for _ in range(self.n)]
        return [replace(self, prompt=prompt, n=1, seed=choice_seed(seed, index)) for index, prompt in enumerate(prompts)]

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else self.stop

    @property
    def scores(self) -> bool:
        """Whether the client wants log-probabilities of the prompt's own tokens: `echo` with `logprobs`."""
        return self.echo and self.logprobs is not None

    @property
    def scored(self) -> bool:
        """Whether log-probabilities of the prompt's own tokens are computed: the client wants them, or `max_tokens` is 0."""
        return self.scores or self.max_tokens == 0

    def end_ids(self, eos_ids: Collection[int]) -> frozenset[int]:
        """Returns the ids of tokens that end the answer. `eos_ids` are the model's own, which `ignore_eos` leaves out."""
        return frozenset(self.stop_token_ids) | (frozenset() if self.ignore_eos else frozenset(eos_ids))

    def sampling(
        self, seed: int, prompt_tokens: int = 0, eos_ids: Collection[int] = (), grammar: Grammar | None = None
    ) -> Sampling:
        """Returns how the last stage draws the answer's tokens.

        `seed` is used if the request has none. `prompt_tokens` is the length of the prompt. `eos_ids` are the model's end
        tokens. The answer must follow `grammar`; if it is None, any text is allowed.
        """
        penalized = self.presence_penalty or self.frequency_penalty
        banned = tuple(sorted(self.end_ids(eos_ids))) if self.min_tokens else ()
        return Sampling(
            temperature=self.temperature,
            top_k=max(0, self.top_k),
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            seed=seed if self.seed is None else self.seed % 2**63,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            prompt_tokens=prompt_tokens if penalized or grammar else 0,
            logit_bias=self.logit_bias,
            banned=banned,
            banned_until=prompt_tokens + self.min_tokens if banned else 0,
            grammar=grammar,
        )


class CompletionTokensDetails(Struct, frozen=True):
    """Counts of accepted and of rejected draft tokens."""

    accepted_prediction_tokens: int = 0
    rejected_prediction_tokens: int = 0


class PromptTokensDetails(Struct, frozen=True):
    cached_tokens: int = 0  # tokens of the prompt that every stage had in its prefix cache


class Usage(Struct, frozen=True):
    """Token counts of a request, named as in the OpenAI API."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    completion_tokens_details: CompletionTokensDetails = CompletionTokensDetails()
    prompt_tokens_details: PromptTokensDetails = PromptTokensDetails()


class Timings(Struct, frozen=True):
    """How long an answer took, in total and in its parts."""

    queue_seconds: float
    time_to_first_token_seconds: float  # from the request's arrival, queue_seconds included
    total_seconds: float
    tokens_per_second: float  # after the first token; 0 for a single token
    replays: int = 0  # how often a broken route made the sequence begin again


class TokenLogprob(Struct, frozen=True, omit_defaults=True):
    """A token's log-probability, and those of the most probable tokens at its position, most probable first."""

    token_id: int
    logprob: float | None  # None for a text's first token
    top: tuple[tuple[int, float], ...] = ()


class Choice(Struct, frozen=True, omit_defaults=True):
    """One of a request's answers. With `echo` its text and token_ids begin with the prompt's."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    logprobs: tuple[TokenLogprob, ...] | None = None  # of all token_ids, if asked for


class GenerateResponse(Struct, frozen=True, omit_defaults=True):
    """Data of `dev.lamina.generate.response`, which is the last event of a stream.

    `text`, `token_ids`, `finish_reason` and `logprobs` are those of the first answer.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    usage: Usage  # of all answers together
    timings: Timings  # from the request's arrival to the end of the last answer
    logprobs: tuple[TokenLogprob, ...] | None = None
    choices: tuple[Choice, ...] = ()  # all answers, if there are several


class TokenEvent(Struct, frozen=True, omit_defaults=True):
    """Data of `dev.lamina.generate.token`: the text that becomes certain with token `index` of the answer; it may be empty."""

    index: int
    token_id: int
    text: str
    choice: int = 0  # index of the answer, if there are several
    logprob: TokenLogprob | None = None


class ProgressEvent(Struct, frozen=True, omit_defaults=True):
    """Data of `dev.lamina.generate.progress`: what an answer waits for while no token comes.

    A later event replaces an earlier one. `start`: a stage that has no pod, or whose pod loads weights. `memory`: memory for
    keys and values at the stages. `turn`: requests before this one in the queue. `retry`: the next attempt after a stage
    failed. `prompt`: the prompt's computation.
    """

    awaits: Literal["start", "memory", "turn", "retry", "prompt"]
    text: str  # the same as a phrase, such as `stage 2 of 3 loading, 41 %`
    stage: int | None = None  # for `start`: the number, from 1 on, of the stage that is furthest behind
    stages: int | None = None  # for `start`: how many the pipeline has
    percent: int | None = None  # for `start`: of the stage's weights; for `prompt`: of its tokens; None: unknown
    waiting: int | None = None  # for `turn`: requests in the queue


class ErrorEvent(Struct, frozen=True):
    """Data of `dev.lamina.generate.error`, the last event of a stream that failed: a problem document (RFC 9457)."""

    type: str
    title: str
    status: int
    detail: str
