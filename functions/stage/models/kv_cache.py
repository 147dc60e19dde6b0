"""The bookkeeping of a KV cache: what each sequence has reserved and filled, and which blocks of the arena belong to it.

The arena is the memory for the KV of all sequences. It consists of blocks of a fixed number of tokens. Each sequence has a
table of the blocks that it has reserved. Blocks need not be neighbours, so all free memory can be reserved, and nothing is ever
moved.

A layer with a sliding window keeps only the last tokens of a sequence: the window, and GOING_BACK tokens more. So the sequence
can be truncated by up to GOING_BACK tokens. If it is truncated further, all its KV is dropped and must be computed again. In an
arena these tokens are in a ring of blocks.

A recurrent layer keeps a state of fixed size instead of KV. The state cannot be truncated: a sequence goes back to the last
position whose state was kept (`checkpoints`), and the tokens after that position are computed again.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from functions.stage.models.checkpoints import Checkpoints
from functions.stage.models.floats import Array

GOING_BACK: Final = 240  # tokens that a ring keeps besides the window, and most that a pass may add to a sequence with a ring
_SPARE: Final = 16  # further tokens of a ring: a copy may overwrite a block of this many tokens of which it needs one

_COPIED_AT_ONCE: Final = 2**20  # bytes that are copied at a time, so that copying takes little memory
_ANY_LENGTH: Final = 2**30  # tokens of a sequence that takes the same memory at any length


class KVCacheFull(Exception):
    """A reservation does not fit into the KV budget. Retry after other sequences have ended."""

    def __init__(self, wanted_tokens: int, free_tokens: int) -> None:
        super().__init__(f"{wanted_tokens} tokens wanted, {free_tokens} free")
        self.wanted_tokens = wanted_tokens
        self.free_tokens = free_tokens


@dataclass(frozen=True, slots=True)
class KVNeed:
    """How much memory a sequence takes. The KV cache chooses the unit of memory."""

    units: int = 1  # for a block of tokens in all layers without a window
    windowed_units: int = 0  # for a block in all layers with a window
    kept_tokens: int = 0  # most tokens of a sequence that layers with a window keep
    block_tokens: int = 1
    fixed_units: int = 0  # for the recurrent states of a sequence of any length

    @property
    def ring_blocks(self) -> int:
        """Most blocks that a layer with a window keeps of a sequence."""
        return self.blocks(self.kept_tokens)

    def blocks(self, tokens: int) -> int:
        return -(-tokens // self.block_tokens)

    def of(self, tokens: int) -> int:
        """Returns the units that a sequence of `tokens` takes."""
        blocks = self.blocks(tokens)
        return self.fixed_units + blocks * self.units + min(blocks, self.ring_blocks) * self.windowed_units

    def tokens(self, units: int) -> int:
        """Returns the length in tokens of the longest sequence that fits into `units`.

        If all layers have windows, a sequence of any length fits as soon as a ring fits. The result is then still computed as
        if layers kept all tokens.
        """
        units -= self.fixed_units
        if units < 0:
            return 0
        if not self.units + self.windowed_units:
            return _ANY_LENGTH
        blocks = units // (self.units + self.windowed_units)
        if self.units and self.windowed_units and blocks > self.ring_blocks:
            blocks = (units - self.ring_blocks * self.windowed_units) // self.units
        return blocks * self.block_tokens


@dataclass(slots=True)
class _Reservation:
    tokens: int  # reserved
    filled: int = 0  # tokens written
    least: int = 0  # the sequence cannot be truncated to fewer tokens, except to none: layers with windows have dropped KV


class KVBudget:
    """Counts the memory for the KV of many sequences, within one budget. Subclasses or layer groups own the memory.

    A handle names the memory of one sequence. It is a small integer, which is reused after its release.
    """

    def __init__(self, units: int, need: KVNeed | None = None, going_back: int = GOING_BACK) -> None:
        """Counts `units` of memory, all of them free.

        need: what a sequence takes; if None, one unit for each token.
        going_back: number of tokens by which a sequence can be truncated if layers with windows have dropped its first tokens.
        """
        self.need = need or KVNeed()
        self._going_back = going_back
        self.free_units = units
        self.capacity_tokens = self.need.tokens(units)  # length of the longest sequence that could be reserved alone
        self._reservations: dict[int, _Reservation] = {}
        self._released_handles: list[int] = []

    @property
    def free_tokens(self) -> int:
        """Length of the longest sequence that can still be reserved, in tokens."""
        return self.need.tokens(self.free_units)

    @property
    def resident_bytes(self) -> int:
        """Bytes of physical memory in use, which is all memory that was ever written to. 0 if unknown. Thread-safe."""
        return 0

    def reserve(self, tokens: int) -> int:
        """Reserves memory for `tokens` of a new sequence and returns its handle. Raises KVCacheFull."""
        if self.need.of(tokens) > self.free_units:
            raise KVCacheFull(tokens, self.free_tokens)
        handle = self._released_handles.pop() if self._released_handles else len(self._reservations)
        self._reservations[handle] = _Reservation(tokens)
        self.free_units -= self.need.of(tokens)
        return handle

    def units(self, handle: int) -> int:
        """Returns the units of memory that the reservation of the sequence takes."""
        return self.need.of(self._reservations[handle].tokens)

    def reserved(self, handle: int) -> int:
        """Returns the number of tokens for which the sequence has memory reserved."""
        return self._reservations[handle].tokens

    def length(self, handle: int) -> int:
        """Returns the number of tokens whose KV the sequence holds."""
        reservation = self._reservations[handle]
        return reservation.filled if reservation.filled >= reservation.least else 0

    def filled(self, handle: int) -> int:
        """Returns the number of tokens written.

        This is more than `length` while KV is being restored and the part for layers with windows is still missing.
        """
        return self._reservations[handle].filled

    def holds(self, handle: int, tokens: int) -> bool:
        """Whether the sequence would hold `tokens` tokens after it is truncated to them."""
        reservation = self._reservations[handle]
        return reservation.least <= tokens <= reservation.filled

    def extend(self, handle: int, tokens: int) -> None:
        """Counts `tokens` more tokens of the sequence as held. The caller has written their KV or is about to write it."""
        reservation = self._reservations[handle]
        reservation.filled += tokens
        if self.need.windowed_units and self.need.blocks(reservation.filled) > self.need.ring_blocks:
            reservation.least = max(reservation.least, reservation.filled - self._going_back)

    def truncate(self, handle: int, length: int) -> None:
        """Drops the KV of tokens beyond `length`. The memory stays reserved.

        If layers with a sliding window no longer hold the KV that the token at `length` attends to, drops all KV. With
        recurrent layers, drops all KV after the last checkpoint up to `length`.
        """
        reservation = self._reservations[handle]
        reservation.filled = min(reservation.filled, length)
        if reservation.filled < reservation.least:
            reservation.filled = 0
        if reservation.filled == 0:
            reservation.least = 0

    def resize(self, handle: int, tokens: int) -> None:
        """Changes a reservation to `tokens`. Raises KVCacheFull if there is too little free memory."""
        reservation = self._reservations[handle]
        more = self.need.of(tokens) - self.need.of(reservation.tokens)
        if more > self.free_units:
            raise KVCacheFull(tokens, self.free_tokens)
        self.free_units -= more
        reservation.tokens = tokens

    def release(self, handle: int) -> None:
        """Frees the sequence's memory. The handle is not valid any more."""
        self.free_units += self.need.of(self._reservations.pop(handle).tokens)
        self._released_handles.append(handle)


@dataclass(frozen=True, slots=True)
class KVLayout:
    """The layout of the bytes in a KV arena. Arenas can exchange KV only if their layouts are equal."""

    kind: str  # the implementation, and all else that the bits depend on, such as `native float32 avx512`
    num_layers: int  # number of layers that keep all tokens
    kv_heads: int
    head_bytes: int  # of one key or value of one token and head, padding included
    block_tokens: int = 1  # a copied range begins at a multiple of this
    windowed_layers: int = 0
    window: int = 0  # the widest, in tokens
    state_bytes: int = 0  # of the recurrent states of a sequence

    @property
    def layer_bytes(self) -> int:
        """Bytes of one token's KV in a layer."""
        return 2 * self.kv_heads * self.head_bytes

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's KV in all layers."""
        return (self.num_layers + self.windowed_layers) * self.layer_bytes

    def rounded(self, tokens: int) -> int:
        """`tokens` rounded up to whole blocks."""
        return -(-tokens // self.block_tokens) * self.block_tokens


class KVBlocks(KVBudget):
    """A `KVBudget` whose KV can be copied between sequences, and to and from other memory, in blocks of the layout."""

    layout: KVLayout  # of the bytes of `copy_out` and `copy_in`
    window = 0  # the widest, in tokens
    checkpoints: Checkpoints[Any] = Checkpoints(0)  # recurrent states besides those of the sequences' last tokens

    def last_held(self, handle: int, tokens: int) -> int:
        """Returns how many tokens the sequence would hold after `truncate` to `tokens`."""
        return tokens if self.holds(handle, tokens) else 0

    def state_out(self, handle: int, tokens: int) -> bytes:
        """Returns the recurrent states after the first `tokens` as `layout.state_bytes` bytes. Empty if they are not kept."""
        return b""

    def state_in(self, handle: int, tokens: int, data: memoryview) -> None:
        """Sets the recurrent states of a sequence that has been `restored` up to `tokens`. data: from `state_out`."""
        raise NotImplementedError

    def copy(self, source: int, target: int, tokens: int) -> None:
        """Replaces the KV of `target` with a copy of the first `tokens` of `source`, for which `holds` must be True."""
        self.truncate(target, 0)
        self._copy_kv(source, target, tokens)
        copied = self._reservations[target]
        copied.filled, copied.least = tokens, self._reservations[source].least

    def _copy_kv(self, source: int, target: int, tokens: int) -> None:
        """Copies the keys and values of the first `tokens` of `source` to `target`."""
        raise NotImplementedError

    def windowed_from(self, handle: int, first: int) -> int:
        """Returns the first token from `first` on whose KV layers with windows hold too. The token begins a block.

        The result may be beyond `filled`: then these layers hold none of the tokens from `first` on.
        """
        least, block = self._reservations[handle].least, self.layout.block_tokens
        return max(first, (least - self.window + block) // block * block) if least else first

    def restored(self, handle: int, end: int, windowed_from: int) -> None:
        """Counts all tokens up to `end` as held. The caller has written their KV.

        windowed_from: first token whose KV was written in layers with windows.
        """
        reservation = self._reservations[handle]
        if windowed_from > reservation.filled:
            reservation.least = windowed_from + self.window - 1
        self.extend(handle, end - reservation.filled)

    def copy_out(self, handle: int, first: int, target: Array, *, windowed: bool = False) -> None:
        """Copies the KV of tokens from `first` on to `target`. Token `first` must begin a block of the layout.

        target: uint8 [layers, 2, num_kv_heads, tokens, head bytes]; says how many tokens to copy. windowed: copy from the
        layers with windows; otherwise from the others.
        """
        raise NotImplementedError

    def copy_in(self, handle: int, first: int, source: Array, *, windowed: bool = False) -> None:
        """Copies `source` into the arena, from token `first` on. `source` has the shape that `copy_out` fills."""
        raise NotImplementedError


class KVArena(KVBlocks):
    """Implements `KVBlocks` with an arena of blocks. Subclasses own the arena.

    The table of a sequence has one row of block numbers for all layers, or a row for each layer.
    """

    def __init__(
        self,
        budget_bytes: int,
        block_tokens: int,
        block_bytes: int,
        windows: Sequence[int | None] = (None,),
        fixed_bytes: int = 0,
    ) -> None:
        """Divides the budget into blocks, all of them free.

        block_bytes: size of one block. windows: the sliding window of each row of a table, in tokens; None for no window.
        fixed_bytes: memory of each sequence besides its blocks. It counts in the budget, but is not in the arena.

        Raises ValueError if the budget is too small for the shortest sequence.
        """
        self.windowed = np.array([window is not None for window in windows], bool)
        windowed = int(self.windowed.sum())
        self.window = max((window or 0 for window in windows), default=0)  # the widest
        need = KVNeed(
            len(windows) - windowed, windowed, self.window + GOING_BACK + _SPARE, block_tokens, -(-fixed_bytes // block_bytes)
        )
        super().__init__(budget_bytes // block_bytes, need)
        self._block_bytes = block_bytes
        if self.capacity_tokens < 1:
            of_tokens = "token" if block_tokens == 1 else f"{block_tokens} tokens"
            raise ValueError(
                f"a KV budget of {budget_bytes} bytes holds no {of_tokens}, which take "
                f"{need.of(1) * block_bytes} bytes: raise it"
            )
        self._is_free = np.ones(self.free_units, bool)
        # By handle: numbers of the sequence's blocks, int32 [rows, blocks]. -1 stands for blocks beyond the end of a ring.
        self.tables: dict[int, Array] = {}

    def reserve(self, tokens: int) -> int:
        handle = super().reserve(tokens)
        self.tables[handle] = np.full((len(self.windowed), 0), -1, np.int32)
        self._fit_table(handle, tokens)
        return handle

    def resize(self, handle: int, tokens: int) -> None:
        super().resize(handle, tokens)
        self.truncate(handle, tokens)
        self._fit_table(handle, tokens)

    def release(self, handle: int) -> None:
        super().release(handle)
        self._fit_table(handle, 0)
        del self.tables[handle]

    def _copy_kv(self, source: int, target: int, tokens: int) -> None:
        blocks = self.need.blocks(tokens)
        froms, tos = self.tables[source][:, :blocks], self.tables[target][:, :blocks]
        both = (froms >= 0) & (tos >= 0)
        froms, tos = froms[both], tos[both]
        at_once = max(1, _COPIED_AT_ONCE // self._block_bytes)
        for first in range(0, len(froms), at_once):
            self._copy_blocks(froms[first : first + at_once], tos[first : first + at_once])

    def _copy_blocks(self, sources: Array, targets: Array) -> None:
        """Copies each of the blocks `sources` to the block in `targets`. Both are arrays of block numbers."""
        raise NotImplementedError

    def _fit_table(self, handle: int, tokens: int) -> None:
        """Adjusts the table of a sequence to `tokens`: frees surplus blocks, and takes blocks that are missing."""
        old, blocks = self.tables[handle], self.need.blocks(tokens)
        surplus = old[:, blocks:]
        self._is_free[surplus[surplus >= 0]] = True
        table = np.full((len(old), blocks), -1, np.int32)
        kept = min(blocks, old.shape[1])
        table[:, :kept] = old[:, :kept]
        lacking = table < 0
        lacking[self.windowed, self.need.ring_blocks :] = False
        table[lacking] = self._take(int(lacking.sum()))
        self.tables[handle] = table

    def _take(self, count: int) -> Array:
        """Takes `count` free blocks and returns their numbers: neighbours if possible, otherwise the first free blocks."""
        free = np.flatnonzero(self._is_free)
        runs = np.flatnonzero(free[count - 1 :] - free[: len(free) - count + 1] == count - 1) if count else free
        first = int(runs[0]) if len(runs) else 0
        taken = free[first : first + count]
        self._is_free[taken] = False
        return taken
