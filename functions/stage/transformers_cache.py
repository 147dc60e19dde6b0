"""KV of many sequences as transformers' modules want it: one cache object per sequence, under one budget of tokens.

A sequence's memory is allocated in full when its first token comes, so a reservation never runs out and a step copies
nothing. Layers with a sliding window keep everything too: the mask applies the window, and rolling back stays exact.
"""

import heapq
from dataclasses import dataclass, field

import torch
from transformers.cache_utils import Cache, DynamicLayer

from functions.stage.layer_group import KVCacheFull


class ReservedLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values of one layer and one sequence: [1, heads, reserved tokens, head size], filled up to `length`."""

    def __init__(self, reserved_tokens: int) -> None:
        super().__init__()
        self.reserved_tokens = reserved_tokens
        self.length = 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys = self._allocate(key_states)
        self.values = self._allocate(value_states)
        self.is_initialized = True

    def _allocate(self, like: torch.Tensor) -> torch.Tensor:
        batch, heads, _, head_size = like.shape
        return like.new_empty(batch, heads, self.reserved_tokens, head_size)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: object, **__: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        end = self.length + key_states.shape[-2]
        self.keys[:, :, self.length : end] = key_states
        self.values[:, :, self.length : end] = value_states
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def get_seq_length(self) -> int:
        return self.length


@dataclass(slots=True)
class _Sequence:
    reserved_tokens: int
    layers: list[ReservedLayer]
    cache: Cache = field(init=False)

    def __post_init__(self) -> None:
        self.cache = Cache(layers=self.layers)


class TransformersKVCache:
    """A `KVCache` of `capacity_tokens` for a group of `num_layers` layers."""

    def __init__(self, capacity_tokens: int, num_layers: int) -> None:
        self._capacity_tokens = capacity_tokens
        self._num_layers = num_layers
        self._reserved_tokens = 0
        self._sequences: dict[int, _Sequence] = {}
        self._released: list[int] = []

    @property
    def capacity_tokens(self) -> int:
        return self._capacity_tokens

    @property
    def free_tokens(self) -> int:
        return self._capacity_tokens - self._reserved_tokens

    def reserve(self, tokens: int) -> int:
        if tokens > self.free_tokens:
            raise KVCacheFull(tokens, self.free_tokens)
        handle = heapq.heappop(self._released) if self._released else len(self._sequences)
        self._sequences[handle] = _Sequence(tokens, [ReservedLayer(tokens) for _ in range(self._num_layers)])
        self._reserved_tokens += tokens
        return handle

    def reserved(self, handle: int) -> int:
        return self._sequences[handle].reserved_tokens

    def length(self, handle: int) -> int:
        # The shortest layer: a pass that failed half-way has extended some layers and not others.
        return min(layer.length for layer in self._sequences[handle].layers)

    def truncate(self, handle: int, length: int) -> None:
        for layer in self._sequences[handle].layers:
            layer.length = min(layer.length, length)

    def release(self, handle: int) -> None:
        self._reserved_tokens -= self._sequences.pop(handle).reserved_tokens
        heapq.heappush(self._released, handle)

    def cache(self, handle: int) -> Cache:
        """What transformers' modules take as `past_key_values`."""
        return self._sequences[handle].cache
