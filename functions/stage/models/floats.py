"""Hidden states as numpy arrays, which layer groups read and return. Dtypes have the names of the wire: F32, BF16, F16.

numpy has no bfloat16. Such numbers are uint16: the upper half of the float32 with the same value, as in events. Convert them
to float32 with `widened` before computing with them.
"""

from collections.abc import Mapping
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt

from storage.floats import rounded

Array = npt.NDArray[Any]
Float32 = npt.NDArray[np.float32]
HiddenDtype = Literal["F32", "BF16", "F16"]  # names of the wire and of safetensors

DTYPES: Final[Mapping[str, type[np.generic]]] = {"F32": np.float32, "BF16": np.uint16, "F16": np.float16}
HIDDEN_DTYPES: Final[Mapping[str, HiddenDtype]] = {
    "float32": "F32",
    "bfloat16": "BF16",
    "float16": "F16",
    "int8": "BF16",
    "q4": "BF16",
    "kept": "BF16",
}
"""Maps the dtype of a published model to the dtype of hidden states between its stages.

For int8, q4 and kept, bf16 halves the bytes sent and does not change perplexity (docs/log.md).
"""

_BF16_MAGNITUDE: Final = 0x7FFF
_BF16_INFINITY: Final = 0x7F80


def widened(numbers: Array, dtype: HiddenDtype) -> Float32:
    """Converts `numbers`, which have `dtype`, to float32. Always returns a new array."""
    if dtype != "BF16":
        return numbers.astype(np.float32)
    bits = numbers.astype(np.uint32)
    bits <<= 16
    return bits.view(np.float32)


narrowed: Final = rounded
"""narrowed(numbers, dtype) rounds contiguous float32 numbers to `dtype`. For F32 it returns the array itself."""


def all_finite(numbers: Array, dtype: HiddenDtype) -> bool:
    if dtype == "BF16":  # one maximum is faster than a comparison of each number
        return numbers.size == 0 or int((numbers & _BF16_MAGNITUDE).max()) < _BF16_INFINITY
    return bool(np.isfinite(numbers).all())


def finite_rows(numbers: Array, dtype: HiddenDtype) -> npt.NDArray[np.bool_]:
    """Returns for each row of `numbers` [n, width] whether all its numbers are finite, as bool [n]."""
    finite = (numbers & _BF16_MAGNITUDE) < _BF16_INFINITY if dtype == "BF16" else np.isfinite(numbers)
    rows: npt.NDArray[np.bool_] = np.all(finite, axis=-1)
    return rows
