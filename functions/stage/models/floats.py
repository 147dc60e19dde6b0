"""Floating-point arrays at the border of a layer group: numpy's, under the names that dtypes have on the wire.

numpy has no bfloat16: such numbers are uint16 here, the upper halves of the float32 of the same value, which are also the
wire's bytes. Who computes with them widens them to float32 first.
"""

from collections.abc import Mapping
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt

from storage.models.floats import rounded

Array = npt.NDArray[Any]
Float32 = npt.NDArray[np.float32]
HiddenDtype = Literal["F32", "BF16", "F16"]
"""By its name on the wire and in safetensors."""

DTYPES: Final[Mapping[str, type[np.generic]]] = {"F32": np.float32, "BF16": np.uint16, "F16": np.float16}
"""What an array of each holds."""
HIDDEN_DTYPES: Final[Mapping[str, HiddenDtype]] = {
    "float32": "F32",
    "bfloat16": "BF16",
    "float16": "F16",
    "int8": "BF16",
    "q4": "BF16",
}
"""dtype of a publication → hidden states between its stages. Beside weights of 8 or 4 bits, bf16 halves the wire, and
perplexity does not tell (docs/log.md)."""

_BF16_MAGNITUDE: Final = 0x7FFF
_BF16_INFINITY: Final = 0x7F80


def widened(numbers: Array, dtype: HiddenDtype) -> Float32:
    """Float32 of the same values, in memory of its own."""
    if dtype != "BF16":
        return numbers.astype(np.float32)
    bits = numbers.astype(np.uint32)
    bits <<= 16
    return bits.view(np.float32)


def narrowed(numbers: Float32, dtype: HiddenDtype) -> Array:
    """Contiguous float32, rounded to `dtype`; F32: the array itself."""
    return rounded(numbers, dtype)


def all_finite(numbers: Array, dtype: HiddenDtype) -> bool:
    return bool(np.isfinite(numbers).all()) if dtype != "BF16" else _all_finite(numbers)


def finite_rows(numbers: Array, dtype: HiddenDtype) -> npt.NDArray[np.bool_]:
    """bool [n]: whether all numbers of each of [n, width] are finite."""
    finite = (numbers & _BF16_MAGNITUDE) < _BF16_INFINITY if dtype == "BF16" else np.isfinite(numbers)
    rows: npt.NDArray[np.bool_] = np.all(finite, axis=-1)
    return rows


def _all_finite(bits: Array) -> bool:
    """Of bf16. A maximum is faster than a comparison of each."""
    return bits.size == 0 or int((bits & _BF16_MAGNITUDE).max()) < _BF16_INFINITY
