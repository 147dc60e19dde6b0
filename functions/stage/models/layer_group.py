"""What a stage runs: a group of consecutive decoder layers with their KV cache.

Two implementations: `llama` (lean, torch only) and `transformers` (any other family). The engine knows this file only.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import torch

FLOAT_DTYPES: Final = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""The dtypes of a publication whose weights are used as they are."""


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
    """Layers [first_layer, last_layer) of a model. Not thread-safe: the engine's one thread calls it."""

    first_layer: int
    last_layer: int
    num_layers: int
    """Of the whole model: the group is first when first_layer is 0, last when last_layer is num_layers."""
    hidden_size: int
    vocab_size: int
    max_positions: int
    """The model's context, tokens."""
    hidden_dtype: torch.dtype
    """Of hidden states on the wire: float32, bfloat16 or float16."""
    runs_by: str
    """What computes the layers and, where that is not the fastest, why: for people."""

    @property
    def shares_work(self) -> bool:
        """Whether threads of a pass take each other's work, so that one whose core is busy holds up no other."""

    @property
    def kv(self) -> KVCache: ...

    def forward(self, inputs: torch.Tensor, segments: Sequence[Segment]) -> torch.Tensor:
        """Runs all segments, each of another sequence, in one pass and extends their KV by their lengths.

        Tensors go in and come out on the CPU, wherever the layers are. What goes in is only read: it may be the very bytes of
        an event. What comes out is the caller's to keep, no buffer of the group's. Where this raises, the KV of the segments
        may be anything up to their length: the caller truncates.

        inputs: int64 token ids [sum(length)] for the first group, else hidden states [sum(length), hidden_size].
        Returns hidden states [sum(length), hidden_size]; the last group has applied the final norm.
        """

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Last group only: [n, hidden_size] → float32 [n, vocab_size] on the CPU, with the family's scaling and soft cap."""
