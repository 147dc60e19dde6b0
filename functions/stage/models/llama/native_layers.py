"""The layers of a Llama-shaped group in machine code: what numba made of `kernels`, on tensors in their plain layout.

One call per pass, whatever mixture of decode steps and chunks of prompts it is.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final

import numpy as np
import torch

from functions.stage.models.layer_group import Segment
from functions.stage.models.llama.config import LlamaConfig
from functions.stage.models.llama.kv_pool import KVPool
from functions.stage.models.llama.layer import LayerWeights, Places
from functions.stage.models.llama.linear import Matrix, stacked
from functions.stage.native import machine_code
from functions.stage.native.openmp import OpenMP
from functions.stage.native.shapes import BLOCK_ROWS, COLUMNS, LANES, LINE_BYTES, OUTS, PHASES, QUERIES, ROWS, SUMS, VECTORS
from functions.stage.native.tables import GROUP, LAYER, PASS, PRODUCT

_LARGEST_WEIGHT: Final = 127
_LAID_OUT_ROWS: Final = 16
"""Of a chunk, from which on its sequence's keys and values are laid out for it."""


class NativeLayers:
    """Layers of matrices in int8 or bf16, with a KV arena in bf16."""

    def __init__(self, model: LlamaConfig, first_layer: int, pool: KVPool) -> None:
        """Raises NoOpenMP."""
        self._model = model
        self._first_layer = first_layer
        self._pool = pool
        self._openmp = OpenMP.of_torch()
        self._code = machine_code.for_this_machine()
        self._layers = np.zeros(pool.num_layers, LAYER)
        self._kept: list[torch.Tensor] = []
        """What the tables have the addresses of."""
        self._group = self._group_table()

    def place(self, layer: int, weights: LayerWeights) -> None:
        """layer: number in the whole model."""
        slot = layer - self._first_layer
        entry = self._layers[slot]
        for name in ("input_gain", "qk_gain", "mlp_gain"):
            gain = getattr(weights, name)
            entry[name] = 0 if gain is None else self._address(gain.float())
        (qkv,) = _of_one_kind(weights.qkv, together=True)
        gate, up = _of_one_kind([weights.gate, weights.up])
        for name, matrix in (("qkv", qkv), ("out", weights.out), ("gate", gate), ("up", up), ("down", weights.down)):
            self._fill(entry[name], matrix)
        keys, values = self._pool.arena(slot)
        entry["keys"], entry["values"] = keys.data_ptr(), values.data_ptr()
        entry["window"] = self._model.windows[layer] or np.iinfo(np.int64).max
        entry["rotary"] = self._model.rotary[layer]

    def __call__(self, hidden: torch.Tensor, segments: Sequence[Segment], places: Places) -> torch.Tensor:
        """hidden float32 [n, hidden_size], overwritten with the result. As many threads as torch's operators take."""
        state = _State(self._model, self._pool.num_layers, hidden, segments, places, torch.get_num_threads())
        self._run(self._code.run_layers, state.table, state.threads)
        return hidden

    def linear(self, matrix: Matrix) -> "NativeLinear | None":
        """A matrix by itself; None for one whose outputs are no whole number of tiles."""
        if len(matrix.weight) % OUTS:
            return None
        table = np.zeros(1, PRODUCT)
        self._fill(table[0]["matrix"], matrix)
        return NativeLinear(table, partial(self._run, self._code.run_product), len(matrix.weight))

    def _run(self, function: int, table: Any, threads: int) -> None:
        tables = np.array([self._group.ctypes.data, table.ctypes.data], dtype=np.int64)
        self._openmp.run(function, tables.ctypes.data, threads)

    def _fill(self, entry: Any, matrix: Matrix) -> None:
        outs, width = matrix.weight.shape
        wide = matrix.scale is None
        entry["weights"] = self._address(matrix.weight.bfloat16() if wide else matrix.weight)
        entry["scales"] = self._address(torch.ones(outs) if matrix.scale is None else matrix.scale)
        entry["biases"] = self._address(torch.zeros(outs) if matrix.bias is None else matrix.bias.float())
        entry["int8"], entry["outs"], entry["width"] = not wide, outs, width

    def _group_table(self) -> Any:
        model = self._model
        table = np.zeros(1, GROUP)
        lane_products = math.ceil(_widest(model) / LANES)
        table["layers"] = self._layers.ctypes.data
        table["num_layers"] = len(self._layers)
        table["largest"] = min(32_767, (2**31 - 1) // (_LARGEST_WEIGHT * lane_products))
        table["eps"] = model.rms_norm_eps
        table["heads"], table["kv_heads"], table["head_dim"] = model.num_heads, model.num_kv_heads, model.head_dim
        table["capacity"] = self._pool.capacity_tokens
        table["thread_number"], table["threads"] = self._openmp.thread_number, self._openmp.threads
        table["give_way"] = self._openmp.give_way
        return table

    def _address(self, tensor: torch.Tensor) -> int:
        tensor = tensor.contiguous()
        self._kept.append(tensor)
        return tensor.data_ptr()


class NativeLinear:
    """float32 or bf16 [n, in] → float32 [n, out]."""

    def __init__(self, table: Any, run: Callable[[Any, int], None], outs: int) -> None:
        self._table = table
        self._run = run
        self._outs = outs

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        x = x.to(torch.float32).contiguous()
        threads = torch.get_num_threads()
        product = torch.empty(len(x), self._outs)
        scratch_bytes = _matrix_scratch_bytes(x.shape[1])
        scratch, counters = torch.empty(threads * scratch_bytes, dtype=torch.uint8), _counters(1, threads)
        table = self._table.copy()
        table["rows"], table["scratch_bytes"] = len(x), scratch_bytes
        for name, tensor in (("source", x), ("product", product), ("scratch", scratch), ("counters", counters)):
            table[name] = tensor.data_ptr()
        self._run(table, threads)
        return product


class _State:
    """Memory of one pass, and its table."""

    def __init__(
        self,
        model: LlamaConfig,
        num_layers: int,
        hidden: torch.Tensor,
        segments: Sequence[Segment],
        places: Places,
        threads: int,
    ) -> None:
        rows = len(hidden)
        self.threads = threads
        bundles, blocks = _bundles(segments, places)
        most_tokens = _rounded_up(max(places.positions) + 1, COLUMNS)
        scratch_bytes = _scratch_bytes(model, most_tokens)
        self.table = np.zeros(1, PASS)
        self.table["rows"], self.table["num_bundles"], self.table["most_tokens"] = rows, len(bundles), most_tokens
        self.table["num_blocks"], self.table["scratch_bytes"] = len(blocks), scratch_bytes
        laid = len(blocks) * COLUMNS * model.num_kv_heads * model.head_dim
        self._tensors = {
            "hidden": hidden,
            "rotations": places.rotations,
            "slots": places.slots,
            "positions": torch.tensor(places.positions),
            "bundles": torch.tensor(bundles),
            "blocks": torch.tensor(blocks, dtype=torch.int64),
            "laid_keys": torch.empty(laid, dtype=torch.bfloat16),
            "laid_values": torch.empty(laid, dtype=torch.bfloat16),
            "heads": torch.empty(rows, (model.num_heads + 2 * model.num_kv_heads) * model.head_dim),
            "attended": torch.empty(rows, model.num_heads * model.head_dim),
            "inner": torch.empty(rows, model.intermediate_size),
            "scratch": torch.empty(threads * scratch_bytes, dtype=torch.uint8),
            "counters": _counters(num_layers * PHASES, threads),
        }
        for name, tensor in self._tensors.items():
            self.table[name] = tensor.data_ptr()


def _bundles(segments: Sequence[Segment], places: Places) -> tuple[list[tuple[int, int, int]], list[tuple[int, int]]]:
    """Bundles, at most VECTORS rows of a segment, QUERIES where it is laid out: first row, rows, first block or -1; and blocks.

    Keys and values are laid out anew where a chunk is long enough to pay for it.
    """
    bundles: list[tuple[int, int, int]] = []
    blocks: list[tuple[int, int]] = []
    begin = 0
    for segment in segments:
        end = begin + segment.length
        first_block = -1
        if segment.length >= _LAID_OUT_ROWS:
            first_block = len(blocks)
            tokens = segment.position + segment.length
            first_slot = int(places.slots[begin]) - segment.position
            blocks += [(first_slot + token, min(COLUMNS, tokens - token)) for token in range(0, tokens, COLUMNS)]
        together = VECTORS if first_block < 0 else QUERIES
        bundles += [(row, min(together, end - row), first_block) for row in range(begin, end, together)]
        begin = end
    return bundles, blocks


def _counters(phases: int, threads: int) -> torch.Tensor:
    return torch.zeros(phases * (threads + 1) * LINE_BYTES // 8, dtype=torch.int64)


def _of_one_kind(matrices: Sequence[Matrix], *, together: bool = False) -> Sequence[Matrix]:
    """All of them int8, or all of them bf16, as far as they can be with some wide already; `together`: as one."""
    if len({matrix.weight.dtype for matrix in matrices}) > 1:
        matrices = [_wide(matrix) for matrix in matrices]
    return stacked(matrices) if together else matrices


def _wide(matrix: Matrix) -> Matrix:
    weight = matrix.weight if matrix.scale is None else matrix.weight * matrix.scale.unsqueeze(1)
    return Matrix(weight.bfloat16(), None, None if matrix.bias is None else matrix.bias.float())


def _scratch_bytes(model: LlamaConfig, most_tokens: int) -> int:
    """Of one thread."""
    of_attention = 4 * SUMS + QUERIES * (2 * model.head_dim + 6 * most_tokens)
    return max(_matrix_scratch_bytes(_widest(model)), _rounded_up(of_attention, LINE_BYTES))


def _matrix_scratch_bytes(width: int) -> int:
    """Sums, scales of the rows, a normalized row, and a block of packed rows."""
    floats = SUMS + (BLOCK_ROWS + ROWS) * OUTS + _rounded_up(width, LANES)
    return _rounded_up(4 * floats + 2 * BLOCK_ROWS * width, LINE_BYTES)


def _widest(model: LlamaConfig) -> int:
    """Of the rows that a matrix is multiplied with."""
    return max(model.hidden_size, model.intermediate_size, model.num_heads * model.head_dim)


def _rounded_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
