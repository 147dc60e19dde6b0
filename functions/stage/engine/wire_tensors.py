"""Converts between the tensor of an event and the numpy array of hidden states that a layer group reads and returns."""

from typing import Final

import numpy as np

from eventing.wire.events import Tensor
from functions.stage.models.floats import DTYPES, Array, HiddenDtype, narrowed, widened

_LEAST_SCALE: Final = np.finfo(np.float32).tiny  # rows with a smaller scale become zeros
_MOST_SCALE: Final = np.nextafter(np.finfo(np.float32).max / np.float32(127), np.float32(0))  # 127 times it is still finite


def hidden_array(hidden: Tensor, dtype: HiddenDtype) -> Array:
    """Returns the hidden states of an event's tensor as an array, a view of the tensor's bytes if possible.

    An I8 tensor has 8 bits for each number and a float32 scale for each row. It is converted to `dtype`, the dtype of the
    group. A row whose scale is not finite becomes numbers that are not finite; later checks find them.
    """
    if hidden.dtype != "I8":
        return np.frombuffer(hidden.data, DTYPES[hidden.dtype]).reshape(hidden.shape)
    rows = np.frombuffer(hidden.data, _row_of(hidden.shape[1]))
    with np.errstate(over="ignore", invalid="ignore"):
        return narrowed(rows["numbers"] * rows["scale"][:, None], dtype)


def wire_tensor(hidden: Array, dtype: HiddenDtype, wire_dtype: str) -> Tensor:
    """Returns hidden states [n, hidden_size] as a tensor for an event. They must be finite, and n > 0.

    dtype: of `hidden`. wire_dtype: either `dtype` or I8. With `dtype`, contiguous arrays are not copied. With I8, each row has
    a scale of its own, so that the largest number of the row becomes 127 or -127.
    """
    if wire_dtype != "I8":
        return Tensor(wire_dtype, hidden.shape, np.ascontiguousarray(hidden).data.cast("B"))
    numbers = widened(hidden, dtype)
    rows = np.empty(len(numbers), _row_of(numbers.shape[1]))
    scale = np.minimum(np.abs(numbers).max(axis=1) / np.float32(127), _MOST_SCALE)
    scale[scale < _LEAST_SCALE] = 1
    rows["scale"] = scale
    rows["numbers"] = np.rint(numbers / scale[:, None])
    return Tensor(wire_dtype, hidden.shape, rows.view(np.uint8).data.cast("B"))


def _row_of(hidden_size: int) -> np.dtype[np.void]:
    """Returns the layout of one row of an I8 tensor: the scale, then the numbers."""
    return np.dtype([("scale", "<f4"), ("numbers", "i1", (hidden_size,))])
