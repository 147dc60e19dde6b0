"""The interface of a layer group: consecutive decoder layers with their KV cache.

Three implementations: `native` (C, no torch), `llama` (torch's operators) and `transformers` (any other family). The engine
knows this interface and numpy arrays, and nothing of an implementation.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from functions.stage.models.floats import Array, Float32, HiddenDtype


class KVCacheFull(Exception):
    """A reservation does not fit into the KV budget. Retry after other sequences have ended."""

    def __init__(self, wanted_tokens: int, free_tokens: int) -> None:
        super().__init__(f"{wanted_tokens} tokens wanted, {free_tokens} free")
        self.wanted_tokens = wanted_tokens
        self.free_tokens = free_tokens


class MissingTensors(Exception):
    """The publication lacks tensors that the layers need. Publish the model again from a complete checkpoint."""


class KVCache(Protocol):
    """Keys and values of many sequences under one byte budget. Handles are small integers, reused after release."""

    capacity_tokens: int
    free_tokens: int  # that can still be reserved

    @property
    def resident_bytes(self) -> int:
        """Memory that has ever been used, and so belongs to the process; 0: unknown. Any thread may ask."""

    def reserve(self, tokens: int) -> int:
        """A handle with memory for `tokens`. Raises KVCacheFull."""

    def reserved(self, handle: int) -> int: ...

    def length(self, handle: int) -> int:
        """Tokens held."""

    def truncate(self, handle: int, length: int) -> None:
        """Drops tokens beyond `length`."""

    def release(self, handle: int) -> None: ...


@dataclass(frozen=True, slots=True)
class Segment:
    """`length` new tokens of the sequence with `handle`, whose KV holds exactly `position` tokens."""

    handle: int
    position: int
    length: int


class LayerGroup(Protocol):
    """Layers [first_layer, last_layer) of a model. Not thread-safe: the engine calls it from one thread at a time."""

    first_layer: int
    last_layer: int
    num_layers: int  # of the whole model: the first group has first_layer 0, the last one last_layer num_layers
    hidden_size: int
    vocab_size: int
    max_positions: int  # the model's context, tokens
    hidden_dtype: HiddenDtype
    runs_by: str  # for people: what computes the layers and, if that is not the fastest, why

    @property
    def shares_work(self) -> bool:
        """True if the group has one pool of threads for all callers, which take work from each other. Torch's operators have a
        pool for each thread that calls them."""

    @property
    def kv(self) -> KVCache: ...

    def use_threads(self, count: int) -> None:
        """Sets the number of threads of later passes. The default is one, or torch's own."""

    def forward(self, inputs: Array, segments: Sequence[Segment]) -> Array:
        """Runs all segments, each of another sequence, in one pass, and extends their KV by their lengths.

        The group only reads `inputs`, which may be the bytes of an event. The caller owns the result. If this raises, the KV of
        a segment may have grown by any part of its length: the caller truncates.

        inputs: int64 token ids [sum(length)] for the first group, else hidden states [sum(length), hidden_size].
        Returns hidden states [sum(length), hidden_size], with the final norm applied by the last group. Hidden states have
        `hidden_dtype`, stored as `floats.DTYPES` says: bf16 is its bits in uint16.
        """

    def logits(self, hidden: Array) -> Float32:
        """For the last group only: [n, hidden_size] → float32 [n, vocab_size], with the family's scaling and soft cap."""
