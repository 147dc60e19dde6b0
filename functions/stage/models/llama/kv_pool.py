"""The KV cache of a lean layer group: one arena of tokens, in which every sequence has a contiguous range.

Why ranges, and neither slots of one size nor pages. Attention of one layer beside its matrices, bf16, 9 heads on 3, µs
(Xeon with AMX, one thread; `bench/stage/kernels.py` measures it, docs/experiments.md has more):

    sequences, lengths   slots of one size, masked   pages gathered   a range each
    8, all 128                      150                    216             239
    8, 64 to 512                    508                    694             371
    16, 64 to 512                  1241                   1298             780

Pages must be copied together for torch's attention, which costs more than it saves. Slots win while all lengths are
alike, and lose with ragged ones even before their padding (a slot is as long as the longest sequence may get) is paid
for in memory. Ranges waste nothing: a reservation takes exactly its tokens. They fragment, so a reservation that no
hole can take makes the pool move sequences together first; what is free can always be reserved.
"""

from collections.abc import Iterable
from typing import Final

import torch

from functions.stage.models.kv_budget import KVBudget
from functions.stage.native.records import BLOCK_TOKENS, padded_head

_MOVED_AT_ONCE: Final = 2**20
"""Bytes of a layer that pass through a buffer while ranges are moved, as far as one token has not more."""


class KVPool(KVBudget):
    """Implements `KVCache`. Memory is one tensor [num_layers, 2, num_kv_heads, capacity_tokens, head_dim]."""

    def __init__(
        self,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        budget_bytes: int,
        block_tokens: int = 1,
    ) -> None:
        """block_tokens: that ranges are rounded up to. Raises ValueError where the budget holds not even one block."""
        self.bytes_per_token = num_layers * 2 * num_kv_heads * head_dim * dtype.itemsize
        super().__init__(budget_bytes // self.bytes_per_token, block_tokens)
        if self.capacity_tokens < 1:
            of_tokens = "token" if block_tokens == 1 else f"{block_tokens} tokens"
            raise ValueError(
                f"a KV budget of {budget_bytes} bytes holds no {of_tokens} of {self.bytes_per_token} bytes: raise it"
            )
        self._arena = torch.empty((num_layers, 2, num_kv_heads, self.capacity_tokens, head_dim), dtype=dtype, device=device)
        self._layers = self._arena.unbind(0)
        self.num_layers = num_layers
        self.dtype = dtype
        self._starts: dict[int, int] = {}

    @property
    def device(self) -> torch.device:
        return self._arena.device

    def reserve(self, tokens: int) -> int:
        """Takes up to some milliseconds where sequences must be moved together first.

        Where moving fails, nothing is reserved, and a sequence that was being moved holds nothing any more.
        """
        handle = super().reserve(tokens)
        try:
            start = self._hole(self.taken(tokens))
            self._starts[handle] = self._compact() if start is None else start
        except BaseException:
            super().release(handle)
            raise
        return handle

    def release(self, handle: int) -> None:
        super().release(handle)
        del self._starts[handle]

    def arena(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """All keys and all values of a layer, [num_kv_heads, capacity_tokens, head_dim] each: views."""
        keys, values = self._layers[layer].unbind(0)
        return keys, values

    def start(self, handle: int) -> int:
        """Where in the arena a sequence's tokens begin."""
        return self._starts[handle]

    def slots(self, spans: Iterable[tuple[int, int, int]]) -> torch.Tensor:
        """Places in the arena, int64, of spans (handle, first token, one behind the last token), one after the other."""
        places = [
            place for handle, first, last in spans for place in range(self._starts[handle] + first, self._starts[handle] + last)
        ]
        return torch.tensor(places, dtype=torch.int64, device=self._arena.device)

    def write(self, layer: int, slots: torch.Tensor, keys_and_values: torch.Tensor) -> None:
        """Puts [n, 2, num_kv_heads, head_dim] of one layer at `slots` [n]."""
        self._layers[layer].index_copy_(2, slots, keys_and_values.permute(1, 2, 0, 3))

    def read(self, handle: int, first: int, last: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Per layer, keys and values [num_kv_heads, 1, last - first, head_dim] of tokens [first, last): views."""
        tokens = self._arena.narrow(3, self._starts[handle] + first, last - first)
        views = tokens.unsqueeze(3).flatten(0, 1).unbind(0)
        return list(zip(views[::2], views[1::2], strict=True))

    def _hole(self, tokens: int) -> int | None:
        """First fit: where the first hole of enough tokens begins."""
        end = 0
        for handle, start in self._by_start():
            if start - end >= tokens:
                return end
            end = start + self.taken(self.reserved(handle))
        return end if self.capacity_tokens - end >= tokens else None

    def _compact(self) -> int:
        """Moves all ranges to the front; where the free rest begins. Copies only what is held.

        All memory that it takes is there before the first range moves. A range counts as empty until it has arrived in all
        layers: a copy that fails half-way leaves a sequence that answers miss, never one with wrong keys and values.
        """
        buffer = self._buffer()
        end = 0
        for handle, start in self._by_start():
            if start != end:
                held = self.length(handle)
                self.truncate(handle, 0)
                self._move(start, end, self.taken(held), buffer)
                self._starts[handle] = end
                self.extend(handle, held)
            end += self.taken(self.reserved(handle))
        return end

    def _buffer(self) -> torch.Tensor:
        """[2, num_kv_heads, tokens, head_dim] for some tokens of one layer."""
        keys_and_values = self._layers[0]
        token_bytes = self.bytes_per_token // self.num_layers
        return torch.empty_like(keys_and_values[:, :, : max(1, _MOVED_AT_ONCE // token_bytes)])

    def _move(self, source: int, target: int, tokens: int, buffer: torch.Tensor) -> None:
        """Part after part, front to back, because source and target may overlap."""
        for layer in self._layers:
            for done in range(0, tokens, buffer.shape[2]):
                part = buffer[:, :, : min(buffer.shape[2], tokens - done)]
                part.copy_(layer.narrow(2, source + done, part.shape[2]))
                layer.narrow(2, target + done, part.shape[2]).copy_(part)

    def _by_start(self) -> list[tuple[int, int]]:
        return sorted(self._starts.items(), key=lambda item: item[1])


def in_blocks(
    num_layers: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device, budget_bytes: int
) -> KVPool:
    """A pool for native layers, which lay out each block of tokens as they read it (`native/c/native.h`)."""
    return KVPool(num_layers, num_kv_heads, padded_head(head_dim), dtype, device, budget_bytes, BLOCK_TOKENS)
