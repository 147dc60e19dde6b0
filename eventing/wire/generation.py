"""What clients ask of the gateway and get from it when a text is to be continued: the JSON data of `dev.lamina.generate.*`.

Requests refuse unknown fields, because an option dropped in silence is an answer to another question; replies do not, so
that an older client reads a newer gateway. Bounds stand in the types: msgspec names the path of a value that is out of them.
The same holds for `score` and `control`.
"""

from collections.abc import Collection
from typing import Annotated, Literal

from msgspec import Meta, Struct

from eventing.wire.events import MAX_BIASES, MAX_POSITION, Sampling, TokenId

DEFAULT_MAX_TOKENS = 256
MAX_STOP_STRINGS = 16

StopString = Annotated[str, Meta(min_length=1, max_length=256)]

FinishReason = Literal["stop", "length", "cancelled"]
"""stop: an end token or a stop string; length: max_tokens or the context; cancelled: the client went away."""


class Message(Struct, frozen=True, forbid_unknown_fields=True):
    """One turn of a conversation, for the model's chat template."""

    role: Literal["system", "user", "assistant"]
    content: str


class GenerateRequest(Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """Data of `dev.lamina.generate.request`. Whether the answer streams is the client's Accept header, not a field."""

    prompt: Annotated[str, Meta(min_length=1)] | None = None
    """Text as it is, without the chat template. Exactly one of `prompt` and `messages` is given."""
    messages: Annotated[tuple[Message, ...], Meta(min_length=1)] | None = None
    max_tokens: Annotated[int, Meta(ge=1, le=MAX_POSITION)] = DEFAULT_MAX_TOKENS
    temperature: Annotated[float, Meta(ge=0, le=100)] = 0.0
    """0 is greedy."""
    top_k: Annotated[int, Meta(ge=0, lt=2**31)] = 0
    """0 keeps all."""
    top_p: Annotated[float, Meta(gt=0, le=1)] = 1.0
    min_p: Annotated[float, Meta(ge=0, le=1)] = 0.0
    repetition_penalty: Annotated[float, Meta(gt=0, le=100)] = 1.0
    seed: Annotated[int, Meta(ge=0, le=2**63 - 1)] | None = None
    """None: `cloud_event.reply_seed` of the request, so that a repeated delivery has the same answer."""
    prediction: str = ""
    """What much of the answer is expected to be, such as a file that is to be edited: makes answers faster, never others."""
    presence_penalty: Annotated[float, Meta(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[float, Meta(ge=-2, le=2)] = 0.0
    """Taken off the logit of a token that the answer has already: once, and as often as it has it."""
    logit_bias: Annotated[dict[TokenId, Annotated[float, Meta(ge=-100, le=100)]], Meta(max_length=MAX_BIASES)] = {}
    """By token id, added to its logit."""
    min_tokens: Annotated[int, Meta(ge=0, le=MAX_POSITION)] = 0
    """The model's own end does not come before so many."""
    ignore_eos: bool = False
    """The answer goes on behind the model's own end, which is a token like others."""
    stop: StopString | Annotated[tuple[StopString, ...], Meta(max_length=MAX_STOP_STRINGS)] = ()
    """The text ends before the first of these; it is not part of the answer."""

    def __post_init__(self) -> None:
        if (self.prompt is None) == (self.messages is None):
            given = "neither" if self.prompt is None else "both"
            raise ValueError(f"exactly one of `prompt` and `messages` must be given, not {given}")
        if self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens is {self.min_tokens}, more than max_tokens, {self.max_tokens}")

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else self.stop

    def sampling(self, seed: int, prompt_tokens: int = 0, eos_ids: Collection[int] = ()) -> Sampling:
        """What the last stage needs to know of an answer behind so many tokens; `seed` counts where the request names none."""
        penalized = self.presence_penalty or self.frequency_penalty
        banned = tuple(sorted(eos_ids)) if self.min_tokens and not self.ignore_eos else ()
        return Sampling(
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            seed=seed if self.seed is None else self.seed,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            prompt_tokens=prompt_tokens if penalized else 0,
            logit_bias=self.logit_bias,
            banned=banned,
            banned_until=prompt_tokens + self.min_tokens if banned else 0,
        )


class CompletionTokensDetails(Struct, frozen=True):
    """What became of guesses: tokens that were computed several a round, and those that were computed for nothing."""

    accepted_prediction_tokens: int = 0
    rejected_prediction_tokens: int = 0


class Usage(Struct, frozen=True):
    """Tokens, as the OpenAI API counts them."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    completion_tokens_details: CompletionTokensDetails = CompletionTokensDetails()


class Timings(Struct, frozen=True):
    """Where an answer's time went."""

    queue_seconds: float
    time_to_first_token_seconds: float
    """From the request's arrival, so it contains queue_seconds."""
    total_seconds: float
    tokens_per_second: float
    """Of the tokens behind the first; 0 where there is none."""
    replays: int = 0
    """How often a broken route made the sequence begin again."""


class GenerateResponse(Struct, frozen=True):
    """Data of `dev.lamina.generate.response`; on a stream, the last event."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    usage: Usage
    timings: Timings


class TokenEvent(Struct, frozen=True):
    """Data of `dev.lamina.generate.token`: the text that token `index` of the answer has completed, which may be empty."""

    index: int
    token_id: int
    text: str


class ErrorEvent(Struct, frozen=True):
    """Data of `dev.lamina.generate.error`, the end of a stream that cannot go on: a problem document (RFC 9457)."""

    type: str
    title: str
    status: int
    detail: str
