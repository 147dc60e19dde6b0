"""Hidden states on the wire ↔ the numpy arrays that a layer group takes and gives."""

from typing import Final

import numpy as np

from eventing.wire.events import Tensor
from functions.stage.models.floats import DTYPES, Array, HiddenDtype, narrowed, widened

_LEAST_SCALE: Final = np.finfo(np.float32).tiny  # rows with a smaller scale become zeros
_MOST_SCALE: Final = np.nextafter(np.finfo(np.float32).max / np.float32(127), np.float32(0))  # 127 times it is still finite


def hidden_array(hidden: Tensor, dtype: HiddenDtype) -> Array:
    """Hidden states in `dtype`. Of any wire dtype but I8 this is a view of the body's bytes.

    I8 has 8 bits a number and a scale a row. A row whose scale is not finite becomes a row that is not finite.
    """
    if hidden.dtype != "I8":
        return np.frombuffer(hidden.data, DTYPES[hidden.dtype]).reshape(hidden.shape)
    rows = np.frombuffer(hidden.data, _row_of(hidden.shape[1]))
    with np.errstate(over="ignore", invalid="ignore"):
        return narrowed(rows["numbers"] * rows["scale"][:, None], dtype)


def wire_tensor(hidden: Array, dtype: HiddenDtype, wire_dtype: str) -> Tensor:
    """The tensor of finite hidden states [n, hidden_size], n > 0. Copies nothing if `dtype` is the wire's.

    I8 scales each row by itself, so that its bits do not depend on the other rows: its largest number becomes 127 or -127.
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
    return np.dtype([("scale", "<f4"), ("numbers", "i1", (hidden_size,))])
