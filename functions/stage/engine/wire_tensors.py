"""What travels in a Batch ↔ numpy's arrays, as the border of a layer group has them."""

from typing import Final

import numpy as np

from eventing.wire.events import Tensor
from functions.stage.models.floats import DTYPES, Array, Float32, HiddenDtype, narrowed, widened

_LEAST_SCALE: Final = np.finfo(np.float32).tiny
"""A row that would take a smaller one is zeros."""
_MOST_SCALE: Final = np.nextafter(np.finfo(np.float32).max / np.float32(127), np.float32(0))
"""So that 127 of it are still a number."""


def token_array(token_ids: memoryview) -> Array:
    """int64 [tokens]: a copy, because embeddings want another width than the wire has."""
    return np.array(token_ids, dtype=np.int64)


def hidden_array(hidden: Tensor, dtype: HiddenDtype) -> Array:
    """In `dtype`: the array over the very bytes of the body, where these are of it. Else they are 8 bits and a scale for each
    row; one whose scale is no finite number becomes one that is not finite."""
    if hidden.dtype != "I8":
        return np.frombuffer(hidden.data, DTYPES[hidden.dtype]).reshape(hidden.shape)
    rows = np.frombuffer(hidden.data, _row_of(hidden.shape[1]))
    with np.errstate(over="ignore", invalid="ignore"):
        return narrowed(rows["numbers"] * rows["scale"][:, None], dtype)


def wire_tensor(hidden: Array, dtype: HiddenDtype, wire_dtype: str) -> Tensor:
    """Of [n, hidden_size] with n > 0, finite. Where `dtype` travels as it is, the array's own memory as bytes, without a copy
    where it is contiguous."""
    if wire_dtype == "I8":
        return Tensor(wire_dtype, hidden.shape, _in_8_bits(widened(hidden, dtype)).data.cast("B"))
    return Tensor(wire_dtype, hidden.shape, np.ascontiguousarray(hidden).data.cast("B"))


def _in_8_bits(hidden: Float32) -> Array:
    """Each row by itself, so that its bits do not depend on its company: the largest number of a row becomes 127 or -127."""
    rows = np.empty(len(hidden), _row_of(hidden.shape[1]))
    scale = np.minimum(np.abs(hidden).max(axis=1) / np.float32(127), _MOST_SCALE)
    scale[scale < _LEAST_SCALE] = 1
    rows["scale"] = scale
    rows["numbers"] = np.rint(hidden / scale[:, None])
    return rows.view(np.uint8)


def _row_of(hidden_size: int) -> np.dtype[np.void]:
    return np.dtype([("scale", "<f4"), ("numbers", "i1", (hidden_size,))])
