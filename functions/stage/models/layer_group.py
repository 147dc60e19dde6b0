"""What a stage runs: a group of consecutive decoder layers with their KV cache.

Three implementations: `native` (C, no torch), `llama` (torch's operators) and `transformers` (any other family). The engine
knows this file only, and numpy: what is behind a group's border is its own business.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from functions.stage.models.floats import Array, Float32, HiddenDtype


class KVCacheFull(Exception):
    """A reservation does not fit into the KV budget. Retrying helps once other sequences end."""

    def __init__(self, wanted_tokens: int, free_tokens: int) -> None:
        super().__init__(f"{wanted_tokens} tokens wanted, {free_tokens} free")
        self.wanted_tokens = wanted_tokens
        self.free_tokens = free_tokens


class MissingTensors(Exception):
    """The published tensors are not those that the layers need. Publish the model again from a complete checkpoint."""


class KVCache(Protocol):
    """Keys and values of many sequences under one byte budget. Handles are small integers, reused after release."""

    @property
    def capacity_tokens(self) -> int: ...

    @property
    def free_tokens(self) -> int:
        """Tokens that can still be reserved."""

    @property
    def resident_bytes(self) -> int:
        """How much of its memory has ever been used, and is the process's since; 0 where that is not known. Any thread's."""

    def reserve(self, tokens: int) -> int:
        """A handle with room for `tokens`, which can never run out. Raises KVCacheFull."""

    def reserved(self, handle: int) -> int: ...

    def length(self, handle: int) -> int:
        """Tokens held."""

    def truncate(self, handle: int, length: int) -> None:
        """Drops what lies beyond `length`."""

    def release(self, handle: int) -> None: ...


@dataclass(frozen=True, slots=True)
class Segment:
    """`length` new tokens of the sequence behind `handle`, whose KV holds exactly `position` tokens."""

    handle: int
    position: int
    length: int


class LayerGroup(Protocol):
    """Layers [first_layer, last_layer) of a model. Not thread-safe: the engine calls it from one thread at a time."""

    first_layer: int
    last_layer: int
    num_layers: int
    """Of the whole model: the group is first when first_layer is 0, last when last_layer is num_layers."""
    hidden_size: int
    vocab_size: int
    max_positions: int
    """The model's context, tokens."""
    hidden_dtype: HiddenDtype
    runs_by: str
    """What computes the layers and, where that is not the fastest, why: for people."""

    @property
    def shares_work(self) -> bool:
        """Whether threads of a pass take each other's work, so that one whose core is busy holds up no other. They are the
        group's, whoever calls; torch's operators have some for each thread that calls."""

    @property
    def kv(self) -> KVCache: ...

    def use_threads(self, count: int) -> None:
        """How many compute from here on; one until it is said, but for torch's operators, which have a number of their own."""

    def forward(self, inputs: Array, segments: Sequence[Segment]) -> Array:
        """Runs all segments, each of another sequence, in one pass and extends their KV by their lengths.

        Arrays go in and come out wherever the layers are. What goes in is only read: it may be the very bytes of an event. What
        comes out is the caller's to keep, no buffer of the group's. Where this raises, the KV of the segments may be anything
        up to their length: the caller truncates.

        inputs: int64 token ids [sum(length)] for the first group, else hidden states [sum(length), hidden_size].
        Returns hidden states [sum(length), hidden_size]; the last group has applied the final norm. Hidden states are of
        `hidden_dtype`, as `floats.DTYPES` has it: bf16 is its bits in uint16.
        """

    def logits(self, hidden: Array) -> Float32:
        """Last group only: [n, hidden_size] → float32 [n, vocab_size], with the family's scaling and soft cap."""
