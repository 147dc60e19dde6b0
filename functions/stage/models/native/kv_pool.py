"""The KV arena of layers in C. Within a block, its bytes have the order in which C reads them (`c/native.h`)."""

from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from functions.stage.models.floats import Array
from functions.stage.models.kv_cache import KVArena, KVLayout
from functions.stage.native.limits import SCALE_BYTES, padded_head
from functions.stage.native.records import BLOCK_TOKENS, PAGE_TOKENS, Dtype
from storage.loading.memory import new_memory, resident_bytes

_NUMBER_BYTES: Final = {Dtype.BF16: 2, Dtype.F32: 4, Dtype.INT8: 1}


class NativeKVPool(KVArena):
    """Implements `KVCache`. A block is a page of one layer: the keys and then the values of PAGE_TOKENS tokens.

    It takes physical memory only for what has been written to.
    """

    def __init__(
        self,
        windows: Sequence[int | None],
        num_kv_heads: int,
        head_dim: int,
        dtype: Dtype,
        budget_bytes: int,
        written_by: str = "",
    ) -> None:
        """windows: of each layer, in tokens; None: it attends to all. dtype: of keys and values, BF16, F32 or INT8.

        written_by: names dtypes and the CPU level, on which the KV's bits depend: only pools with the same name exchange KV.
        Raises ValueError if the budget is less than one page of tokens.
        """
        head_bytes = padded_head(head_dim) * _NUMBER_BYTES[dtype] + (SCALE_BYTES if dtype is Dtype.INT8 else 0)
        page_bytes = 2 * num_kv_heads * PAGE_TOKENS * head_bytes
        super().__init__(budget_bytes, PAGE_TOKENS, page_bytes, windows)
        self.layout = KVLayout(
            f"native {written_by}",
            self.need.units,
            num_kv_heads,
            head_bytes,
            BLOCK_TOKENS,
            self.need.windowed_units,
            self.window,
        )
        memory = new_memory(self.free_units * page_bytes)
        shape = (self.free_units, 2, num_kv_heads, PAGE_TOKENS // BLOCK_TOKENS, BLOCK_TOKENS * head_bytes)
        self.arena: Array = np.frombuffer(memory, np.uint8).reshape(shape)

    @property
    def resident_bytes(self) -> int:
        return resident_bytes(self.arena.ctypes.data, self.arena.nbytes)

    def copy_out(self, handle: int, first: int, target: Array, *, windowed: bool = False) -> None:
        blocks = target.reshape(*target.shape[:3], target.shape[3] // BLOCK_TOKENS, self.arena.shape[-1])
        for row, own in zip(np.flatnonzero(self.windowed == windowed), blocks, strict=True):
            pages, places = self._places(handle, row, first, own.shape[2])
            own[...] = self.arena[pages, :, :, places].transpose(1, 2, 0, 3)

    def copy_in(self, handle: int, first: int, source: Array, *, windowed: bool = False) -> None:
        blocks = source.reshape(*source.shape[:3], source.shape[3] // BLOCK_TOKENS, self.arena.shape[-1])
        for row, own in zip(np.flatnonzero(self.windowed == windowed), blocks, strict=True):
            pages, places = self._places(handle, row, first, own.shape[2])
            self.arena[pages, :, :, places] = own.transpose(2, 0, 1, 3)

    def _places(self, handle: int, layer: Any, first: int, blocks: int) -> tuple[Array, Array]:
        """Page of the arena, and place in it, of `blocks` blocks of BLOCK_TOKENS tokens, from token `first` on."""
        pages, places = np.divmod(np.arange(blocks) + first // BLOCK_TOKENS, PAGE_TOKENS // BLOCK_TOKENS)
        if self.windowed[layer]:
            pages %= self.need.ring_blocks
        return self.table(handle)[layer, pages], places

    def _copy_blocks(self, sources: Array, targets: Array) -> None:
        self.arena[targets] = self.arena[sources]
