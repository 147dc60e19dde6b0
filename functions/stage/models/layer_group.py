"""The interface of a layer group: consecutive decoder layers with their KV cache.

It has three implementations: `native` (C, no torch), `llama` (torch's operators) and `transformers` (any other family); a
fourth, `sleep`, only simulates one. The engine uses this interface and numpy arrays only.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from functions.stage.models.floats import Array, Float32, HiddenDtype
from functions.stage.models.kv_cache import KVBudget
from functions.stage.native.layers import NativeThreads
from storage.loading.weight_loader import RawTensor

KVDtype = Literal["int8"]  # of keys and values, if it is not that of activations
KVCache = KVBudget


class MissingTensors(Exception):
    """The publication lacks tensors that the layers need. Publish the model again from a complete checkpoint."""


@dataclass(frozen=True, slots=True)
class Segment:
    """One sequence's tokens in a forward pass: `length` new ones, after the `position` tokens whose KV `handle` holds."""

    handle: int
    position: int
    length: int
    is_long: bool = False  # the sequence has more tokens than the group's `short_context`
    draft_tokens: int = 0  # the last so many of them may be rejected: the sequence is truncated then
    adapter: int = 0  # number of its adapter in the group, from 1 on; 0: none
    token_ids: Array | None = None  # int64 [length], for groups that take them besides hidden states


def segments_within(segments: Sequence[Segment], first: int, end: int) -> list[Segment]:
    """The segments, or parts of them, of tokens [first, end) of the pass. Tokens are counted over all segments in order."""
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
    """Experts that need not stay in memory: how often a layer found one there or read it, and the bytes of those there now."""

    found: int
    read: int
    resident_bytes: int


@dataclass(frozen=True, slots=True)
class PreparedAdapter:
    """An adapter's share of a group's layers, in the form that the group computes with."""

    share: Any
    bytes: int


class LayerGroup(Protocol):
    """Layers [first_layer, last_layer) of a model. Not thread-safe: only one thread at a time may call it."""

    first_layer: int
    last_layer: int
    num_layers: int  # of the whole model: the first group has first_layer 0, the last one last_layer num_layers
    hidden_size: int  # numbers of a token that come in, unless the group is the first; some families pass on more than one row
    vocab_size: int
    max_positions: int  # the model's context, tokens
    hidden_dtype: HiddenDtype
    runs_by: str  # for logs: what computes the layers and, if that is not the fastest implementation, why

    @property
    def short_context(self) -> int | None:
        """With LongRoPE: sequences of more tokens have other rotations, from their first token on. None: no such bound."""

    @property
    def takes_token_ids(self) -> bool:
        """True if layers compute with token ids besides hidden states: then segments must have them in all stages."""

    @property
    def shares_work(self) -> bool:
        """True if calls from different threads share one pool of worker threads, so that any thread may call the group.

        Torch's operators start a pool for each thread that calls them; such a group is called from one thread only.
        """

    @property
    def native_threads(self) -> NativeThreads | None:
        """Threads in C that help the group, and between its calls may help to draw tokens. None: it has none."""

    @property
    def kv(self) -> KVBudget: ...

    def use_threads(self, count: int) -> None:
        """Sets the number of threads that later passes compute with.

        Before the first call it is one; with torch, torch's default.
        """

    def prepare_adapter(self, tensors: Mapping[str, RawTensor]) -> PreparedAdapter:
        """Converts an adapter's share of these layers for `place_adapter`. Any thread may call it, also during a pass.

        tensors: of the layers' objects of an `AdapterManifest`. Raises WrongAdapter.
        """

    def place_adapter(self, number: int, prepared: PreparedAdapter | None) -> None:
        """Makes an adapter the one that segments name by `number`, from 1 on; None: frees the memory of that number."""

    def forward(self, inputs: Array, segments: Sequence[Segment]) -> Array:
        """Runs all segments, each of another sequence, in one pass, and extends their KV by their lengths.

        The group only reads `inputs`, which may be the bytes of an event. The caller owns the result. If this raises, the KV of
        a segment may have grown by any part of its length: the caller must truncate it.

        inputs: int64 token ids [sum(length)] for the first group, else hidden states [sum(length), hidden_size].
        Returns hidden states [sum(length), next group's hidden_size], with the final norm applied by the last group. They have
        `hidden_dtype`, stored as `floats.DTYPES` says: bf16 is its bits in uint16.
        """

    def logits(self, hidden: Array) -> Float32:
        """The logits of hidden states that `forward` returned: [n, hidden_size] → float32 [n, vocab_size]. Last group only.

        They include the scaling and soft cap that some families apply.
        """
