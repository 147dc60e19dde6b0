"""The wire types: event types, attributes, and the Batch that travels between stages.

A Batch is a table of rows, the rows' token ids, and at most one tensor of hidden states. `batch_codec` turns it into bytes and
`eventing.http.binding` into HTTP. Nothing here imports torch or numpy.
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
MAX_POSITION: Final = 2**24  # longest sequence of the wire format, tokens; a stage's own limit is its model's context
MAX_HIDDEN_SIZE: Final = 2**17
MAX_DRAFT_TOKENS: Final = 64  # per row
MAX_BIASES: Final = 300  # tokens whose logits one row may move, as in the OpenAI API
MAX_TOP_LOGPROBS: Final = 20  # per position, as in the OpenAI API
MAX_GRAMMAR_BYTES: Final = 2**16  # source of one answer's grammar
MAX_END_TOKENS: Final = 64
ADAPTER_BYTES: Final = 16  # of the digest of an adapter's version

SAFE_EVENT_BYTES: Final = 64 * 1024  # every intermediary must pass this on (CloudEvents 1.0.2, section 4); more: claim check

ITEM_BYTES: Final = {"F32": 4, "BF16": 2, "F16": 2, "I8": 1}  # dtypes of hidden states by safetensors name, bytes per number
SCALE_BYTES: Final = 4  # before each row of I8: a float32, the factor of its numbers


class EventType(StrEnum):
    """The values of the `type` attribute of events that Lamina sends or accepts."""

    FORWARD = "dev.lamina.forward"
    RESULT = "dev.lamina.result"
    WARMUP = "dev.lamina.warmup"
    RESERVE = "dev.lamina.reserve"
    RELEASE = "dev.lamina.release"
    GENERATE_REQUEST = "dev.lamina.generate.request"
    GENERATE_RESPONSE = "dev.lamina.generate.response"
    TOKEN = "dev.lamina.generate.token"
    PROGRESS = "dev.lamina.generate.progress"
    ERROR = "dev.lamina.generate.error"  # last event of a stream that failed; its data is a problem document
    SCORE_REQUEST = "dev.lamina.score.request"
    SCORE_RESPONSE = "dev.lamina.score.response"
    EMBED_REQUEST = "dev.lamina.embed.request"
    EMBED_RESPONSE = "dev.lamina.embed.response"
    BATCH_REQUEST = "dev.lamina.batch.request"
    BATCH_RESPONSE = "dev.lamina.batch.response"


class Attribute(StrEnum):
    """Names of extension attributes. They are at most 20 lower-case letters and digits (CloudEvents 1.0, section 3.1)."""

    PIPELINE = "pipeline"  # fingerprint of weights, cut, dtypes and wire version; a stage refuses another pipeline's
    LAYER = "layer"  # next layer to run; a stage accepts only its first layer and replies with the one after its last
    INSTANCE = "instance"  # the instance that replied: a name with a nonce of its boot
    FREE_TOKENS = "freetokens"  # on every reply of a stage: KV tokens that can still be reserved there
    # Digest of what decided the bits of the hidden states (`prefix_chain.lineage_after`): on replies to forward and reserve
    # events, and on such events to any stage but the first. Without it a stage neither finds nor leaves KV.
    LINEAGE = "lineage"
    AWAITED_TOKENS = "awaitedtokens"  # on a release: hold the reply until so many KV tokens can be reserved, or HOLD_SECONDS
    EXPIRY_TIME = "expirytime"  # RFC 3339; after it the reply is no longer awaited, and the event is dropped
    SIGNATURE = "signature"  # replaces a bearer token where headers cannot be sent, see `eventing.wire.signature`
    TRACEPARENT = "traceparent"
    CAUSATION_ID = "causationid"  # on events to clients: id of the event that is answered
    CAUSATION_SOURCE = "causationsource"  # and its source; both together are unique
    MODEL = "model"  # of a client's request: as `model` in its data, which may be elsewhere; a fleet's gateway routes by it
    DATAREF = "dataref"  # claim check: where the data is in the store, `s3://bucket/key`
    DATAREF_BYTES = "datarefbytes"  # size of that data
    DATAREF_SHA256 = "datarefsha256"  # SHA-256 of that data, hexadecimal


class Want(StrEnum):
    """What the last stage shall return for a row."""

    NONE = "none"
    TOKEN = "token"
    LOGPROBS = "logprobs"
    VECTOR = "vector"


class Pooling(StrEnum):
    """How the final hidden states of a row's tokens are combined into one vector."""

    MEAN = "mean"
    LAST = "last"  # the last token's


class Status(StrEnum):
    """A row's outcome at a stage. A row that is not `ok` is left out of the tensor: its length is 0."""

    OK = "ok"
    STALE = "stale"  # an older attempt, or older than the step in progress: changed nothing
    MISS = "miss"  # the stage holds less KV than the row's position; `held` says how much
    FULL = "full"  # `reserve_tokens` did not fit; `held` is 0
    INVALID = "invalid"  # the row itself is wrong; `reason` says how


TokenId = Annotated[int, Meta(ge=0, lt=2**31)]
# The digest of the version of an adapter that a sequence's layers have; empty: none.
Adapter = Annotated[bytes, Meta(max_length=ADAPTER_BYTES)]


class Grammar(Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """The grammar that an answer must follow. The answer begins after `Sampling.prompt_tokens` tokens.

    Which tokens are allowed next depends only on the answer's tokens so far.

    A sequence's first rows that want a token carry the grammar's source, until the last stage has answered one of them. Later
    rows carry only its digest. A stage that does not know the digest answers with a miss at the row's position.
    """

    digest: Annotated[str, Meta(min_length=32, max_length=32)]  # `grammar_digest` of the source
    # Tokens that are allowed if the answer may end here. If it must end, nothing else is allowed.
    end_ids: Annotated[tuple[TokenId, ...], Meta(min_length=1, max_length=MAX_END_TOKENS)]
    source: Annotated[str, Meta(max_length=MAX_GRAMMAR_BYTES)] = ""  # in llguidance's notation


def grammar_digest(source: str) -> str:
    return hashlib.sha256(source.encode()).hexdigest()[:32]


class Sampling(Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """How the last stage draws a token. The result depends only on the logits, these values and the token's position."""

    temperature: Annotated[float, Meta(ge=0, le=100)] = 0.0  # 0 is greedy
    top_k: Annotated[int, Meta(ge=0)] = 0  # 0 keeps all
    top_p: Annotated[float, Meta(gt=0, le=1)] = 1.0
    min_p: Annotated[float, Meta(ge=0, le=1)] = 0.0
    repetition_penalty: Annotated[float, Meta(gt=0, le=100)] = 1.0  # over prompt and answer, as transformers does it
    seed: Annotated[int, Meta(ge=0, le=2**63 - 1)] = 0
    # As in the OpenAI API, over the answer: subtracted once per token in it, and once per occurrence.
    presence_penalty: Annotated[float, Meta(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[float, Meta(ge=-2, le=2)] = 0.0
    prompt_tokens: Annotated[int, Meta(ge=0, le=MAX_POSITION)] = 0  # where the answer begins, for penalties and grammar
    # Added to the logits of these tokens.
    logit_bias: Annotated[dict[TokenId, Annotated[float, Meta(ge=-100, le=100)]], Meta(max_length=MAX_BIASES)] = {}
    # Not drawn before position `banned_until`: tokens that would end the answer before its least length.
    banned: Annotated[tuple[TokenId, ...], Meta(max_length=MAX_BIASES)] = ()
    banned_until: Annotated[int, Meta(ge=0, le=MAX_POSITION)] = 0
    # Overrides all other values: they neither allow a token that it forbids, nor forbid all that it allows.
    grammar: Grammar | None = None

    @property
    def adjusts(self) -> bool:
        """Returns whether penalties, biases or banned tokens change the logits before the draw."""
        return bool(
            self.repetition_penalty != 1 or self.presence_penalty or self.frequency_penalty or self.logit_bias or self.banned
        )


class Result(Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """What the last stage returns for a row whose `want` is not NONE."""

    # With `Want.TOKEN`: the draft tokens that were accepted, and one token more.
    tokens: tuple[TokenId, ...] | None = None
    # With `Want.LOGPROBS`: of each token of the row but its first. With `Want.TOKEN` and `top_logprobs`: of each of `tokens`.
    # Natural logarithms of the model's own distribution, before penalties, biases, temperature and filters.
    logprobs: tuple[float, ...] | None = None
    # For each of `logprobs`, if asked for: the most probable tokens at its position, most probable first.
    top_logprobs: tuple[tuple[tuple[TokenId, float], ...], ...] | None = None
    # With `Want.VECTOR`: float32, little endian. The pooled hidden states of the row's tokens, after the dense layers of an
    # embedder, or the logits of a classifier. Not normalized.
    vector: bytes | None = None


class Row(Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """`length` new tokens of one sequence, from `position` on, in the sequence's attempt number `attempt`.

    Before a stage computes the row, it drops the sequence's KV from `position` on, such as KV of rejected draft tokens. If it
    has less KV than `position` tokens, it answers with a miss.
    """

    id: Annotated[str, Meta(min_length=1, max_length=128)]
    attempt: Annotated[int, Meta(ge=0, lt=2**31)]
    position: Annotated[int, Meta(ge=0, le=MAX_POSITION)]
    length: Annotated[int, Meta(ge=0, le=MAX_BATCH_TOKENS)]
    want: Want = Want.NONE
    sampling: Sampling | None = None
    # With a sequence's first row: tokens of memory to reserve, for its prompt and max_tokens, or for the part of an unbounded
    # answer that is reserved now. Has no effect if a reserve event came before it.
    reserve_tokens: Annotated[int, Meta(ge=1, le=MAX_POSITION)] | None = None
    # How many of the row's last tokens are draft tokens. With `Want.TOKEN` one token is drawn after the last known token; while
    # the drawn token equals the next draft token, one more is drawn after that.
    draft_tokens: Annotated[int, Meta(ge=0, le=MAX_DRAFT_TOKENS)] = 0
    # Further tokens of the sequence that are known already, such as the rest of its prompt, and come in later rows.
    following: Annotated[int, Meta(ge=0, le=MAX_POSITION)] = 0
    # With `Want.TOKEN`: log-probabilities of drawn tokens are wanted. With either want: of so many alternatives per token.
    top_logprobs: Annotated[int, Meta(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    pooling: Pooling | None = None  # with `Want.VECTOR`
    adapter: Adapter = b""  # the same in all rows of a sequence
    status: Status = Status.OK
    held: Annotated[int, Meta(ge=0, le=MAX_POSITION)] | None = None
    reason: str | None = None
    result: Result | None = None


class Tensor(Struct, frozen=True):
    """Hidden states as bytes in C order, little endian. The bytes are a view, never a copy."""

    dtype: str  # a key of ITEM_BYTES
    shape: tuple[int, ...]
    data: memoryview


class Batch(Struct, frozen=True):
    """Data of a forward event: rows, their token ids, and at most one tensor of hidden states.

    The rows' lengths add up to `len(token_ids)` and, if there is a tensor, to `hidden.shape[0]`.

    The request to the first stage has no tensor. Between stages the tensor is [sum(length), hidden_size]. The last stage's
    reply has neither a tensor nor token ids: its rows have length 0 and carry results.
    """

    rows: tuple[Row, ...]
    token_ids: memoryview  # int32, little endian, format "i", flat over all rows in their order
    hidden: Tensor | None = None

    def offsets(self) -> list[int]:
        """Returns the index of each row's first token, and then the number of all tokens: len(rows) + 1 numbers."""
        offsets = [0]
        for row in self.rows:
            offsets.append(offsets[-1] + row.length)
        return offsets


def row_bytes(dtype: str, hidden_size: int) -> int:
    """Returns the bytes of one token's hidden states on the wire, for I8 with their scale. `dtype` is a key of ITEM_BYTES."""
    return hidden_size * ITEM_BYTES[dtype] + (SCALE_BYTES if dtype == "I8" else 0)


Cut = Sequence[tuple[int, int]]  # layer groups [first, last) in order, without gaps: ((0, 10), (10, 20), (20, 30))
StageWeights = tuple[str, str]  # the dtype in which a stage computes, and the digest of the publication that it reads


def fingerprint_of(
    weights: Sequence[StageWeights], cut: Cut, wire_dtype: str | None = None, kv_dtype: str | None = None
) -> str:
    """Returns the pipeline's fingerprint: a digest of weights, cut, wire version and dtypes of layers, hidden states and KV.

    It has 32 hexadecimal digits (128 bits), so two pipelines practically never have the same one. Names of Services contain its
    first eight digits. `weights` has one element for each stage, or one for all. If `wire_dtype` is None, hidden states have
    the layers' dtype; if `kv_dtype` is None, keys and values have it.
    """
    uniform = len(set(weights)) == 1
    dtypes, digests = (each[0] if uniform else ",".join(each) for each in zip(*weights, strict=True))
    ranges = ",".join(f"{first}:{last}" for first, last in cut)
    text = f"{digests} {ranges} {dtypes} {WIRE_VERSION}" + (f" {wire_dtype}" if wire_dtype else "")
    text += f" kv {kv_dtype}" if kv_dtype else ""
    return hashlib.sha256(text.encode()).hexdigest()[:32]
