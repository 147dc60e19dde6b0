"""The bookkeeping of a KV cache: how much each sequence has reserved and filled, and the place of its range in the arena.

Every sequence has one contiguous range, and all that is free can be reserved. Ranges waste nothing: a reservation takes exactly
its tokens (rounded up to blocks). They fragment, so if no hole is large enough for a reservation, ranges are moved together
first. `llama/kv_pool.py` compares this with slots and pages.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from functions.stage.models.floats import Array
from functions.stage.models.layer_group import KVCacheFull

_MOVED_AT_ONCE: Final = 2**20  # bytes of a layer that go through a buffer while ranges are moved, but at least one token


@dataclass(slots=True)
class _Reservation:
    tokens: int
    length: int = 0


class KVBudget:
    """Implements `KVCache` except for the memory itself, which layer groups own."""

    def __init__(self, capacity_tokens: int, block_tokens: int = 1) -> None:
        """block_tokens: reservations take whole blocks; the capacity is rounded down to them."""
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
        """Memory, in tokens, that a reservation of `tokens` takes."""
        return -(-tokens // self._block_tokens) * self._block_tokens

    def reserved(self, handle: int) -> int:
        return self._reservations[handle].tokens

    def length(self, handle: int) -> int:
        return self._reservations[handle].length

    def extend(self, handle: int, tokens: int) -> None:
        """Counts `tokens` more as held. Layer groups call it after a pass."""
        self._reservations[handle].length += tokens

    def truncate(self, handle: int, length: int) -> None:
        reservation = self._reservations[handle]
        reservation.length = min(reservation.length, length)

    def resize(self, handle: int, tokens: int) -> None:
        """Changes a reservation to `tokens`. The caller knows that there is memory for them."""
        reservation = self._reservations[handle]
        self.free_tokens -= self.taken(tokens) - self.taken(reservation.tokens)
        reservation.tokens = tokens

    def release(self, handle: int) -> None:
        self.free_tokens += self.taken(self._reservations.pop(handle).tokens)
        self._released_handles.append(handle)


@dataclass(frozen=True, slots=True)
class KVLayout:
    """How an arena's bytes are to be read. Two arenas with equal layouts may exchange bytes."""

    kind: str  # what wrote them, and all that their bits depend on: `native float32 avx512`; at most 32 bytes
    num_layers: int
    kv_heads: int
    head_bytes: int  # of one key or value of one token and head, padding included
    block_tokens: int = 1  # ranges begin and end at multiples of it

    @property
    def token_bytes(self) -> int:
        return self.num_layers * 2 * self.kv_heads * self.head_bytes

    def rounded(self, tokens: int) -> int:
        """Rounded up to whole blocks."""
        return -(-tokens // self.block_tokens) * self.block_tokens


class KVRanges(KVBudget):
    """Implements `KVCache` except for the arena, which subclasses own."""

    layers: Sequence[Any]  # keys and values [2, num_kv_heads, capacity_tokens, head_dim] each, sliced as numpy arrays are
    layout: KVLayout  # of the bytes of `copy_out` and `copy_in`

    def __init__(self, budget_bytes: int, num_layers: int, layer_bytes_per_token: int, block_tokens: int = 1) -> None:
        """block_tokens: ranges are rounded up to it. Raises ValueError if the budget is less than one block."""
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
        """The arena's index of a sequence's first token."""
        return self._starts[handle]

    def reserve(self, tokens: int) -> int:
        """Takes some milliseconds if ranges must be moved together first.

        If a move fails, nothing is reserved, and the sequence that was being moved holds nothing.
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
        """Cuts the range and what it holds to `tokens`."""
        self.truncate(handle, tokens)
        self.resize(handle, min(tokens, self.reserved(handle)))

    def grow(self, handle: int, tokens: int) -> bool:
        """Reserves `tokens` in place. False if there is too little free memory after the range."""
        start = self._starts[handle]
        end = min((other for other in self._starts.values() if other > start), default=self.capacity_tokens)
        if self.taken(tokens) > end - start:
            return False
        self.resize(handle, max(tokens, self.reserved(handle)))
        return True

    def copy(self, source: int, target: int, tokens: int) -> None:
        """Makes `target` hold exactly the first `tokens` of what `source` holds, which are whole blocks."""
        self.truncate(target, 0)
        first, into = self._starts[source], self._starts[target]
        for layer in self.layers:
            layer[:, :, into : into + tokens] = layer[:, :, first : first + tokens]
        self.extend(target, tokens)

    def copy_out(self, first: int, target: Array) -> None:
        """Fills `target`, uint8 [num_layers, 2, num_kv_heads, tokens, head bytes], with the arena's tokens from `first` on."""
        end = first + target.shape[3]
        for layer, own in zip(self.layers, target, strict=True):
            own[...] = self._as_bytes(layer[:, :, first:end])

    def copy_in(self, first: int, source: Array) -> None:
        """Writes `source`, as `copy_out` fills it, into the arena from `first` on."""
        end = first + source.shape[3]
        for layer, own in zip(self.layers, source, strict=True):
            self._put_bytes(layer[:, :, first:end], own)

    def new_buffer(self, tokens: int) -> Any:
        """[2, num_kv_heads, tokens, head_dim] of the arena's kind, for tokens of one layer."""
        raise NotImplementedError

    def _as_bytes(self, part: Any) -> Array:
        """Part of a layer as uint8; only its last dimension differs."""
        raise NotImplementedError

    def _put_bytes(self, part: Any, source: Array) -> None:
        """Writes what `_as_bytes` has read."""
        raise NotImplementedError

    def to_drop(self, tokens: int, oldest_first: Sequence[int]) -> list[int]:
        """Which of these ranges to release so that `tokens` can be reserved. None if none need be, or all are too few.

        Prefers the oldest ranges that are adjacent, or separated by holes only: then nothing must be moved. If other ranges
        lie between all candidates, the oldest ones are dropped, and `reserve` moves.
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
        """The window of `wanted` tokens that holds only candidates, and whose newest range is the oldest; or empty."""
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
        """Start of the first hole of enough tokens."""
        end = 0
        for handle, start in self._by_start():
            if start - end >= tokens:
                return end
            end = start + self.taken(self.reserved(handle))
        return end if self.capacity_tokens - end >= tokens else None

    def _compact(self) -> int:
        """Moves all ranges to the front. Returns where the free rest begins. Copies only tokens that are held.

        Allocates all memory that it needs before it moves the first range. A range counts as empty until all layers have been
        moved: after a copy that failed half-way its sequence answers miss, and never has wrong keys and values.
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
        """Moves piece by piece from front to back, because source and target may overlap."""
        for layer in self.layers:
            for done in range(0, tokens, buffer.shape[2]):
                count = min(buffer.shape[2], tokens - done)
                buffer[:, :, :count] = layer[:, :, source + done : source + done + count]
                layer[:, :, target + done : target + done + count] = buffer[:, :, :count]

    def _by_start(self) -> list[tuple[int, int]]:
        return sorted(self._starts.items(), key=lambda item: item[1])
