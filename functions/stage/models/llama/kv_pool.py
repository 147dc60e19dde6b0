"""The KV cache of layers in torch: one arena of tokens, in which every sequence has a contiguous range.

The table shows why it has ranges rather than slots of one size or pages: µs for the attention of one layer without its
matrices, bf16, 9 heads and 3 KV heads (Xeon with AMX, one thread; docs/log.md has more):

    sequences, lengths   slots of one size, masked   pages gathered   a range each
    8, all 128                      150                    216             239
    8, 64 to 512                    508                    694             371
    16, 64 to 512                  1241                   1298             780

Pages must be gathered for torch's attention, which costs more time than they save. Slots are fastest if all sequences are
equally long. Otherwise they are slower, and waste memory: a slot is as long as the longest sequence may become. Ranges
(`kv_cache`) waste none.
"""

from collections.abc import Iterable

import numpy as np
import torch

from functions.stage.models.floats import Array
from functions.stage.models.kv_cache import KVLayout, KVRanges


class TorchKVPool(KVRanges):
    """Implements `KVCache`. The arena is one tensor [num_layers, 2, num_kv_heads, capacity_tokens, head_dim]."""

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
        """Indexes in the arena, int64 [n], of all tokens of the spans. A span is (handle, first token, end token)."""
        places = [
            place for handle, first, last in spans for place in range(self._starts[handle] + first, self._starts[handle] + last)
        ]
        return torch.tensor(places, dtype=torch.int64, device=self._arena.device)

    def write(self, layer: int, slots: torch.Tensor, keys_and_values: torch.Tensor) -> None:
        """Writes keys and values [n, 2, num_kv_heads, head_dim] of one layer to the arena, at the indexes `slots` [n]."""
        self.layers[layer].index_copy_(2, slots, keys_and_values.permute(1, 2, 0, 3))

    def read(self, handle: int, first: int, last: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """For each layer, the keys and the values of a sequence's tokens [first, last).

        They are views of the arena: [num_kv_heads, 1, last - first, head_dim].
        """
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
