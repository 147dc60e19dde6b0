"""The ranges of a KV arena: every sequence has a contiguous one, and what is free can always be reserved.

Ranges waste nothing: a reservation takes exactly its tokens. They fragment, so a reservation that no hole can take makes the
pool move sequences together first. How that compares with slots and pages: `llama/kv_pool.py`.
"""

from collections.abc import Sequence
from typing import Any, Final

from functions.stage.models.floats import Array
from functions.stage.models.kv_budget import KVBudget
from functions.stage.models.kv_layout import KVLayout

_MOVED_AT_ONCE: Final = 2**20
"""Bytes of a layer that pass through a buffer while ranges are moved, as far as one token has not more."""


class KVRanges(KVBudget):
    """Implements `KVCache` but for the arena, which is its subclass's: `self.layers` [2, num_kv_heads, capacity_tokens,
    head_dim] each, of anything that is sliced as numpy's arrays are."""

    layers: Sequence[Any]

    def __init__(self, budget_bytes: int, num_layers: int, layer_bytes_per_token: int, block_tokens: int = 1) -> None:
        """block_tokens: that ranges are rounded up to. Raises ValueError where the budget holds not even one block."""
        self.num_layers = num_layers
        self.bytes_per_token = num_layers * layer_bytes_per_token
        super().__init__(budget_bytes // self.bytes_per_token, block_tokens)
        if self.capacity_tokens < 1:
            of_tokens = "token" if block_tokens == 1 else f"{block_tokens} tokens"
            raise ValueError(
                f"a KV budget of {budget_bytes} bytes holds no {of_tokens} of {self.bytes_per_token} bytes: raise it"
            )
        self._starts: dict[int, int] = {}

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

    def shrink(self, handle: int, tokens: int) -> None:
        """Gives back what is reserved beyond `tokens`, and drops what is held there."""
        self.truncate(handle, tokens)
        self.resize(handle, min(tokens, self.reserved(handle)))

    def grow(self, handle: int, tokens: int) -> bool:
        """Reserves `tokens` where its range is, if there is room behind it."""
        start = self._starts[handle]
        end = min((other for other in self._starts.values() if other > start), default=self.capacity_tokens)
        if self.taken(tokens) > end - start:
            return False
        self.resize(handle, max(tokens, self.reserved(handle)))
        return True

    def copy(self, source: int, target: int, tokens: int) -> None:
        """`target` holds the first `tokens` of what `source` holds, which are whole blocks, and nothing behind them."""
        self.truncate(target, 0)
        first, into = self._starts[source], self._starts[target]
        for layer in self.layers:
            layer[:, :, into : into + tokens] = layer[:, :, first : first + tokens]
        self.extend(target, tokens)

    def to_drop(self, tokens: int, oldest_first: Sequence[int]) -> list[int]:
        """Which of these ranges to release so that `tokens` can be reserved; none where that needs none, or all are too few.

        Of those that lie side by side, with holes between them, the oldest: then nothing must be moved. Where others lie
        between all that is old enough, the oldest by themselves, and `reserve` moves.
        """
        wanted = self.taken(tokens)
        room = self.free_tokens + sum(self.taken(self.reserved(handle)) for handle in oldest_first)
        if room < wanted or self._hole(wanted) is not None:
            return []
        return self._side_by_side(wanted, oldest_first) or self._oldest(wanted, oldest_first)

    def _oldest(self, wanted: int, oldest_first: Sequence[int]) -> list[int]:
        dropped: list[int] = []
        room = self.free_tokens
        for handle in oldest_first:
            if room >= wanted:
                break
            dropped.append(handle)
            room += self.taken(self.reserved(handle))
        return dropped

    def _side_by_side(self, wanted: int, oldest_first: Sequence[int]) -> list[int]:
        """Those of one window of `wanted` tokens, of all windows the one whose newest is the oldest; empty: there is none."""
        ages = {handle: age for age, handle in enumerate(oldest_first)}
        ranges = [*self._by_start(), (-1, self.capacity_tokens)]
        best: list[int] = []
        newest = len(ages)
        end = 0
        for first, (handle, _) in enumerate(ranges):
            window: list[int] = []
            for other, start in ranges[first:]:
                if start - end >= wanted:
                    age = max(ages[each] for each in window)
                    if age < newest:
                        best, newest = window, age
                    break
                if ages.get(other, newest) >= newest:
                    break
                window.append(other)
            if handle >= 0:
                end = self._starts[handle] + self.taken(self.reserved(handle))
        return best

    def start(self, handle: int) -> int:
        """Where in the arena a sequence's tokens begin."""
        return self._starts[handle]

    @property
    def layout(self) -> KVLayout:
        """How `copy_out` and `copy_in` have the arena's bytes."""
        raise NotImplementedError

    def copy_out(self, first: int, target: Array) -> None:
        """Fills `target`, uint8 [num_layers, 2, num_kv_heads, tokens, head bytes], with the arena's tokens from `first` on."""
        end = first + target.shape[3]
        for layer, own in zip(self.layers, target, strict=True):
            own[...] = self._as_bytes(layer[:, :, first:end])

    def copy_in(self, first: int, source: Array) -> None:
        """The other way round: into the arena, from `first` on."""
        end = first + source.shape[3]
        for layer, own in zip(self.layers, source, strict=True):
            self._put_bytes(layer[:, :, first:end], own)

    def _as_bytes(self, part: Any) -> Array:
        """Part of a layer as uint8 of the same shape but for its last dimension."""
        raise NotImplementedError

    def _put_bytes(self, part: Any, source: Array) -> None:
        """Writes what `_as_bytes` has read."""
        raise NotImplementedError

    def new_buffer(self, tokens: int) -> Any:
        """[2, num_kv_heads, tokens, head_dim] of the arena's kind, for tokens of one layer."""
        raise NotImplementedError

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
        token_bytes = self.bytes_per_token // self.num_layers
        buffer = self.new_buffer(max(1, _MOVED_AT_ONCE // token_bytes))
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

    def _move(self, source: int, target: int, tokens: int, buffer: Any) -> None:
        """Part after part, front to back, because source and target may overlap."""
        for layer in self.layers:
            for done in range(0, tokens, buffer.shape[2]):
                count = min(buffer.shape[2], tokens - done)
                buffer[:, :, :count] = layer[:, :, source + done : source + done + count]
                layer[:, :, target + done : target + done + count] = buffer[:, :, :count]

    def _by_start(self) -> list[tuple[int, int]]:
        return sorted(self._starts.items(), key=lambda item: item[1])
