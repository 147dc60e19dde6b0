"""Matrices in eight and in four bits as they are written, block by block, from a checkpoint's floats or its own four bits."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from storage.checkpoints.checkpoint import FourBits, SourceTensor
from storage.errors import CheckpointInvalid
from storage.models.floats import Floats, as_bytes, read_floats
from storage.models.q4 import GROUP, pack, packed_shape
from storage.models.q4_quantize import quantize

_INT8_MAX: Final = 127


class Int8Matrix:
    """Symmetric: `weight[i, j] = int8[i, j] * scale[i]`, scale = largest magnitude of output channel i / 127."""

    dtype = "I8"

    def __init__(self, name: str, source: SourceTensor) -> None:
        self._name = name
        self._source = source
        self.shape = source.shape
        self.scale = Int8Scale(source.shape[:1], [])

    def blocks(self) -> Iterator[memoryview]:
        self.scale.written.clear()
        for block in self._source.blocks():
            weights, scales = _int8(read_floats(block, self._source.dtype).reshape(-1, self.shape[1]))
            if not np.isfinite(scales).all():
                raise _not_finite(self._name, "int8")
            self.scale.written.append(as_bytes(scales))
            yield as_bytes(weights)


@dataclass(frozen=True, slots=True)
class Int8Scale:
    """Written behind its matrix."""

    shape: tuple[int, ...]
    written: list[memoryview]
    """By the matrix's last iteration."""
    dtype: str = "F32"

    def blocks(self) -> Iterator[memoryview]:
        yield from self.written


class Q4Matrix:
    """As `q4` packs it: the numbers of a checkpoint that has four bits itself, else those of the least square error."""

    dtype = "U8"

    def __init__(self, name: str, source: SourceTensor) -> None:
        outs, width = source.shape
        self._name = name
        self._source = source
        self.shape = packed_shape(outs, width)

    def blocks(self) -> Iterator[memoryview]:
        for first, last in self._source.pieces(GROUP):
            rows = self._rows(first, last)
            if not (np.isfinite(rows.scales).all() and np.isfinite(rows.minima).all()):
                raise _not_finite(self._name, "q4")
            yield as_bytes(pack(rows.quants, rows.scales, rows.minima))

    def _rows(self, first: int, last: int) -> FourBits:
        if self._source.read_four_bits is not None:
            return self._source.read_four_bits(first, last)
        values = read_floats(self._source.read_rows(first, last), self._source.dtype)
        return FourBits(*quantize(values.reshape(last - first, -1)))


def _int8(rows: Floats) -> tuple[NDArray[np.int8], Floats]:
    """rows [out, in] → weights [out, in] and scales [out]; a scale that is not finite has weights that mean nothing."""
    scales = np.abs(rows).max(axis=1, keepdims=True) / np.float32(_INT8_MAX)
    scales[scales == 0] = 1.0
    with np.errstate(invalid="ignore"):
        weights = rows / scales
        np.rint(weights, out=weights)
        np.clip(weights, -_INT8_MAX, _INT8_MAX, out=weights)
        return weights.astype(np.int8), scales[:, 0]


def _not_finite(name: str, dtype: str) -> CheckpointInvalid:
    beyond = "" if dtype == "int8" else ", or beyond float16"
    return CheckpointInvalid(
        f"tensor {name!r} has values that are infinite or no numbers{beyond}, which {dtype} has none for; "
        "publish it as bfloat16 or float32"
    )
