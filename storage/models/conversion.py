"""Converts tensors of a checkpoint to those of a published model: floats, int8, four bits, or the blocks of a GGUF file.

In int8, the matrices of layers are I8 with a scale for each row; in q4, they have four bits (`q4`). In both, embedding and head
are in `blocks`: a GGUF file's own, or Q8_0. Other tensors are bfloat16 in int8 and float32 in q4. Only layers in C run int8 and
q4 (`checks`). In kept, every tensor keeps the checkpoint's format if that is a float type or one of `blocks`. Other tensors
become bfloat16.
"""

import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final, cast

import msgspec
import numpy as np
from numpy.typing import NDArray

from storage.checkpoints.checkpoint import Blocks, FourBits, SourceTensor
from storage.errors import CheckpointInvalid
from storage.floats import FLOATS, FloatName, Floats, as_bytes, read_floats, rounded
from storage.models import q4
from storage.models.blocks import (
    BLOCK,
    FORMATS,
    GROUP,
    BlockFormat,
    Packing,
    floats_of,
    pack,
    packed_shape,
    read_blocks,
)
from storage.models.checks import is_layer_matrix
from storage.models.model_repository import Dtype
from storage.models.object_writer import TargetTensor
from storage.models.q4 import dequantize, quantize

_INT8_MAX: Final = 127
_OUTER_MATRICES: Final = (
    "embed_tokens.weight", "embed_tokens_per_layer.weight", "embed_in.weight", "lm_head.weight", "embed_out.weight",
)  # fmt: skip
# The type of tensors that are not quantized.
_FLOATS_OF: Final[Mapping[Dtype, FloatName]] = {
    "float32": "F32", "bfloat16": "BF16", "float16": "F16", "int8": "BF16", "q4": "F32", "kept": "BF16",
}  # fmt: skip


@dataclass(slots=True)
class RoundingError:
    """The largest difference between a weight and its published value, and the largest magnitude of a weight.

    Thread-safe.
    """

    largest: float = 0.0
    largest_weight: float = 0.0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def note(self, weights: Floats, published: Floats) -> None:
        with np.errstate(invalid="ignore"):
            errors = published - weights
        error, weight = _largest_magnitude(errors), _largest_magnitude(weights)
        with self._lock:
            self.largest, self.largest_weight = max(self.largest, error), max(self.largest_weight, weight)


def _largest_magnitude(numbers: Floats) -> float:
    """The largest magnitude of the finite numbers; 0 if no number is finite."""
    largest = max(float(numbers.max(initial=0)), -float(numbers.min(initial=0)))
    return largest if np.isfinite(largest) else float(np.abs(numbers).max(initial=0, where=np.isfinite(numbers)))


def convert_tensor(
    name: str, source: SourceTensor, dtype: Dtype, error: RoundingError | None = None
) -> dict[str, TargetTensor]:
    """The tensors to store for one tensor of the checkpoint, by name.

    These are one tensor in the wanted type, or a matrix and the tensors that describe it. error: records the rounding error of
    each block when the block is converted. Raises CheckpointInvalid for a tensor that is no float.
    """
    if source.dtype not in FLOATS:
        raise CheckpointInvalid(f"tensor {name!r} is {source.dtype}, no float; publish the unquantized checkpoint")
    if dtype == "kept":
        if source.read_blocks is not None and len(source.shape) == 2 and (form := FORMATS.get(str(source.stored_as))):
            return _matrix_in_blocks(name, source, form, error)
        stored_as = source.stored_as or source.dtype
        kept = "F32" if stored_as == "F64" else stored_as if stored_as in FLOATS else "BF16"
        return {name: _float_tensor(name, source, cast("FloatName", kept), error)}
    in_layer, outside = is_layer_matrix(name, source.shape), name.endswith(_OUTER_MATRICES)
    if dtype not in ("int8", "q4") or not (in_layer or outside):
        return {name: _float_tensor(name, source, _FLOATS_OF[dtype], error)}
    if outside and source.shape[1] % BLOCK == 0:
        if source.read_blocks is not None and (form := FORMATS.get(str(source.stored_as))):
            return _matrix_in_blocks(name, source, form, error)
        return _q8_0_matrix(name, source, error)
    return {name: _q4_matrix(name, source, error)} if dtype == "q4" and in_layer else _int8_matrix(name, source, error)


def _float_tensor(name: str, source: SourceTensor, dtype: FloatName, error: RoundingError | None) -> TargetTensor:
    def blocks() -> Iterator[memoryview]:
        for block in source.blocks():
            if source.dtype == dtype:
                yield block
                continue
            values = read_floats(block, source.dtype)
            converted = rounded(values, dtype)
            if dtype == "F16" and np.isinf(converted).any() and not np.isinf(values).any():
                raise CheckpointInvalid(f"tensor {name!r} has values beyond float16; publish it as bfloat16 or float32")
            data = as_bytes(converted)
            if error is not None:
                error.note(values, read_floats(data, dtype))
            yield data

    return TargetTensor(dtype, source.shape, blocks)


def _int8_matrix(name: str, source: SourceTensor, error: RoundingError | None) -> dict[str, TargetTensor]:
    """A matrix in int8 and its scales: `weight[i, j] = int8[i, j] * scale[i]`, scale[i] = largest magnitude in row i / 127.

    The scales are known after the matrix has been iterated over, and are written after it.
    """
    scales: list[memoryview] = []

    def blocks() -> Iterator[memoryview]:
        scales.clear()
        for block in source.blocks():
            values = read_floats(block, source.dtype).reshape(-1, source.shape[1])
            weights, ends = _int8(values)
            if not np.isfinite(ends).all():
                raise _not_finite(name, "int8")
            if error is not None:
                error.note(values, weights * ends[:, None])
            scales.append(as_bytes(ends))
            yield as_bytes(weights)

    return {
        name: TargetTensor("I8", source.shape, blocks),
        f"{name}_scale": TargetTensor("F32", source.shape[:1], lambda: iter(scales)),
    }


def _q4_matrix(name: str, source: SourceTensor, error: RoundingError | None) -> TargetTensor:
    """A matrix packed as in `q4`.

    Four bits of a checkpoint stay as they are. Other weights are rounded with the least square error.
    """

    outs, width = source.shape

    def blocks() -> Iterator[memoryview]:
        for first, last in source.row_ranges(GROUP):
            if source.read_four_bits is not None:
                rows = source.read_four_bits(first, last)
            else:
                values = read_floats(source.read_rows(first, last), source.dtype)
                rows = FourBits(*quantize(values.reshape(last - first, -1)))
            if not (np.isfinite(rows.scales).all() and np.isfinite(rows.minima).all()):
                raise _not_finite(name, "q4")
            packed = q4.pack(rows.quants, rows.scales, rows.minima)
            if error is not None:
                values = read_floats(source.read_rows(first, last), source.dtype).reshape(last - first, width)
                error.note(values, dequantize(packed, last - first, width))
            yield as_bytes(packed)

    return TargetTensor("U8", q4.packed_shape(outs, width), blocks)


def _matrix_in_blocks(
    name: str, source: SourceTensor, form: BlockFormat, error: RoundingError | None
) -> dict[str, TargetTensor]:
    """A matrix packed as in `blocks`, its format, and the order of its columns if they are stored in another order."""
    stored, order = source.read_blocks, source.order
    assert stored is not None

    def read(first: int, last: int) -> Blocks:
        rows = stored(first, last)
        blocks = rows if isinstance(rows, Blocks) else read_blocks(form, rows)
        if form.zero and blocks.codes.max(initial=0) >> form.low:
            raise CheckpointInvalid(f"tensor {name!r} has integers of more than {form.low} bits; fetch the checkpoint again")
        nan = (blocks.codes & 127 == 127) & form.floats
        if nan.any() or (form.scale_bytes == 4 and not np.isfinite(blocks.scales).all()):
            raise _not_finite(name, "kept")
        if error is not None:
            values = read_floats(source.read_rows(first, last), source.dtype).reshape(last - first, -1)
            error.note(values if order is None else values[:, order], floats_of(form, blocks))
        return blocks

    in_blocks = _in_blocks(name, source, form, read)
    if order is not None:
        in_blocks[f"{name}_order"] = TargetTensor("I32", order.shape, lambda: iter([as_bytes(order)]))
    return in_blocks


def _q8_0_matrix(name: str, source: SourceTensor, error: RoundingError | None) -> dict[str, TargetTensor]:
    """A matrix of floats, converted to Q8_0: blocks of 32 weights, whose scale is the largest magnitude divided by 127."""
    form = FORMATS["Q8_0"]

    def read(first: int, last: int) -> Blocks:
        values = read_floats(source.read_rows(first, last), source.dtype).reshape(last - first, -1)
        weights, scales = _int8(values.reshape(-1, BLOCK))
        stored = scales.astype(np.float16)
        if not np.isfinite(stored).all():
            raise _not_finite(name, "Q8_0")
        blocks = Blocks((weights.view(np.uint8) ^ 128).reshape(values.shape), stored.reshape(last - first, -1))
        if error is not None:
            error.note(values, floats_of(form, blocks))
        return blocks

    return _in_blocks(name, source, form, read)


def _in_blocks(
    name: str, source: SourceTensor, form: BlockFormat, read: Callable[[int, int], Blocks]
) -> dict[str, TargetTensor]:
    """The tensors of a packed matrix and of its format. read: returns rows [first, last) in blocks."""
    outs, width = source.shape
    packing = msgspec.json.encode(Packing(form.name, (outs, width)))

    def packed() -> Iterator[memoryview]:
        for first, last in source.row_ranges(GROUP):
            yield as_bytes(pack(form, read(first, last)))

    return {
        name: TargetTensor("U8", packed_shape(form, outs, width), packed),
        f"{name}_format": TargetTensor("U8", (len(packing),), lambda: iter([memoryview(packing)])),
    }


def _int8(rows: Floats) -> tuple[NDArray[np.int8], Floats]:
    """Quantizes rows [out, in] to weights [out, in] and scales [out]. Weights whose scale is not finite are arbitrary."""
    scales = np.abs(rows).max(axis=1, keepdims=True) / np.float32(_INT8_MAX)
    scales[scales == 0] = 1.0
    with np.errstate(invalid="ignore"):
        weights = rows / scales
        np.rint(weights, out=weights)
        np.clip(weights, -_INT8_MAX, _INT8_MAX, out=weights)
        return weights.astype(np.int8), scales[:, 0]


def _not_finite(name: str, dtype: str) -> CheckpointInvalid:
    beyond = "" if dtype in ("int8", "kept") else ", or beyond float16"
    return CheckpointInvalid(
        f"tensor {name!r} has values that are infinite or no numbers{beyond}, which {dtype} cannot hold; "
        "publish it as bfloat16 or float32"
    )
