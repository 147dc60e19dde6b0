"""Tensors of a checkpoint turned into tensors of a publication: another float type, or int8 with a scale per output channel."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from storage.checkpoints.checkpoint import SourceTensor
from storage.errors import CheckpointInvalid
from storage.models.floats import FLOATS, Floats, read_floats, rounded
from storage.models.model_repository import Dtype
from storage.models.object_writer import TargetTensor
from storage.models.quantizable import is_layer_matrix

_FloatName = Literal["F32", "F16", "BF16"]
_SAFETENSORS_NAME: Final[Mapping[Dtype, _FloatName]] = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "int8": "BF16"}
_INT8_MAX: Final = 127


def convert_tensor(name: str, source: SourceTensor, dtype: Dtype, keep_wide: Collection[str]) -> dict[str, TargetTensor]:
    """What is stored for a decoder layer's tensor, by name: itself, or for int8 an I8 matrix and its F32 scales.

    `keep_wide` names matrices, such as down_proj, that stay bfloat16 in an int8 publication. Raises CheckpointInvalid
    for a tensor that is no float.
    """
    if source.dtype not in FLOATS:
        raise CheckpointInvalid(f"tensor {name!r} is {source.dtype}, no float; publish the unquantized checkpoint")
    if dtype == "int8" and is_layer_matrix(name, source.shape) and name.split(".")[-2] not in keep_wide:
        matrix = _Int8Matrix(name, source)
        return {name: matrix, f"{name}_scale": _Int8Scale(matrix)}
    return {name: _Converted(name, source, _SAFETENSORS_NAME[dtype])}


@dataclass(frozen=True, slots=True)
class _Converted:
    name: str
    source: SourceTensor
    dtype: _FloatName

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.shape

    def blocks(self) -> Iterator[memoryview]:
        for block in self.source.blocks():
            yield block if self.source.dtype == self.dtype else self._convert(block)

    def _convert(self, block: memoryview) -> memoryview:
        values = read_floats(block, self.source.dtype)
        converted = rounded(values, self.dtype)
        if self.dtype == "F16" and np.isinf(converted).any() and not np.isinf(values).any():
            raise CheckpointInvalid(f"tensor {self.name!r} has values beyond float16; publish it as bfloat16 or float32")
        return _bytes(converted)


class _Int8Matrix:
    """Symmetric: `weight[i, j] = int8[i, j] * scale[i]`, scale = largest magnitude of output channel i / 127."""

    dtype = "I8"

    def __init__(self, name: str, source: SourceTensor) -> None:
        self._name = name
        self._source = source
        self.shape = source.shape
        self.scales: list[memoryview] = []
        """Of the last iteration."""

    def blocks(self) -> Iterator[memoryview]:
        self.scales = []
        for block in self._source.blocks():
            weights, scales = _int8(read_floats(block, self._source.dtype).reshape(-1, self.shape[1]))
            if not np.isfinite(scales).all():
                raise CheckpointInvalid(
                    f"tensor {self._name!r} has values that are infinite or no numbers, which int8 has none for; "
                    "publish it as bfloat16 or float32"
                )
            self.scales.append(_bytes(scales))
            yield _bytes(weights)


def _int8(rows: Floats) -> tuple[NDArray[np.int8], Floats]:
    """rows [out, in] → weights [out, in] and scales [out]; a scale that is not finite has weights that mean nothing."""
    scales = np.abs(rows).max(axis=1, keepdims=True) / np.float32(_INT8_MAX)
    scales[scales == 0] = 1.0
    with np.errstate(invalid="ignore"):
        weights = rows / scales
        np.rint(weights, out=weights)
        np.clip(weights, -_INT8_MAX, _INT8_MAX, out=weights)
        return weights.astype(np.int8), scales[:, 0]


@dataclass(frozen=True, slots=True)
class _Int8Scale:
    matrix: _Int8Matrix
    dtype: str = "F32"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.matrix.shape[:1]

    def blocks(self) -> Iterator[memoryview]:
        yield from self.matrix.scales


def _bytes(array: NDArray[Any]) -> memoryview:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
