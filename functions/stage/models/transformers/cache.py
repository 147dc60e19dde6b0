"""The KV cache of transformers' modules: one cache object for each sequence, under one budget of tokens.

All memory that a sequence reserved is allocated at its first token, so that later steps allocate nothing. Layers with a sliding
window keep the window and at least _GOING_BACK tokens before it, so that a sequence can be truncated by so many.
"""

from collections.abc import Sequence
from typing import Final

import torch
from transformers.cache_utils import Cache, DynamicLayer

from functions.stage.models.kv_cache import KVBudget, KVNeed

_GOING_BACK: Final = 128
_SPARE: Final = 128  # tokens of memory besides: a layer drops its first tokens once for so many new ones


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


class WindowLayer(ReservedLayer):
    """KV of one layer with a sliding window: the tokens from `first` on."""

    is_sliding = True

    def __init__(self, reserved_tokens: int, window: int) -> None:
        """window: tokens that a token attends to, itself included."""
        super().__init__(min(reserved_tokens, _kept_tokens(window)))
        self.window = window
        self.first = 0

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: object, **__: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        held, rows = self.length - self.first, key_states.shape[-2]
        end = held + rows
        if end <= self.reserved_tokens:
            self.keys[:, :, held:end] = key_states
            self.values[:, :, held:end] = value_states
            keys, values = self.keys[:, :, :end], self.values[:, :, :end]
        else:
            keys = torch.cat((self.keys[:, :, :held], key_states), -2)
            values = torch.cat((self.values[:, :, :held], value_states), -2)
            kept = min(end, self.window + _GOING_BACK)
            self.keys[:, :, :kept] = keys[:, :, -kept:]
            self.values[:, :, :kept] = values[:, :, -kept:]
            self.first += end - kept
        self.length += rows
        seen = self.window - 1 + rows
        return keys[:, :, -seen:], values[:, :, -seen:]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        before = min(self.length, self.window - 1)
        return before + query_length, self.length - before


class TransformersKVCache(KVBudget):
    """Implements `KVCache` with one of transformers' cache objects for each sequence."""

    def __init__(self, budget_bytes: int, windows: Sequence[int | None], token_bytes: Sequence[int]) -> None:
        """windows, token_bytes: of each layer: its window in tokens, None if it has none, and its bytes for a token."""
        windowed = sum(bytes for window, bytes in zip(windows, token_bytes, strict=True) if window is not None)
        kept = _kept_tokens(max((window or 0 for window in windows), default=0))
        super().__init__(budget_bytes, KVNeed(sum(token_bytes) - windowed, windowed, kept), _GOING_BACK)
        self._windows = tuple(windows)
        self._caches: dict[int, Cache] = {}

    def reserve(self, tokens: int) -> int:
        handle = super().reserve(tokens)
        self._caches[handle] = Cache(
            layers=[ReservedLayer(tokens) if window is None else WindowLayer(tokens, window) for window in self._windows]
        )
        return handle

    def release(self, handle: int) -> None:
        super().release(handle)
        del self._caches[handle]

    def cache(self, handle: int) -> Cache:
        """The cache object of a sequence for the next pass. All its layers hold `length(handle)` tokens.

        Lengths are set here and not in `truncate`, because a pass that failed half-way has extended some layers only.
        """
        cache, length = self._caches[handle], self.length(handle)
        for layer in cache.layers:
            layer.length = length
            if isinstance(layer, WindowLayer) and length == 0:
                layer.first = 0
        return cache


def _kept_tokens(window: int) -> int:
    return window + _GOING_BACK + _SPARE
