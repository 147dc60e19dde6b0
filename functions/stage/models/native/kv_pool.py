"""The KV arena of layers in C. Within a block of tokens, its bytes have the order in which C reads them (`c/native.h`)."""

from typing import Final

import numpy as np

from functions.stage.models.floats import Array
from functions.stage.models.kv_cache import KVLayout, KVRanges
from functions.stage.native.limits import padded_head
from functions.stage.native.records import BLOCK_TOKENS, Dtype
from storage.loading.memory import new_memory, resident_bytes

_NUMPY_DTYPES: Final = {Dtype.BF16: np.uint16, Dtype.F32: np.float32}


class NativeKVPool(KVRanges):
    """Implements `KVCache`. The arena is one array [num_layers, 2, num_kv_heads, capacity_tokens, padded head_dim].

    It takes physical memory only for pages that have been written to.
    """

    def __init__(
        self, num_layers: int, num_kv_heads: int, head_dim: int, dtype: Dtype, budget_bytes: int, written_by: str = ""
    ) -> None:
        """dtype: of keys and values, BF16 or F32.

        written_by: names the publication's dtype and the CPU level, on which the KV's bits depend: only pools with the same
        name exchange KV. Raises ValueError if the budget is less than one block of tokens.
        """
        numbers = np.dtype(_NUMPY_DTYPES[dtype])
        super().__init__(budget_bytes, num_layers, 2 * num_kv_heads * padded_head(head_dim) * numbers.itemsize, BLOCK_TOKENS)
        shape = (num_layers, 2, num_kv_heads, self.capacity_tokens, padded_head(head_dim))
        memory = new_memory(self.bytes_per_token * self.capacity_tokens)
        self.layout = KVLayout(f"native {written_by}", num_layers, num_kv_heads, shape[-1] * numbers.itemsize, BLOCK_TOKENS)
        self._arena = np.frombuffer(memory, numbers).reshape(shape)
        self.layers: list[Array] = list(self._arena)

    @property
    def resident_bytes(self) -> int:
        return resident_bytes(self._arena.ctypes.data, self._arena.nbytes)

    def _as_bytes(self, part: Array) -> Array:
        return part.view(np.uint8)

    def _put_bytes(self, part: Array, source: Array) -> None:
        part.view(np.uint8)[...] = source

    def new_buffer(self, tokens: int) -> Array:
        return np.empty_like(self.layers[0][:, :, :tokens])
