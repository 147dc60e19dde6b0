"""The interface of a layer group: consecutive decoder layers with their KV cache.

There are three implementations: `native` (C, no torch), `llama` (torch's operators) and `transformers` (any other family). A
fourth, `sleep`, only simulates the time that passes take. The engine uses only this interface and numpy arrays.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from functions.stage.models.floats import Array, Float32, HiddenDtype
from functions.stage.models.kv_cache import KVBudget
from functions.stage.native.layers import NativeThreads
from storage.loading.weight_loader import RawTensor

KVDtype = Literal["int8"]  # of keys and values, if it is not that of activations


class MissingTensors(Exception):
    """The published model lacks tensors that the layers need. Publish it again from a complete checkpoint."""


@dataclass(frozen=True, slots=True)
class Segment:
    """The new tokens of one sequence in a forward pass.

    There are `length` new tokens. They follow the `position` tokens whose KV the sequence `handle` already holds.
    """

    handle: int
    position: int
    length: int
    is_long: bool = False  # the sequence has more tokens than the group's `short_context`
    draft_tokens: int = 0  # this many tokens at the end may be rejected later; the sequence is then truncated
    adapter: int = 0  # number of its adapter in the group, from 1 on; 0: none
    token_ids: Array | None = None  # int64 [length], for groups that take them besides hidden states


def segments_within(segments: Sequence[Segment], first: int, end: int) -> list[Segment]:
    """Returns the segments of tokens [first, end) of a pass, cut where necessary.

    Tokens are numbered over all segments in order.
    """
    parts: list[Segment] = []
    begin = 0
    for segment in segments:
        low, high = max(begin, first) - begin, min(begin + segment.length, end) - begin
        if low < high:
            drafts = max(0, high - max(low, segment.length - segment.draft_tokens))
            ids = None if segment.token_ids is None else segment.token_ids[low:high]
            parts.append(
                Segment(segment.handle, segment.position + low, high - low, segment.is_long, drafts, segment.adapter, ids)
            )
        begin += segment.length
    return parts


@dataclass(frozen=True, slots=True)
class ColdExperts:
    """Counters of experts that may be dropped from memory and read again.

    found: how often a layer used an expert that was in memory. read: how often a layer had to read one. resident_bytes: size of
    those that are in memory now.
    """

    found: int
    read: int
    resident_bytes: int


@dataclass(frozen=True, slots=True)
class PreparedAdapter:
    """The part of an adapter for the layers of a group, in the form that the group computes with."""

    share: Any
    bytes: int


class LayerGroup(Protocol):
    """Layers [first_layer, last_layer) of a model. Not thread-safe: only one thread at a time may call it."""

    first_layer: int
    last_layer: int
    num_layers: int  # of the whole model; last_layer of the last group equals this
    hidden_size: int  # numbers per token that a group gets if it is not the first; some families pass on several rows
    vocab_size: int
    max_positions: int  # the model's context, tokens
    hidden_dtype: HiddenDtype
    runs_by: str  # for logs: what computes the layers and, if that is not the fastest implementation, why

    @property
    def short_context(self) -> int | None:
        """For LongRoPE: all tokens of a sequence with more tokens than this have other rotations. None for other models."""

    @property
    def takes_token_ids(self) -> bool:
        """Whether layers compute with token ids besides hidden states. If so, segments must have token ids in all stages."""

    @property
    def shares_work(self) -> bool:
        """Whether any thread may call the group, because all calls share one pool of worker threads.

        False for groups that use torch, which starts a pool for each calling thread. Call them from one thread only.
        """

    @property
    def native_threads(self) -> NativeThreads | None:
        """Threads in C that run the group. Between calls of the group they may draw tokens. None if there are none."""

    @property
    def kv(self) -> KVBudget: ...

    def use_threads(self, count: int) -> None:
        """Sets the number of threads that later passes compute with.

        Before the first call, layers in C use one thread, and torch uses its default.
        """

    def prepare_adapter(self, tensors: Mapping[str, RawTensor]) -> PreparedAdapter:
        """Converts the part of an adapter for these layers, for `place_adapter`. Any thread may call this, even during a pass.

        tensors: the adapter's tensors for these layers, from the objects of an `AdapterManifest`. Raises WrongAdapter.
        """

    def place_adapter(self, number: int, prepared: PreparedAdapter | None) -> None:
        """Sets the adapter that segments name by `number`. If `prepared` is None, frees the adapter of that number.

        Numbers begin at 1.
        """

    def forward(self, inputs: Array, segments: Sequence[Segment]) -> Array:
        """Runs all segments in one pass, and extends the KV of each by its length. Each must be of another sequence.

        The group does not write to `inputs`, which may be the bytes of an event. The caller owns the result. If this method
        raises, the KV of a segment may have grown by any part of its length, and the caller must truncate it.

        inputs: int64 token ids [sum(length)] for the first group, else hidden states [sum(length), hidden_size].
        Returns hidden states [sum(length), hidden_size of the next group]. The last group applies the final norm. Their dtype
        is `hidden_dtype`, in the numpy dtype of `floats.DTYPES`: bf16 numbers are bits in uint16.
        """

    def logits(self, hidden: Array) -> Float32:
        """Returns the logits, float32 [n, vocab_size], of hidden states [n, hidden_size] that `forward` returned.

        Logits include the scaling and soft cap that some families apply. Only the last group can compute them.
        """
