"""Reads floats of a checkpoint into numpy and rounds them to published types; the bytes equal those that torch writes.

numpy has no bfloat16. A bfloat16 is the upper half of a float32, rounded to the nearest, ties to even.
"""

from collections.abc import Mapping
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

FLOATS: Final = frozenset({"F64", "F32", "F16", "BF16"})  # readable types, by the names of safetensors
FloatName = Literal["F32", "F16", "BF16"]  # published types
Floats = NDArray[np.float32]

_NUMPY: Final[Mapping[str, np.dtype[Any]]] = {"F64": np.dtype("<f8"), "F32": np.dtype("<f4"), "F16": np.dtype("<f2")}
_QUIET_NAN: Final = 0x7FC0


def read_floats(block: memoryview, dtype: str) -> Floats:
    """Reads the numbers in `block`, which are of type `dtype`, as a flat array. Numbers beyond float32 become infinite."""
    if dtype == "BF16":
        return (np.frombuffer(block, "<u2").astype(np.uint32) << 16).view(np.float32)
    with np.errstate(over="ignore"):
        values: Floats = np.frombuffer(block, _NUMPY[dtype]).astype(np.float32, copy=False)
    return values


def rounded(values: Floats, dtype: FloatName) -> NDArray[Any]:
    """Rounds `values` to `dtype`. bfloat16 is returned as its bits, uint16. For F16, numbers beyond float16 become infinite."""
    if dtype == "BF16":
        return bfloat16_bits(values)
    with np.errstate(over="ignore"):
        converted: NDArray[Any] = values.astype(_NUMPY[dtype], copy=False)
    return converted


def bfloat16_bits(values: Floats) -> NDArray[np.uint16]:
    """The bits of `values` as bfloat16, rounded to the nearest with ties to even, as torch does."""
    bits = values.view(np.uint32)
    half = bits >> 16
    half &= 1
    half += 0x7FFF
    half += bits
    half >>= 16
    nearest = half.astype(np.uint16)
    nearest[np.isnan(values)] = _QUIET_NAN
    return nearest


def as_bytes(array: NDArray[Any]) -> memoryview:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
