"""Converts tensors of a checkpoint to those of a publication: another float type, int8 with a scale for each row, or four bits.

int8 has the matrices of layers as I8; norms, embedding and head stay bfloat16. q4 has them in four bits (`q4`), embedding and
head as I8, and all other tensors as float32. Stages run both for Llama-shaped models only (`checks`).
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from storage.checkpoints.checkpoint import FourBits, SourceTensor
from storage.errors import CheckpointInvalid
from storage.models.checks import is_layer_matrix, is_outer_matrix
from storage.models.floats import FLOATS, FloatName, Floats, as_bytes, read_floats, rounded
from storage.models.model_repository import Dtype
from storage.models.object_writer import TargetTensor
from storage.models.q4 import GROUP, pack, packed_shape, quantize

_INT8_MAX: Final = 127
# The type of tensors that are not quantized.
_FLOATS_OF: Final[Mapping[Dtype, FloatName]] = {
    "float32": "F32", "bfloat16": "BF16", "float16": "F16", "int8": "BF16", "q4": "F32",
}  # fmt: skip


def convert_tensor(name: str, source: SourceTensor, dtype: Dtype, keep_wide: Collection[str]) -> dict[str, TargetTensor]:
    """The stored tensors for one of the checkpoint, by name: itself, or a quantized matrix, in int8 with its scales.

    `keep_wide` names matrices, such as down_proj, that stay bfloat16 in an int8 or q4 publication. Raises CheckpointInvalid
    for a tensor that is no float.
    """
    if source.dtype not in FLOATS:
        raise CheckpointInvalid(f"tensor {name!r} is {source.dtype}, no float; publish the unquantized checkpoint")
    in_layer, outside = is_layer_matrix(name, source.shape), is_outer_matrix(name)
    if dtype in ("int8", "q4") and (in_layer or outside) and name.split(".")[-2] in keep_wide:
        return {name: _FloatTensor(name, source, "BF16")}
    if dtype == "q4" and in_layer:
        return {name: _Q4Matrix(name, source)}
    if (dtype == "int8" and in_layer) or (dtype == "q4" and outside):
        matrix = _Int8Matrix(name, source)
        return {name: matrix, f"{name}_scale": matrix.scale}
    return {name: _FloatTensor(name, source, _FLOATS_OF[dtype])}


@dataclass(frozen=True, slots=True)
class _FloatTensor:
    name: str
    source: SourceTensor
    dtype: FloatName

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.shape

    def blocks(self) -> Iterator[memoryview]:
        for block in self.source.blocks():
            if self.source.dtype == self.dtype:
                yield block
                continue
            values = read_floats(block, self.source.dtype)
            converted = rounded(values, self.dtype)
            if self.dtype == "F16" and np.isinf(converted).any() and not np.isinf(values).any():
                raise CheckpointInvalid(f"tensor {self.name!r} has values beyond float16; publish it as bfloat16 or float32")
            yield as_bytes(converted)


class _Int8Matrix:
    """Symmetric: `weight[i, j] = int8[i, j] * scale[i]`, scale = largest magnitude of output channel i / 127."""

    dtype = "I8"

    def __init__(self, name: str, source: SourceTensor) -> None:
        self._name = name
        self._source = source
        self.shape = source.shape
        self.scale = _Int8Scale(source.shape[:1], [])

    def blocks(self) -> Iterator[memoryview]:
        self.scale.written.clear()
        for block in self._source.blocks():
            weights, scales = _int8(read_floats(block, self._source.dtype).reshape(-1, self.shape[1]))
            if not np.isfinite(scales).all():
                raise _not_finite(self._name, "int8")
            self.scale.written.append(as_bytes(scales))
            yield as_bytes(weights)


@dataclass(frozen=True, slots=True)
class _Int8Scale:
    """Written after its matrix."""

    shape: tuple[int, ...]
    written: list[memoryview]  # by the matrix's last iteration
    dtype: str = "F32"

    def blocks(self) -> Iterator[memoryview]:
        yield from self.written


class _Q4Matrix:
    """As `q4` packs it: the numbers of a checkpoint that has four bits itself, else those with the least square error."""

    dtype = "U8"

    def __init__(self, name: str, source: SourceTensor) -> None:
        outs, width = source.shape
        self._name = name
        self._source = source
        self.shape = packed_shape(outs, width)

    def blocks(self) -> Iterator[memoryview]:
        for first, last in self._source.row_ranges(GROUP):
            if self._source.read_four_bits is not None:
                rows = self._source.read_four_bits(first, last)
            else:
                values = read_floats(self._source.read_rows(first, last), self._source.dtype)
                rows = FourBits(*quantize(values.reshape(last - first, -1)))
            if not (np.isfinite(rows.scales).all() and np.isfinite(rows.minima).all()):
                raise _not_finite(self._name, "q4")
            yield as_bytes(pack(rows.quants, rows.scales, rows.minima))


def _int8(rows: Floats) -> tuple[NDArray[np.int8], Floats]:
    """rows [out, in] → weights [out, in] and scales [out]. The weights of a scale that is not finite mean nothing."""
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
        f"tensor {name!r} has values that are infinite or no numbers{beyond}, which {dtype} cannot hold; "
        "publish it as bfloat16 or float32"
    )
