"""The KV cache of a lean layer group: one arena of tokens, in which every sequence has a contiguous range.

Why ranges, and neither slots of one size nor pages. Attention of one layer, bf16, 16 sequences, 9 heads on 3, µs
(Xeon with AMX, one thread; `bench/stage_kernels.py` and docs/experiments.md have the rest):

    lengths        slots of one size, masked   pages gathered   a range each
    all 128                 127                     245              279
    all 512                 597                    1168              753
    64 to 512               599                    1113              484

Pages must be copied together for torch's attention, which costs more than the attention itself. Slots win while all
lengths are alike, and lose with ragged ones even before their padding (a slot is as long as the longest sequence
may get) is paid for in memory. Ranges waste nothing: a reservation takes exactly its tokens. They fragment, so a
reservation that no hole can take makes the pool move sequences together first; what is free can always be reserved.
"""

from bisect import insort
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from functions.stage.layer_group import KVCacheFull


@dataclass(slots=True)
class _Range:
    start: int
    reserved: int
    length: int = 0


class KVPool:
    """Implements `KVCache`. Memory is one tensor [num_layers, 2, num_kv_heads, capacity_tokens, head_dim]."""

    def __init__(
        self,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        budget_bytes: int,
    ) -> None:
        """Raises ValueError where the budget holds not even one token."""
        self.bytes_per_token = num_layers * 2 * num_kv_heads * head_dim * dtype.itemsize
        self.capacity_tokens = budget_bytes // self.bytes_per_token
        if self.capacity_tokens < 1:
            raise ValueError(f"a KV budget of {budget_bytes} bytes holds no token of {self.bytes_per_token} bytes: raise it")
        self._arena = torch.empty((num_layers, 2, num_kv_heads, self.capacity_tokens, head_dim), dtype=dtype, device=device)
        self._layers = self._arena.unbind(0)
        self._ranges: dict[int, _Range] = {}
        self._unused_handles: list[int] = []
        self._free_tokens = self.capacity_tokens

    @property
    def device(self) -> torch.device:
        return self._arena.device

    @property
    def free_tokens(self) -> int:
        return self._free_tokens

    def reserve(self, tokens: int) -> int:
        """Takes up to a few milliseconds where sequences must be moved together first."""
        if tokens < 1:
            raise ValueError(f"{tokens} tokens cannot be reserved: at least 1")
        if tokens > self._free_tokens:
            raise KVCacheFull(tokens, self._free_tokens)
        start = self._hole(tokens)
        if start is None:
            start = self._compact()
        handle = self._unused_handles.pop(0) if self._unused_handles else len(self._ranges)
        self._ranges[handle] = _Range(start, tokens)
        self._free_tokens -= tokens
        return handle

    def reserved(self, handle: int) -> int:
        return self._ranges[handle].reserved

    def length(self, handle: int) -> int:
        return self._ranges[handle].length

    def truncate(self, handle: int, length: int) -> None:
        """Raises ValueError where fewer tokens than `length` are held."""
        held = self._ranges[handle]
        if not 0 <= length <= held.length:
            raise ValueError(f"cannot truncate to {length} tokens: {held.length} are held")
        held.length = length

    def extend(self, handle: int, tokens: int) -> None:
        """Counts tokens that `write` has put behind those held."""
        self._ranges[handle].length += tokens

    def release(self, handle: int) -> None:
        self._free_tokens += self._ranges.pop(handle).reserved
        insort(self._unused_handles, handle)

    def slots(self, spans: Iterable[tuple[int, int, int]]) -> torch.Tensor:
        """Places in the arena, int64, of spans (handle, first token, one behind the last token), one after the other."""
        places = [
            place
            for handle, first, last in spans
            for place in range(self._ranges[handle].start + first, self._ranges[handle].start + last)
        ]
        return torch.tensor(places, dtype=torch.int64, device=self._arena.device)

    def write(self, layer: int, slots: torch.Tensor, keys_and_values: torch.Tensor) -> None:
        """Puts [n, 2, num_kv_heads, head_dim] of one layer at `slots` [n]."""
        self._layers[layer].index_copy_(2, slots, keys_and_values.permute(1, 2, 0, 3))

    def read(self, handle: int, first: int, last: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Per layer, keys and values [num_kv_heads, 1, last - first, head_dim] of tokens [first, last): views."""
        tokens = self._arena.narrow(3, self._ranges[handle].start + first, last - first)
        views = tokens.unsqueeze(3).flatten(0, 1).unbind(0)
        return list(zip(views[::2], views[1::2], strict=True))

    def _hole(self, tokens: int) -> int | None:
        """First fit: where the first hole of enough tokens begins."""
        end = 0
        for held in self._by_start():
            if held.start - end >= tokens:
                return end
            end = held.start + held.reserved
        return end if self.capacity_tokens - end >= tokens else None

    def _compact(self) -> int:
        """Moves all ranges to the front; where the free rest begins. Copies only what is held."""
        end = 0
        for held in self._by_start():
            if held.start != end:
                self._move(held, end)
            end += held.reserved
        return end

    def _move(self, held: _Range, start: int) -> None:
        for layer in self._layers:  # one layer at a time, because source and target may overlap
            moved = layer.narrow(2, held.start, held.length).clone()
            layer.narrow(2, start, held.length).copy_(moved)
        held.start = start

    def _by_start(self) -> list[_Range]:
        return sorted(self._ranges.values(), key=lambda held: held.start)
