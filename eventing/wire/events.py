"""The wire types: event types, attributes, and the Batch that travels between stages.

A Batch is a table of rows, the rows' token ids, and at most one tensor of hidden states. `batch_codec` turns it into
bytes, `eventing.http.binding` into HTTP; nothing here knows either, and nothing here imports torch.
"""

import hashlib
from collections.abc import Sequence
from enum import StrEnum
from typing import Annotated, Final

from msgspec import Meta, Struct

WIRE_VERSION: Final = 3
BATCH_CONTENT_TYPE: Final = "application/vnd.lamina.batch"

MAX_ROWS: Final = 1024
MAX_BATCH_TOKENS: Final = 65_536
MAX_POSITION: Final = 2**24
"""Longest sequence the wire format admits, tokens. A stage's own limit is its model's context."""
MAX_HIDDEN_SIZE: Final = 2**17
MAX_DRAFT_TOKENS: Final = 64
"""Of one row."""
MAX_BIASES: Final = 300
"""Tokens whose logits one row may move, as many as the OpenAI API takes."""
MAX_TOP_LOGPROBS: Final = 20
"""Of one place, as many as the OpenAI API takes."""
MAX_GRAMMAR_BYTES: Final = 2**16
"""Of one answer's grammar, as a row carries it."""
MAX_END_TOKENS: Final = 64

SAFE_EVENT_BYTES: Final = 64 * 1024
"""What every intermediary must pass on (CloudEvents 1.0.2, section 4); more travels by claim check."""

ITEM_BYTES: Final = {"F32": 4, "BF16": 2, "F16": 2, "I8": 1}
"""The dtypes of hidden states, by their safetensors names, and the bytes of one number."""
SCALE_BYTES: Final = 4
"""Ahead of each row of I8: a float32, by which its numbers are to be multiplied."""


class EventType(StrEnum):
    """The `type` attribute of every event that Lamina sends or accepts."""

    FORWARD = "dev.lamina.forward"
    RESULT = "dev.lamina.result"
    WARMUP = "dev.lamina.warmup"
    RESERVE = "dev.lamina.reserve"
    RELEASE = "dev.lamina.release"
    GENERATE_REQUEST = "dev.lamina.generate.request"
    GENERATE_RESPONSE = "dev.lamina.generate.response"
    TOKEN = "dev.lamina.generate.token"
    ERROR = "dev.lamina.generate.error"
    """How a stream ends that cannot go on; its data is a problem document."""
    SCORE_REQUEST = "dev.lamina.score.request"
    SCORE_RESPONSE = "dev.lamina.score.response"


class Attribute(StrEnum):
    """Extension attributes. CloudEvents 1.0 section 3.1: lower-case letters and digits, at most 20 of them."""

    PIPELINE = "pipeline"
    """Fingerprint of weights, cut, dtypes and wire version; a stage refuses another's."""
    LAYER = "layer"
    """The next layer to run. A stage accepts only its own first layer and answers with the one behind its last."""
    INSTANCE = "instance"
    """Who answered, with a nonce of its boot."""
    FREE_TOKENS = "freetokens"
    """On every reply of a stage: KV tokens that can still be reserved there."""
    AWAITED_TOKENS = "awaitedtokens"
    """On a release: the reply may wait until so many KV tokens can be reserved, see `eventing.wire.control.ROOM_SECONDS`."""
    EXPIRY_TIME = "expirytime"
    """RFC 3339; work that nobody awaits any more is dropped."""
    SIGNATURE = "signature"
    """In place of a bearer token where none can be sent, see `eventing.wire.signature`."""
    TRACEPARENT = "traceparent"
    CAUSATION_ID = "causationid"
    """On what a client gets: the id of the event that it answers."""
    CAUSATION_SOURCE = "causationsource"
    """And its source: both together are unique."""
    DATAREF = "dataref"
    """Claim check: where the data lies in the store, `s3://bucket/key`."""
    DATAREF_BYTES = "datarefbytes"
    """Bytes that lie there."""
    DATAREF_SHA256 = "datarefsha256"
    """Their SHA-256, hexadecimal."""


class Want(StrEnum):
    """What the last stage shall answer for a row."""

    NONE = "none"
    TOKEN = "token"
    LOGPROBS = "logprobs"


class Status(StrEnum):
    """How a row fared at a stage. Everything but `ok` leaves the row out of the tensor: its length is 0."""

    OK = "ok"
    STALE = "stale"
    """An older attempt, or older than the step in progress: touched nothing."""
    MISS = "miss"
    """The stage holds less KV than the row's position; `held` says how much."""
    FULL = "full"
    """`reserve_tokens` did not fit; `held` is 0."""
    INVALID = "invalid"
    """The row itself is wrong; `reason` says how."""


TokenId = Annotated[int, Meta(ge=0, lt=2**31)]


class Grammar(Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """What an answer must look like, behind `Sampling.prompt_tokens` tokens. The mask is a function of the tokens so far.

    The first rows of a sequence that want a token bring the source along, until the last stage has answered one. Later ones say
    the digest alone; a stage that does not know it any more answers with a miss at the row's own position.
    """

    digest: Annotated[str, Meta(min_length=32, max_length=32)]
    """`grammar_digest` of the source."""
    end_ids: Annotated[tuple[TokenId, ...], Meta(min_length=1, max_length=MAX_END_TOKENS)]
    """Allowed where the answer may end; nothing else is where it must."""
    source: Annotated[str, Meta(max_length=MAX_GRAMMAR_BYTES)] = ""
    """In the notation of llguidance."""


def grammar_digest(source: str) -> str:
    return hashlib.sha256(source.encode()).hexdigest()[:32]


class Sampling(Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """How the last stage draws a token. The draw is a function of logits, these values and the position alone."""

    temperature: Annotated[float, Meta(ge=0, le=100)] = 0.0
    """0 is greedy."""
    top_k: Annotated[int, Meta(ge=0)] = 0
    """0 keeps all."""
    top_p: Annotated[float, Meta(gt=0, le=1)] = 1.0
    min_p: Annotated[float, Meta(ge=0, le=1)] = 0.0
    repetition_penalty: Annotated[float, Meta(gt=0, le=100)] = 1.0
    """Over all tokens of the sequence so far, prompt included, as transformers does it."""
    seed: Annotated[int, Meta(ge=0, le=2**63 - 1)] = 0
    presence_penalty: Annotated[float, Meta(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[float, Meta(ge=-2, le=2)] = 0.0
    """As the OpenAI API has them, over the tokens behind the prompt: taken off a logit once, and as often as it came."""
    prompt_tokens: Annotated[int, Meta(ge=0, le=MAX_POSITION)] = 0
    """Where those begin, and what a grammar is about."""
    logit_bias: Annotated[dict[TokenId, Annotated[float, Meta(ge=-100, le=100)]], Meta(max_length=MAX_BIASES)] = {}
    """Added to the logits of these tokens."""
    banned: Annotated[tuple[TokenId, ...], Meta(max_length=MAX_BIASES)] = ()
    banned_until: Annotated[int, Meta(ge=0, le=MAX_POSITION)] = 0
    """These are not drawn at a position before that: what would end the answer before its least length."""
    grammar: Grammar | None = None
    """Comes first: no other value allows a token that it does not, and where they leave none that it allows, they give way."""

    @property
    def adjusts(self) -> bool:
        """Something is done to the logits before the draw."""
        return bool(
            self.repetition_penalty != 1 or self.presence_penalty or self.frequency_penalty or self.logit_bias or self.banned
        )

    @property
    def looks_back(self) -> bool:
        """The draw is a function of the tokens before it, too: not only by what was computed of them."""
        return self.grammar is not None or self.adjusts


class Result(Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """What the last stage answers for a row that wants something."""

    tokens: tuple[TokenId, ...] | None = None
    """With `Want.TOKEN`: the token behind the row's tokens; behind draft tokens that came true, those and one more."""
    logprobs: tuple[float, ...] | None = None
    """With `Want.LOGPROBS`: log-probability of each token of the row but its first; with `Want.TOKEN` and `top_logprobs`: of
    each of `tokens`. Natural logarithm, of the model's own distribution: before penalties, biases, temperature and filters."""
    top_logprobs: tuple[tuple[tuple[TokenId, float], ...], ...] | None = None
    """Beside each of `logprobs`, where `top_logprobs` asked for some: the most probable tokens there, the first one first."""


class Row(Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """`length` new tokens of one sequence, at `position` of its attempt `attempt`.

    Position is the truth: KV beyond `position` is dropped before computing, KV short of it is a miss. That takes back
    what was computed for draft tokens that did not come true.
    """

    id: Annotated[str, Meta(min_length=1, max_length=128)]
    attempt: Annotated[int, Meta(ge=0, lt=2**31)]
    position: Annotated[int, Meta(ge=0, le=MAX_POSITION)]
    length: Annotated[int, Meta(ge=0, le=MAX_BATCH_TOKENS)]
    want: Want = Want.NONE
    sampling: Sampling | None = None
    reserve_tokens: Annotated[int, Meta(ge=1, le=MAX_POSITION)] | None = None
    """With a sequence's first row: prompt plus max_tokens, or as much of an answer without a length as it may come to soon.
    Idempotent where a reserve event came before."""
    draft_tokens: Annotated[int, Meta(ge=0, le=MAX_DRAFT_TOKENS)] = 0
    """How many of its last tokens are draft tokens. With `Want.TOKEN` a token is drawn after the last token before them; if it
    equals the first draft token, one more is drawn after that, and so on."""
    top_logprobs: Annotated[int, Meta(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    """With `Want.TOKEN`: the log-probabilities of what is drawn are wanted, too. With both wants: so many of the most probable
    tokens beside each."""
    status: Status = Status.OK
    held: Annotated[int, Meta(ge=0, le=MAX_POSITION)] | None = None
    reason: str | None = None
    result: Result | None = None


class Tensor(Struct, frozen=True):
    """Bytes, dtype and shape; C order, little endian. The bytes are a view, never a copy."""

    dtype: str
    """A key of ITEM_BYTES."""
    shape: tuple[int, ...]
    data: memoryview


class Batch(Struct, frozen=True):
    """One micro-batch. The rows' lengths add up to `len(token_ids)` and, where there is one, to `hidden.shape[0]`.

    Into the first stage there is no tensor; between stages it is hidden [sum(length), hidden_size]; out of the last
    stage there are neither tensor nor token ids, and rows carry results with length 0.
    """

    rows: tuple[Row, ...]
    token_ids: memoryview
    """int32, little endian, format "i", flat over all rows in their order."""
    hidden: Tensor | None = None

    def offsets(self) -> list[int]:
        """Where each row's tokens begin, and the total behind them: len(rows) + 1 numbers."""
        offsets = [0]
        for row in self.rows:
            offsets.append(offsets[-1] + row.length)
        return offsets


def row_bytes(dtype: str, hidden_size: int) -> int:
    """Of one token's hidden states; dtype: a key of ITEM_BYTES."""
    return hidden_size * ITEM_BYTES[dtype] + (SCALE_BYTES if dtype == "I8" else 0)


Cut = Sequence[tuple[int, int]]
"""Layer groups [first, last) in order, without gaps: ((0, 10), (10, 20), (20, 30))."""


def pipeline_fingerprint(weights_digest: str, cut: Cut, dtype: str, wire_dtype: str | None = None) -> str:
    """32 hex digits that differ whenever weights, cut, dtype, wire version or what hidden states travel in do.

    wire_dtype: where they travel in another dtype than stages compute in.

    128 bits, since two models with the same fingerprint could stand for each other; names of Services carry the first
    eight digits of it, which only have to keep one pipeline's stages apart from the next one's.
    """
    ranges = ",".join(f"{first}:{last}" for first, last in cut)
    text = f"{weights_digest} {ranges} {dtype} {WIRE_VERSION}" + (f" {wire_dtype}" if wire_dtype else "")
    return hashlib.sha256(text.encode()).hexdigest()[:32]


Weights = tuple[str, str]
"""Of one stage: the dtype in which it computes, and the digest of the publication that it reads."""


def fingerprint_of(weights: Sequence[Weights], cut: Cut, wire_dtype: str | None = None) -> str:
    """`pipeline_fingerprint` of stages that may differ in their dtypes; weights: of each."""
    if len(set(weights)) == 1:
        ((dtype, digest),) = set(weights)
        return pipeline_fingerprint(digest, cut, dtype, wire_dtype)
    digests, dtypes = (",".join(each[place] for each in weights) for place in (1, 0))
    return pipeline_fingerprint(digests, cut, dtypes, wire_dtype)
