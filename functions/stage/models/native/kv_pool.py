"""The KV arena of layers in C. Within a block, its bytes have the order in which C reads them (`c/native.h`)."""

import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Final, NamedTuple

import numpy as np

from functions.stage.models.checkpoints import STATES_PER_SEQUENCE, Checkpoints, checkpoints_in
from functions.stage.models.floats import Array, Float32
from functions.stage.models.kv_cache import KVArena, KVLayout
from functions.stage.models.recurrent_states import RecurrentKV
from functions.stage.native.layers import SegmentArrays, StateArrays
from functions.stage.native.limits import SCALE_BYTES, padded_head
from functions.stage.native.records import BLOCK_TOKENS, PAGE_TOKENS, Dtype
from storage.loading.memory import new_memory, resident_bytes

_NUMBER_BYTES: Final = {Dtype.BF16: 2, Dtype.F32: 4, Dtype.INT8: 1}


class LayerKV(NamedTuple):
    """The keys and values of a layer."""

    window: int | None  # tokens; None: it attends to all
    heads: int
    head_dim: int


_NO_LAYER: Final = LayerKV(None, 1, 2)  # stands for a layer if no layer has keys and values


class NativeKVPool(RecurrentKV[Float32], KVArena):
    """A `KVArena` for layers in C. A block is a page of one layer: the keys, then the values, of PAGE_TOKENS tokens.

    Layers may have heads of different sizes. All pages have the size that the smallest layer needs. A layer that needs more has
    several pages for the same tokens, each with the keys or values of some heads, and one row of the tables for each page.

    Memory that was never written to takes no physical memory. The recurrent states of a sequence are one float32 array for all
    layers. Memory of states is reused, because new pages from the kernel cost several times as much as the copy into them.
    """

    def __init__(
        self,
        layers: Sequence[LayerKV],
        dtype: Dtype,
        budget_bytes: int,
        written_by: str = "",
        state_values: int = 0,
        kept_values: int = 0,
    ) -> None:
        """Allocates the arena for `layers`, the layers that write keys and values.

        dtype: of keys and values, BF16, F32 or INT8.
        written_by: names the dtypes and the CPU level, on which the bits of KV depend. Pools exchange KV only if this is equal.
        state_values: how many numbers the recurrent states of a sequence have. kept_values: how many numbers are kept of each
        draft token, to update states again. Raises ValueError if the budget is less than the shortest sequence takes.
        """
        scale_bytes = SCALE_BYTES if dtype is Dtype.INT8 else 0
        # Of each layer: how many keys and values of heads a token has, and the bytes of one of them.
        sizes = [
            (2 * layer.heads, padded_head(layer.head_dim) * _NUMBER_BYTES[dtype] + scale_bytes)
            for layer in layers or [_NO_LAYER]
        ]
        token_bytes = max(*(size for _, size in sizes), min(parts * size for parts, size in sizes))  # in a page
        page_bytes = PAGE_TOKENS * token_bytes
        self.places: list[tuple[int, int]] = []  # of each layer: its first row in tables, and how many it has
        self._parts: list[tuple[int, int]] = []  # of each row of tables, as `sizes`
        windows: list[int | None] = []
        for layer, (parts, size) in zip(layers, sizes, strict=False):
            rows = next(n for n in range(1, parts + 1) if parts % n == 0 and parts // n * size <= token_bytes)
            self.places.append((len(windows), rows))
            self._parts += [(parts // rows, size)] * rows
            windows += [layer.window] * rows
        num_kv_heads = sizes[0][0] // 2 if len(set(sizes)) == 1 else 1  # as KV is written out
        state_bytes = 4 * state_values
        checkpoints = checkpoints_in(budget_bytes, state_bytes)
        fixed_bytes = STATES_PER_SEQUENCE * state_bytes
        super().__init__(budget_bytes - checkpoints * state_bytes, PAGE_TOKENS, page_bytes, windows, fixed_bytes)
        self.layout = KVLayout(
            f"native {written_by}",
            self.need.units,
            num_kv_heads,
            token_bytes // (2 * num_kv_heads),
            BLOCK_TOKENS,
            self.need.windowed_units,
            self.window,
            state_bytes,
        )
        self.repeat: Callable[[SegmentArrays], None]  # updates states with draft tokens again; the group sets it
        self._values, self._kept_values = state_values, kept_values
        self._states: dict[int, Float32] = {}  # by handle
        self._passes: dict[int, StateArrays] = {}  # the last pass of each sequence, by handle
        self._recurrent = {}
        self.checkpoints = Checkpoints(checkpoints)
        self._spare: list[memoryview] = []  # of states that nothing refers to any more, within the budget
        self._most_checkpoints = checkpoints
        memory = new_memory(self.free_units * page_bytes)
        self.arena: Array = np.frombuffer(memory, np.uint8).reshape(self.free_units, page_bytes)

    @property
    def resident_bytes(self) -> int:
        states = (len(self._states) + len(self._spare)) * self.layout.state_bytes
        return resident_bytes(self.arena.ctypes.data, self.arena.nbytes) + states

    def reserve(self, tokens: int) -> int:
        handle = super().reserve(tokens)
        if self._values:
            self._states[handle] = self._new_states()
            self._restore_states(handle, None)
        return handle

    def release(self, handle: int) -> None:
        super().release(handle)
        self._states.pop(handle, None)
        self._passes.pop(handle, None)

    def _new_states(self) -> Float32:
        """Returns an uninitialized array for the states of a sequence, in reused memory if possible."""
        spare, checkpoints, states_of, most = self._spare, self.checkpoints, self._states, self._most_checkpoints

        def give_back(memory: memoryview) -> None:
            if len(spare) + len(checkpoints) < most + len(states_of):  # each sequence has reserved STATES_PER_SEQUENCE
                spare.append(memory)

        memory = spare.pop() if spare else new_memory(4 * self._values)
        states = np.frombuffer(memory, np.float32)
        weakref.finalize(states, give_back, memory).atexit = False
        return states

    def _copy_of(self, states: Float32) -> Float32:
        copy = self._new_states()
        copy[:] = states
        return copy

    def begin_pass(self, handle: int, tokens: int, draft_tokens: int) -> StateArrays | None:
        """Prepares a sequence for a pass that adds `tokens`, of which the last `draft_tokens` may be rejected.

        Returns the arrays that C needs for recurrent states. None without recurrent layers. Call `end_pass` after the pass.
        """
        if not self._values:
            return None
        copied_at = np.array(sorted(self._begin_recurrent(handle, tokens, draft_tokens)), np.int64)
        alone = len(copied_at) == 1  # then `end_pass` keeps the copy as it is
        copies = self._new_states()[None] if alone else np.empty((len(copied_at), self._values), np.float32)
        kept = np.empty((draft_tokens, self._kept_values), np.float32)
        first_draft = self.filled(handle) + tokens - draft_tokens
        self._passes[handle] = StateArrays(self._states[handle], copies, copied_at, kept, first_draft)
        return self._passes[handle]

    def end_pass(self, handle: int, draft_tokens: int) -> None:
        """Keeps the recurrent states that the pass has copied."""
        if self._values:
            done = self._passes[handle]
            alone = len(done.copies) == 1  # then it is no part of a larger array
            copied = {
                int(at): states if alone else self._copy_of(states)
                for at, states in zip(done.copied_at, done.copies, strict=True)
            }
            self._passes[handle] = replace(done, copies=done.copies[:0], copied_at=done.copied_at[:0])
            self._end_recurrent(handle, draft_tokens, copied)

    def state_out(self, handle: int, tokens: int) -> bytes:
        states = self._states_at(handle, tokens) if self._values else None
        return b"" if states is None else states.tobytes()

    def state_in(self, handle: int, tokens: int, data: memoryview) -> None:
        self._continue(handle, tokens, self._copy_of(np.frombuffer(data, np.float32)))

    def _copied_states(self, handle: int) -> Float32:
        return self._copy_of(self._states[handle])

    def _restore_states(self, handle: int, states: Float32 | None) -> None:
        self._states[handle][:] = 0 if states is None else states

    def _repeat(self, handle: int, position: int, tokens: int) -> None:
        self.repeat(SegmentArrays(np.empty(0, np.int32), position, tokens, self._passes[handle]))

    def copy_out(self, handle: int, first: int, target: Array, *, windowed: bool = False) -> None:
        if not target.size:  # layers with windows have dropped all of these tokens
            return
        blocks = target.reshape(*target.shape[:3], target.shape[3] // BLOCK_TOKENS, BLOCK_TOKENS * target.shape[4])
        for row, own in zip(np.flatnonzero(self.windowed == windowed), blocks, strict=True):
            pages, places = self._places(handle, row, first, own.shape[2])
            written = self._blocks(row)[pages, :, places].reshape(len(pages), -1)
            whole = np.zeros((len(pages), own[:, :, 0].size), np.uint8)  # smaller heads leave the end of a page unused
            whole[:, : written.shape[1]] = written
            own[...] = whole.reshape(len(pages), *own.shape[:2], own.shape[3]).transpose(1, 2, 0, 3)

    def copy_in(self, handle: int, first: int, source: Array, *, windowed: bool = False) -> None:
        if not source.size:  # layers with windows have dropped all of these tokens
            return
        blocks = source.reshape(*source.shape[:3], source.shape[3] // BLOCK_TOKENS, BLOCK_TOKENS * source.shape[4])
        for row, own in zip(np.flatnonzero(self.windowed == windowed), blocks, strict=True):
            pages, places = self._places(handle, row, first, own.shape[2])
            arena = self._blocks(row)
            whole = own.transpose(2, 0, 1, 3).reshape(len(pages), -1)
            written = whole[:, : arena.shape[1] * arena.shape[3]]
            arena[pages, :, places] = written.reshape(len(pages), arena.shape[1], arena.shape[3])

    def _blocks(self, row: Any) -> Array:
        """Returns a view of the arena for one row of a table: [pages, keys and values of heads, blocks, bytes of a block]."""
        parts, size = self._parts[row]
        return self.arena[:, : parts * PAGE_TOKENS * size].reshape(
            len(self.arena), parts, PAGE_TOKENS // BLOCK_TOKENS, BLOCK_TOKENS * size
        )

    def _places(self, handle: int, layer: Any, first: int, blocks: int) -> tuple[Array, Array]:
        """Returns the pages of `blocks` blocks of BLOCK_TOKENS tokens from token `first` on, and their places in the pages."""
        pages, places = np.divmod(np.arange(blocks) + first // BLOCK_TOKENS, PAGE_TOKENS // BLOCK_TOKENS)
        if self.windowed[layer]:
            pages %= self.need.ring_blocks
        return self.tables[handle][layer, pages], places

    def _copy_blocks(self, sources: Array, targets: Array) -> None:
        self.arena[targets] = self.arena[sources]
