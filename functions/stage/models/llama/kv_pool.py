"""The KV cache of torch's operators: one arena of tokens, in which every sequence has a contiguous range.

Ranges, rather than slots of one size or pages, because of what attention of one layer takes besides its matrices: bf16, 9 heads
on 3, in µs (Xeon with AMX, one thread; docs/log.md has more):

    sequences, lengths   slots of one size, masked   pages gathered   a range each
    8, all 128                      150                    216             239
    8, 64 to 512                    508                    694             371
    16, 64 to 512                  1241                   1298             780

Pages must be gathered for torch's attention, which costs more than they save. Slots win if all lengths are alike, and lose if
they are ragged, even without counting the memory of their padding: a slot is as long as the longest sequence may become. Ranges
(`kv_cache`) waste nothing.
"""

from collections.abc import Iterable

import numpy as np
import torch

from functions.stage.models.floats import Array
from functions.stage.models.kv_cache import KVLayout, KVRanges


class TorchKVPool(KVRanges):
    """Implements `KVCache`. Memory is one tensor [num_layers, 2, num_kv_heads, capacity_tokens, head_dim]."""

    def __init__(
        self, num_layers: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device, budget_bytes: int
    ) -> None:
        """Raises ValueError if the budget is less than one token."""
        super().__init__(budget_bytes, num_layers, 2 * num_kv_heads * head_dim * dtype.itemsize)
        self._arena = torch.empty((num_layers, 2, num_kv_heads, self.capacity_tokens, head_dim), dtype=dtype, device=device)
        self.layers = self._arena.unbind(0)
        self.device = self._arena.device
        kind = f"torch {str(dtype).removeprefix('torch.')} {self.device.type}"
        self.layout = KVLayout(kind, num_layers, num_kv_heads, head_dim * dtype.itemsize)

    def slots(self, spans: Iterable[tuple[int, int, int]]) -> torch.Tensor:
        """Indexes in the arena, int64, of the tokens of all spans (handle, first token, end)."""
        places = [
            place for handle, first, last in spans for place in range(self._starts[handle] + first, self._starts[handle] + last)
        ]
        return torch.tensor(places, dtype=torch.int64, device=self._arena.device)

    def write(self, layer: int, slots: torch.Tensor, keys_and_values: torch.Tensor) -> None:
        """Writes [n, 2, num_kv_heads, head_dim] of one layer to `slots` [n]."""
        self.layers[layer].index_copy_(2, slots, keys_and_values.permute(1, 2, 0, 3))

    def read(self, handle: int, first: int, last: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Views of keys and values [num_kv_heads, 1, last - first, head_dim] of tokens [first, last), for each layer."""
        tokens = self._arena.narrow(3, self._starts[handle] + first, last - first)
        views = tokens.unsqueeze(3).flatten(0, 1).unbind(0)
        return list(zip(views[::2], views[1::2], strict=True))

    def _as_bytes(self, part: torch.Tensor) -> Array:
        array: Array = part.view(torch.uint8).cpu().numpy()
        return array

    def _put_bytes(self, part: torch.Tensor, source: Array) -> None:
        part.view(torch.uint8).copy_(torch.from_numpy(np.ascontiguousarray(source)))

    def new_buffer(self, tokens: int) -> torch.Tensor:
        return torch.empty_like(self.layers[0][:, :, :tokens])
