"""Converts between the tensor of an event and the numpy array of hidden states that a layer group reads and returns."""

from typing import Final

import numpy as np

from eventing.wire.events import Tensor
from functions.stage.models.floats import DTYPES, Array, HiddenDtype, narrowed, widened

_LEAST_SCALE: Final = np.finfo(np.float32).tiny  # rows with a smaller scale become zeros
_MOST_SCALE: Final = np.nextafter(np.finfo(np.float32).max / np.float32(127), np.float32(0))  # 127 times it is still finite


def hidden_array(hidden: Tensor, dtype: HiddenDtype) -> Array:
    """The hidden states of an event's tensor, in the group's dtype. A view of the tensor's bytes unless these are I8.

    I8 has 8 bits for each number and a float32 scale for each row. A row whose scale is not finite becomes numbers that are not
    finite, which later checks find.
    """
    if hidden.dtype != "I8":
        return np.frombuffer(hidden.data, DTYPES[hidden.dtype]).reshape(hidden.shape)
    rows = np.frombuffer(hidden.data, _row_of(hidden.shape[1]))
    with np.errstate(over="ignore", invalid="ignore"):
        return narrowed(rows["numbers"] * rows["scale"][:, None], dtype)


def wire_tensor(hidden: Array, dtype: HiddenDtype, wire_dtype: str) -> Tensor:
    """An event's tensor of hidden states [n, hidden_size], which must be finite; n > 0.

    dtype: of `hidden`. wire_dtype: I8, or the same dtype, for which contiguous arrays are not copied. I8 scales each row by
    itself, so that its largest number becomes 127 or -127.
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
    """The bytes of one I8 row: its scale, then its numbers."""
    return np.dtype([("scale", "<f4"), ("numbers", "i1", (hidden_size,))])
