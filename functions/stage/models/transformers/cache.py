"""The KV cache of transformers' modules: one cache object for each sequence, under one budget of tokens.

All memory that a sequence reserved is allocated at its first token, so that no later step allocates or copies. Layers with a
sliding window keep all tokens too: the mask applies the window, and truncation stays exact.
"""

import torch
from transformers.cache_utils import Cache, DynamicLayer

from functions.stage.models.kv_cache import KVBudget


class ReservedLayer(DynamicLayer):  # type: ignore[misc]
    """KV of one layer and one sequence: [1, heads, reserved tokens, head size], of which the first `length` are held."""

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


class TransformersKVCache(KVBudget):
    """Implements `KVCache` with one of transformers' cache objects for each sequence."""

    def __init__(self, capacity_tokens: int, num_layers: int) -> None:
        super().__init__(capacity_tokens)
        self._num_layers = num_layers
        self._caches: dict[int, Cache] = {}

    def reserve(self, tokens: int) -> int:
        handle = super().reserve(tokens)
        self._caches[handle] = Cache(layers=[ReservedLayer(tokens) for _ in range(self._num_layers)])
        return handle

    def release(self, handle: int) -> None:
        super().release(handle)
        del self._caches[handle]

    def cache(self, handle: int) -> Cache:
        """The cache object of a sequence for the next pass. All its layers hold `length(handle)` tokens.

        Lengths are set here and not in `truncate`, because a pass that failed half-way has extended some layers only.
        """
        cache = self._caches[handle]
        for layer in cache.layers:
            layer.length = self.length(handle)
        return cache
