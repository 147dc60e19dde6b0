"""Tensors of a checkpoint turned into those of a publication: another float type, int8 with a scale for each row, or four bits.

int8 has the matrices of layers as I8; norms, embedding and head stay bfloat16. q4 has them in four bits (`q4`), embedding and
head as I8, and what is no matrix as float32. Stages run both with Llama-shaped models alone (`quantizable`).
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np

from storage.checkpoints.checkpoint import SourceTensor
from storage.errors import CheckpointInvalid
from storage.models.floats import FLOATS, FloatName, as_bytes, read_floats, rounded
from storage.models.model_repository import Dtype
from storage.models.object_writer import TargetTensor
from storage.models.quantizable import is_layer_matrix, is_outer_matrix
from storage.models.quantized import Int8Matrix, Q4Matrix

_FLOATS_OF: Final[Mapping[Dtype, FloatName]] = {
    "float32": "F32", "bfloat16": "BF16", "float16": "F16", "int8": "BF16", "q4": "F32",
}  # fmt: skip
"""What tensors are that are not quantized."""


def convert_tensor(name: str, source: SourceTensor, dtype: Dtype, keep_wide: Collection[str]) -> dict[str, TargetTensor]:
    """What is stored for a tensor, by name: itself, or a quantized matrix, with its scales where they lie apart.

    `keep_wide` names matrices, such as down_proj, that stay bfloat16 in an int8 or q4 publication. Raises CheckpointInvalid
    for a tensor that is no float.
    """
    if source.dtype not in FLOATS:
        raise CheckpointInvalid(f"tensor {name!r} is {source.dtype}, no float; publish the unquantized checkpoint")
    in_layer, outside = is_layer_matrix(name, source.shape), is_outer_matrix(name)
    if dtype in ("int8", "q4") and (in_layer or outside) and name.split(".")[-2] in keep_wide:
        return {name: _Converted(name, source, "BF16")}
    if dtype == "q4" and in_layer:
        return {name: Q4Matrix(name, source)}
    if (dtype == "int8" and in_layer) or (dtype == "q4" and outside):
        matrix = Int8Matrix(name, source)
        return {name: matrix, f"{name}_scale": matrix.scale}
    return {name: _Converted(name, source, _FLOATS_OF[dtype])}


@dataclass(frozen=True, slots=True)
class _Converted:
    name: str
    source: SourceTensor
    dtype: FloatName

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
        return as_bytes(converted)
