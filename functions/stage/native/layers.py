"""A group's layers in C, over numpy arrays: one call per pass, whatever decode steps and prompt chunks it mixes."""

import ctypes
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from functions.stage.native.library import Library
from functions.stage.native.records import (
    MOST_THREADS,
    STEP,
    Array,
    Dtype,
    GroupRecord,
    LayerRecord,
    MatrixRecord,
    MemoryRecord,
    PassRecord,
    ProductRecord,
    memory_of,
    new_workspace,
)


@dataclass(frozen=True, slots=True)
class MatrixArrays:
    """A matrix [outs, width] in the arrays that C reads."""

    dtype: Dtype
    weights: Array  # [outs, width]: bf16 as its bits in int16; q4 in uint8, packed by storage/models/q4.py
    scales: Array | None = None  # float32 [outs], with int8
    biases: Array | None = None  # float32 [outs]
    q4_shape: tuple[int, int] | None = None  # [outs, width] of a q4 matrix, which its packed weights do not tell

    @property
    def shape(self) -> tuple[int, int]:
        """[outs, width]."""
        outs, width = self.q4_shape or self.weights.shape
        return outs, width


class NativeThreads:
    """A pool of threads that compute together. They end with this object."""

    def __init__(self, library: Library) -> None:
        self.pool = library.new_pool()
        weakref.finalize(self, library.functions["lamina_free_pool"], self.pool)


class NativeLayers:
    """The layers of a group. Arrays that it is given stay in use: the caller must not change them."""

    def __init__(self, library: Library, group: GroupRecord) -> None:
        """group: the sizes; its layers are set here."""
        self._library = library
        self._threads = NativeThreads(library)
        self._layers = (LayerRecord * group.num_layers)()
        self._kept: list[Array] = []  # arrays whose addresses the records have
        self._group = group
        group.layers = MemoryRecord(ctypes.addressof(self._layers), ctypes.sizeof(self._layers))
        self._workspace_array = np.empty(0, np.uint8)
        self._workspace = memory_of(self._workspace_array)

    def place(
        self,
        slot: int,
        matrices: Mapping[str, MatrixArrays],
        gains: Mapping[str, Array | None],
        keys: Array,
        values: Array,
        window: int | None,
        rotary: bool,
    ) -> None:
        """Sets the layer in `slot`. Names are those of `c/native.h`. Passes write to keys and values."""
        layer = self._layers[slot]
        for name, arrays in matrices.items():
            setattr(layer, name, matrix_record(arrays, self._kept))
        for name, array in {**gains, "keys": keys, "values": values}.items():
            setattr(layer, name, memory_of(array))
            if array is not None:
                self._kept.append(array)
        layer.window, layer.rotary = window or 0, rotary

    def run(self, hidden: Array, rotations: Array, segments: Sequence[tuple[int, int, int]], threads: int) -> None:
        """Overwrites hidden, float32 [n, hidden_size], with the layers' output. Raises NativeError.

        rotations: complex64 [n, head_dim / 2]. segments: first slot, position and length of each.
        """
        threads = min(threads, MOST_THREADS)
        most_tokens = 0
        for _, position, length in segments:
            most_tokens = max(most_tokens, position + length)
        needed = self._library.pass_bytes(self._group, len(hidden), most_tokens, threads)
        if self._workspace.bytes < needed:
            self._workspace_array = new_workspace(needed)
            self._workspace = memory_of(self._workspace_array)
        table = np.array(segments, np.int64)
        forward_pass = PassRecord(
            rows=len(hidden),
            threads=threads,
            hidden=memory_of(hidden),
            rotations=memory_of(rotations),
            segments=memory_of(table),
            workspace=self._workspace,
        )
        self._library.run_layers(self._threads.pool, self._group, forward_pass)

    def linear(self, matrix: MatrixArrays) -> "NativeLinear":
        """A matrix outside the layers, multiplied by the same threads."""
        return NativeLinear(self._library, self._threads, matrix)


class NativeLinear:
    """float32 [n, width] → float32 [n, outs]."""

    def __init__(self, library: Library, threads: NativeThreads, matrix: MatrixArrays) -> None:
        self._library = library
        self._threads = threads
        self._kept: list[Array] = []
        self._matrix = matrix_record(matrix, self._kept)

    def __call__(self, x: Array, threads: int) -> Array:
        """Raises NativeError."""
        threads = min(threads, MOST_THREADS)
        y = np.empty((len(x), self._matrix.outs), np.float32)
        if len(x) == 0:
            return y
        workspace = new_workspace(self._library.product_bytes(self._matrix, len(x), threads))
        product = ProductRecord(
            matrix=self._matrix,
            rows=len(x),
            threads=threads,
            x=memory_of(x),
            y=memory_of(y),
            workspace=memory_of(workspace),
        )
        self._library.multiply(self._threads.pool, product)
        return y


def matrix_record(matrix: MatrixArrays, kept: list[Array]) -> MatrixRecord:
    """Adds the matrix's arrays to `kept`. Copies weights only if their width is not a multiple of STEP."""
    outs, width = matrix.shape
    weights = matrix.weights
    if width % STEP and matrix.dtype is not Dtype.Q4:
        weights = np.pad(weights, ((0, 0), (0, -width % STEP)))
    kept += [array for array in (weights, matrix.scales, matrix.biases) if array is not None]
    return MatrixRecord(
        dtype=matrix.dtype,
        outs=outs,
        width=width,
        weights=memory_of(weights),
        scales=memory_of(matrix.scales),
        biases=memory_of(matrix.biases),
    )
