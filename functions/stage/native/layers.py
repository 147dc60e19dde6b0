"""Layers of a group in C, over arrays: one call per pass, whatever mixture of decode steps and chunks of prompts it is."""

import ctypes
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from functions.stage.native import records
from functions.stage.native.library import Library
from functions.stage.native.records import MOST_THREADS, STEP, Array, Dtype, Memory


@dataclass(frozen=True, slots=True)
class Sizes:
    """Of a group."""

    num_layers: int
    hidden_size: int
    inner_size: int
    heads: int
    kv_heads: int
    head_dim: int
    eps: float
    capacity_tokens: int
    kv_dtype: Dtype


@dataclass(frozen=True, slots=True)
class MatrixArrays:
    """Weights [outs, width], bf16 as its bits in int16, q4 uint8 as storage/models/q4.py packs them; scales float32 [outs] with
    int8; biases float32 [outs] or None.
    """

    dtype: Dtype
    weights: Array
    scales: Array | None = None
    biases: Array | None = None
    q4_shape: tuple[int, int] | None = None
    """[outs, width] of a matrix in four bits, whose weights do not tell."""

    @property
    def shape(self) -> tuple[int, int]:
        """[outs, width]."""
        outs, width = self.q4_shape or self.weights.shape
        return outs, width


class Threads:
    """That compute together. Those beside the caller's end with this object."""

    def __init__(self, library: Library) -> None:
        self.pool = library.new_pool()
        weakref.finalize(self, library.free_pool, self.pool)


class Layers:
    """Arrays that are given stay in use: the caller must not change them."""

    def __init__(self, library: Library, sizes: Sizes) -> None:
        self._library = library
        self._threads = Threads(library)
        self._sizes = sizes
        self._layers = (records.Layer * sizes.num_layers)()
        self._kept: list[Array] = []
        """What the records have the addresses of."""
        self._group = records.Group(
            layers=Memory(ctypes.addressof(self._layers), ctypes.sizeof(self._layers)),
            num_layers=sizes.num_layers,
            hidden_size=sizes.hidden_size,
            inner_size=sizes.inner_size,
            heads=sizes.heads,
            kv_heads=sizes.kv_heads,
            head_dim=sizes.head_dim,
            capacity_tokens=sizes.capacity_tokens,
            kv_dtype=sizes.kv_dtype,
            eps=sizes.eps,
        )
        self._workspace = np.empty(0, np.uint8)

    def place(
        self,
        slot: int,
        matrices: Mapping[str, MatrixArrays],
        gains: Mapping[str, Array | None],
        arena: tuple[Array, Array],
        window: int | None,
        rotary: bool,
    ) -> None:
        """The layer in `slot`. Names as in `c/native.h`; arena: keys and values, which are written to."""
        layer = self._layers[slot]
        for name, arrays in matrices.items():
            setattr(layer, name, matrix_record(arrays, self._kept))
        for name, gain in gains.items():
            setattr(layer, name, self._memory(gain))
        layer.keys, layer.values = map(self._memory, arena)
        layer.window, layer.rotary = window or 0, rotary

    def run(self, hidden: Array, rotations: Array, segments: Sequence[tuple[int, int, int]], threads: int) -> None:
        """hidden float32 [n, hidden_size], overwritten with the result; rotations complex64 [n, head_dim / 2]; segments: first
        slot, position and length of each. Raises Refused.
        """
        threads = min(threads, MOST_THREADS)
        table = np.array(segments, np.int64)
        most_tokens = int((table[:, 1] + table[:, 2]).max())
        needed = self._library.pass_bytes(self._group, len(hidden), most_tokens, threads)
        if len(self._workspace) < needed:
            self._workspace = records.aligned(needed)
        state = records.Pass(
            rows=len(hidden),
            threads=threads,
            hidden=Memory.of(hidden),
            rotations=Memory.of(rotations),
            segments=Memory.of(table),
            workspace=Memory.of(self._workspace),
        )
        self._library.run_layers(self._threads.pool, self._group, state)

    def linear(self, matrix: MatrixArrays) -> "Linear":
        """A matrix by itself, multiplied by the same threads."""
        return Linear(self._library, self._threads, matrix)

    def _memory(self, array: Array | None) -> Memory:
        if array is not None:
            self._kept.append(array)
        return Memory.of(array)


class Linear:
    """float32 [n, in] → float32 [n, out]."""

    def __init__(self, library: Library, threads: Threads, matrix: MatrixArrays) -> None:
        self._library = library
        self._threads = threads
        self._kept: list[Array] = []
        self._matrix = matrix_record(matrix, self._kept)

    def __call__(self, x: Array, threads: int) -> Array:
        """Raises Refused."""
        threads = min(threads, MOST_THREADS)
        y = np.empty((len(x), self._matrix.outs), np.float32)
        if len(x) == 0:
            return y
        workspace = records.aligned(self._library.product_bytes(self._matrix, len(x), threads))
        product = records.Product(
            matrix=self._matrix,
            rows=len(x),
            threads=threads,
            x=Memory.of(x),
            y=Memory.of(y),
            workspace=Memory.of(workspace),
        )
        self._library.multiply(self._threads.pool, product)
        return y


def matrix_record(matrix: MatrixArrays, kept: list[Array]) -> records.Matrix:
    """Its arrays go to `kept`; weights are copied only where their width is no whole number of steps."""
    outs, width = matrix.shape
    weights = matrix.weights
    if width % STEP and matrix.dtype is not Dtype.Q4:
        weights = np.pad(weights, ((0, 0), (0, -width % STEP)))
    kept += [array for array in (weights, matrix.scales, matrix.biases) if array is not None]
    return records.Matrix(
        dtype=matrix.dtype,
        outs=outs,
        width=width,
        weights=Memory.of(weights),
        scales=Memory.of(matrix.scales),
        biases=Memory.of(matrix.biases),
    )
