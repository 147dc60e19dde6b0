"""The bookkeeping of a KV cache: how much each sequence has reserved and filled, and the place of its range in the arena.

The arena is the memory for the KV of all sequences. Every sequence has one contiguous range of it, as long as the tokens that
it reserved (rounded up to blocks). If no gap between ranges is large enough for a reservation, ranges are moved together first,
so all free memory can be reserved. `llama/kv_pool.py` compares this with slots and pages.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from functions.stage.models.floats import Array
from functions.stage.models.layer_group import KVCacheFull

_MOVED_AT_ONCE: Final = 2**20  # bytes of one layer that are copied at a time while ranges are moved, but at least one token


@dataclass(slots=True)
class _Reservation:
    tokens: int  # reserved
    length: int = 0  # tokens held


class KVBudget:
    """Implements `KVCache` by counting tokens. Subclasses or layer groups own the memory itself."""

    def __init__(self, capacity_tokens: int, block_tokens: int = 1) -> None:
        """block_tokens: reservations are rounded up, and the capacity is rounded down, to a multiple of it."""
        self.capacity_tokens = capacity_tokens // block_tokens * block_tokens
        self.free_tokens = self.capacity_tokens
        self._block_tokens = block_tokens
        self._reservations: dict[int, _Reservation] = {}
        self._released_handles: list[int] = []

    @property
    def resident_bytes(self) -> int:
        return 0

    def reserve(self, tokens: int) -> int:
        if self.taken(tokens) > self.free_tokens:
            raise KVCacheFull(tokens, self.free_tokens)
        handle = self._released_handles.pop() if self._released_handles else len(self._reservations)
        self._reservations[handle] = _Reservation(tokens)
        self.free_tokens -= self.taken(tokens)
        return handle

    def taken(self, tokens: int) -> int:
        """Tokens of memory that a reservation of `tokens` takes: rounded up to whole blocks."""
        return -(-tokens // self._block_tokens) * self._block_tokens

    def reserved(self, handle: int) -> int:
        return self._reservations[handle].tokens

    def length(self, handle: int) -> int:
        return self._reservations[handle].length

    def extend(self, handle: int, tokens: int) -> None:
        """Counts `tokens` more as held by the sequence. The caller has written their KV."""
        self._reservations[handle].length += tokens

    def truncate(self, handle: int, length: int) -> None:
        reservation = self._reservations[handle]
        reservation.length = min(reservation.length, length)

    def resize(self, handle: int, tokens: int) -> None:
        """Changes a reservation to `tokens`. Does not check that there is enough free memory: the caller must."""
        reservation = self._reservations[handle]
        self.free_tokens -= self.taken(tokens) - self.taken(reservation.tokens)
        reservation.tokens = tokens

    def release(self, handle: int) -> None:
        self.free_tokens += self.taken(self._reservations.pop(handle).tokens)
        self._released_handles.append(handle)


@dataclass(frozen=True, slots=True)
class KVLayout:
    """The order and meaning of the bytes in a KV arena. Only arenas with equal layouts can use each other's bytes."""

    kind: str  # names the implementation and all else that bits depend on, such as `native float32 avx512`; at most 32 bytes
    num_layers: int
    kv_heads: int
    head_bytes: int  # of one key or value of one token and head, padding included
    block_tokens: int = 1  # ranges begin and end at multiples of it

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's KV in all layers."""
        return self.num_layers * 2 * self.kv_heads * self.head_bytes

    def rounded(self, tokens: int) -> int:
        """`tokens` rounded up to whole blocks."""
        return -(-tokens // self.block_tokens) * self.block_tokens


class KVRanges(KVBudget):
    """Implements `KVCache` with one contiguous range of an arena for each sequence. Subclasses own the arena.

    Unlike other KV caches, its KV can be copied between sequences, and out of and into the arena.
    """

    layers: Sequence[Any]  # arrays or tensors [2, num_kv_heads, capacity_tokens, head_dim]: each layer's keys and values
    layout: KVLayout  # of the bytes of `copy_out` and `copy_in`

    def __init__(self, budget_bytes: int, num_layers: int, layer_bytes_per_token: int, block_tokens: int = 1) -> None:
        """block_tokens: ranges are rounded up to a multiple of it. Raises ValueError if the budget is less than one block."""
        self.num_layers = num_layers
        self.bytes_per_token = num_layers * layer_bytes_per_token
        super().__init__(budget_bytes // self.bytes_per_token, block_tokens)
        if self.capacity_tokens < 1:
            of_tokens = "token" if block_tokens == 1 else f"{block_tokens} tokens"
            raise ValueError(
                f"a KV budget of {budget_bytes} bytes holds no {of_tokens} of {self.bytes_per_token} bytes: raise it"
            )
        self._starts: dict[int, int] = {}

    def start(self, handle: int) -> int:
        """Index in the arena of the sequence's first token. `reserve` may change it for any sequence."""
        return self._starts[handle]

    def reserve(self, tokens: int) -> int:
        """See `KVCache`. Takes some milliseconds if ranges must be moved together first.

        If moving fails, nothing is reserved, and the sequence that was being moved holds no tokens any more.
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
        """Drops tokens beyond `tokens`, and frees the memory after them."""
        self.truncate(handle, tokens)
        self.resize(handle, min(tokens, self.reserved(handle)))

    def grow(self, handle: int, tokens: int) -> bool:
        """Raises the reservation to `tokens` without moving the range. False if there is too little free memory after it."""
        start = self._starts[handle]
        end = min((other for other in self._starts.values() if other > start), default=self.capacity_tokens)
        if self.taken(tokens) > end - start:
            return False
        self.resize(handle, max(tokens, self.reserved(handle)))
        return True

    def copy(self, source: int, target: int, tokens: int) -> None:
        """Replaces what the sequence `target` holds by a copy of the first `tokens` of `source`, which must be whole blocks."""
        self.truncate(target, 0)
        first, into = self._starts[source], self._starts[target]
        for layer in self.layers:
            layer[:, :, into : into + tokens] = layer[:, :, first : first + tokens]
        self.extend(target, tokens)

    def copy_out(self, first: int, target: Array) -> None:
        """Copies tokens of the arena, from index `first` on, to `target`.

        target: uint8 [num_layers, 2, num_kv_heads, tokens, head bytes].
        """
        end = first + target.shape[3]
        for layer, own in zip(self.layers, target, strict=True):
            own[...] = self._as_bytes(layer[:, :, first:end])

    def copy_in(self, first: int, source: Array) -> None:
        """Copies `source`, an array as `copy_out` fills it, into the arena from index `first` on."""
        end = first + source.shape[3]
        for layer, own in zip(self.layers, source, strict=True):
            self._put_bytes(layer[:, :, first:end], own)

    def new_buffer(self, tokens: int) -> Any:
        """A new array [2, num_kv_heads, tokens, head_dim] of the arena's type, for KV of one layer."""
        raise NotImplementedError

    def _as_bytes(self, part: Any) -> Array:
        """A part of a layer viewed or copied as uint8: the last dimension becomes bytes, the others stay."""
        raise NotImplementedError

    def _put_bytes(self, part: Any, source: Array) -> None:
        """Writes bytes, in the shape that `_as_bytes` returns, to a part of a layer."""
        raise NotImplementedError

    def to_drop(self, tokens: int, oldest_first: Sequence[int]) -> list[int]:
        """Chooses which ranges to release so that `tokens` can be reserved. Releases nothing itself.

        Returns an empty list if nothing need be released, or if releasing all would not suffice. oldest_first: handles that may
        be released. Prefers ranges that are adjacent or separated by gaps only, and among these the oldest: then `reserve` need
        not move ranges. Otherwise it chooses the oldest.
        """
        wanted = self.taken(tokens)
        available = self.free_tokens + sum(self.taken(self.reserved(handle)) for handle in oldest_first)
        if available < wanted or self._hole(wanted) is not None:
            return []
        adjacent = self._oldest_window(wanted, oldest_first)
        if adjacent:
            return adjacent
        dropped: list[int] = []
        free = self.free_tokens
        for handle in oldest_first:
            if free >= wanted:
                break
            dropped.append(handle)
            free += self.taken(self.reserved(handle))
        return dropped

    def _oldest_window(self, wanted: int, oldest_first: Sequence[int]) -> list[int]:
        """Neighbouring ranges among the candidates whose release leaves a gap of `wanted` tokens; empty if there are none.

        Of several possibilities it takes the one whose newest range is oldest.
        """
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

    def _hole(self, tokens: int) -> int | None:
        """Start of the first free gap of at least `tokens`; None if there is none."""
        end = 0
        for handle, start in self._by_start():
            if start - end >= tokens:
                return end
            end = start + self.taken(self.reserved(handle))
        return end if self.capacity_tokens - end >= tokens else None

    def _compact(self) -> int:
        """Moves all ranges to the front of the arena. Returns the index at which free memory begins then.

        Copies only tokens that are held. Allocates its buffer before it moves the first range. A range counts as empty until
        all its layers have been moved: if a copy fails half-way, the sequence holds nothing, rather than wrong KV.
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
        """Moves `tokens` of all layers from index `source` to `target`, which is less, through `buffer`.

        Goes piece by piece from front to back, because both may overlap.
        """
        for layer in self.layers:
            for done in range(0, tokens, buffer.shape[2]):
                count = min(buffer.shape[2], tokens - done)
                buffer[:, :, :count] = layer[:, :, source + done : source + done + count]
                layer[:, :, target + done : target + done + count] = buffer[:, :, :count]

    def _by_start(self) -> list[tuple[int, int]]:
        """All ranges as (handle, start), in the order of their starts."""
        return sorted(self._starts.items(), key=lambda item: item[1])
