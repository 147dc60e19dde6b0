"""The KV cache of layers in torch: one arena of blocks of tokens. A sequence is read in place if its blocks are neighbours.

Time in µs of one layer's attention without its matrices, bf16, 9 heads and 3 KV heads (Xeon with AMX, one thread; docs/log.md
has more):

    sequences, lengths   blocks gathered   blocks that are neighbours
    8, all 128                 216                   239
    8, 64 to 512               694                   371
    16, 64 to 512             1298                   780

So a reservation takes neighbours if there are enough free ones.
"""

from collections.abc import Callable, Iterable
from typing import Final

import numpy as np
import torch

from functions.stage.models.floats import Array
from functions.stage.models.kv_cache import KVArena, KVLayout

_BLOCK_TOKENS: Final = 16  # as many as in a block of a prefix chain


class TorchKVPool(KVArena):
    """A `KVArena` in one tensor [num_layers, 2, num_kv_heads, tokens of all blocks, head_dim]."""

    def __init__(
        self, num_layers: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device, budget_bytes: int
    ) -> None:
        """Raises ValueError if the budget is less than one block."""
        token_bytes = num_layers * 2 * num_kv_heads * head_dim * dtype.itemsize
        super().__init__(budget_bytes, _BLOCK_TOKENS, _BLOCK_TOKENS * token_bytes)
        shape = (num_layers, 2, num_kv_heads, self.capacity_tokens, head_dim)
        self._arena = torch.empty(shape, dtype=dtype, device=device)
        self.device = self._arena.device
        kind = f"torch {str(dtype).removeprefix('torch.')} {self.device.type}"
        self.layout = KVLayout(kind, num_layers, num_kv_heads, head_dim * dtype.itemsize, _BLOCK_TOKENS)

    def slots(self, spans: Iterable[tuple[int, int, int]]) -> torch.Tensor:
        """Returns the arena indexes, int64 [n], of all tokens of the spans. A span is (handle, first token, end token)."""
        return torch.from_numpy(np.concatenate([self._slots(*span) for span in spans])).to(self.device)

    def write(self, layer: int, slots: torch.Tensor, keys_and_values: torch.Tensor) -> None:
        """Writes keys and values [n, 2, num_kv_heads, head_dim] of one layer to the arena, at the indexes `slots` [n]."""
        self._arena[layer].index_copy_(2, slots, keys_and_values.permute(1, 2, 0, 3))

    def reader(self, handle: int, first: int, last: int) -> Callable[[int], tuple[torch.Tensor, torch.Tensor]]:
        """Returns a function that takes a layer and returns its keys and values of a sequence's tokens [first, last).

        Keys and values have the shape [num_kv_heads, 1, last - first, head_dim]. The function reads them when it is called.
        """
        slots = self._slots(handle, first, last)
        if slots[-1] - slots[0] == last - first - 1:
            views = self._arena.narrow(3, int(slots[0]), last - first).unsqueeze(3).flatten(0, 1).unbind(0)
            return list(zip(views[::2], views[1::2], strict=True)).__getitem__
        places = torch.from_numpy(slots).to(self.device)

        def gathered(layer: int) -> tuple[torch.Tensor, torch.Tensor]:
            keys, values = self._arena[layer].index_select(2, places).unsqueeze(2).unbind(0)
            return keys, values

        return gathered

    def copy_out(self, handle: int, first: int, target: Array, *, windowed: bool = False) -> None:
        if not windowed:
            places = torch.from_numpy(self._slots(handle, first, first + target.shape[3])).to(self.device)
            for layer, own in zip(self._arena, target, strict=True):
                own[...] = layer.index_select(2, places).view(torch.uint8).cpu().numpy()

    def copy_in(self, handle: int, first: int, source: Array, *, windowed: bool = False) -> None:
        if not windowed:
            places = torch.from_numpy(self._slots(handle, first, first + source.shape[3])).to(self.device)
            for layer, own in zip(self._arena, source, strict=True):
                numbers = torch.from_numpy(np.ascontiguousarray(own)).view(layer.dtype)
                layer.index_copy_(2, places, numbers.to(self.device))

    def _slots(self, handle: int, first: int, last: int) -> Array:
        tokens = np.arange(first, last)
        slots: Array = self.tables[handle][0, tokens // _BLOCK_TOKENS].astype(np.int64) * _BLOCK_TOKENS + tokens % _BLOCK_TOKENS
        return slots

    def _copy_blocks(self, sources: Array, targets: Array) -> None:
        read, written = (torch.from_numpy(numbers.astype(np.int64)).to(self.device) for numbers in (sources, targets))
        for layer in self._arena:
            blocks = layer.view(*layer.shape[:2], -1, _BLOCK_TOKENS, layer.shape[-1])
            blocks.index_copy_(2, written, blocks.index_select(2, read))
