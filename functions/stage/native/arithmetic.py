"""Numbers, row by row: floats at an address, exp, rounding to 16 bits, RMSNorm. Loops that LLVM makes vectors of."""

from collections.abc import Callable
from typing import Any, Final

import numpy as np
from numba import carray, njit

from functions.stage.native.scalar_code import bits_of_float, float_of_bits, nearest, pointer
from functions.stage.native.shapes import ROWS

jit: Final = njit(nogil=True, error_model="numpy", fastmath={"reassoc", "nsz", "contract", "arcp"})
"""Sums may be reordered; infinities and NaN stay what they are."""

_SMALLEST: Final = np.int32(np.float32(1e-30).view(np.int32))
"""Bits of what a row of zeros is divided by. Positive floats are in the order of their bits, whose maximum vectors find."""


def by_rows(tile_of: Callable[[int], Any], most: int = ROWS) -> Any:
    """A function of the number of rows, 1 to `most`, and of what the tile for so many takes, as numba has no tables of them."""
    of_most = tile_of(most)
    if most == 1:

        @jit
        def only(rows: int, *arguments: Any) -> None:
            of_most(*arguments)

        return only
    fewer = by_rows(tile_of, most - 1)

    @jit
    def chosen(rows: int, *arguments: Any) -> None:
        if rows == most:
            of_most(*arguments)
        else:
            fewer(rows, *arguments)

    return chosen


@jit
def floats(address: int, rows: int, columns: int) -> Any:
    return carray(pointer(address), (rows, columns), np.float32)


@jit
def vector(address: int, size: int) -> Any:
    return carray(pointer(address), size, np.float32)


@jit
def integers(address: int, size: int) -> Any:
    return carray(pointer(address), size, np.int64)


@jit
def exp(x: np.float32) -> np.float32:
    """2^n times a polynomial (Cephes' expf) for x between -87 and 88, its limit beyond; relative error about 2e-7."""
    limited = x if x > np.float32(-87.0) else np.float32(-87.0)
    limited = limited if limited < np.float32(88.0) else np.float32(88.0)
    n = nearest(limited * np.float32(1.44269504))
    r = limited - n * np.float32(0.693359375) + n * np.float32(2.12194440e-4)
    y = np.float32(1.9875691500e-4)
    y = y * r + np.float32(1.3981999507e-3)
    y = y * r + np.float32(8.3334519073e-3)
    y = y * r + np.float32(4.1665795894e-2)
    y = y * r + np.float32(1.6666665459e-1)
    y = y * r + np.float32(5.0000001201e-1)
    y = y * r * r + r + np.float32(1.0)
    not_finite = x - x  # 0, or NaN
    return y * float_of_bits((np.int32(n) + np.int32(127)) << np.int32(23)) + not_finite


@jit
def bf16(x: np.float32) -> np.int16:
    """Rounded to the nearest, ties to even."""
    bits = bits_of_float(x)
    return np.int16((bits + np.int32(0x7FFF) + ((bits >> np.int32(16)) & np.int32(1))) >> np.int32(16))


@jit
def pack(int8: bool, largest_step: np.float32, row: Any, packed: Any) -> np.float32:
    """A row as 16-bit numbers, integers for an int8 matrix and bf16 for another, and what they are to be multiplied with."""
    if not int8:
        for i in range(len(row)):
            packed[i] = bf16(row[i])
        return np.float32(1.0)
    bits = np.int32(0)
    for i in range(len(row)):
        bits = max(bits, bits_of_float(row[i]) & np.int32(0x7FFFFFFF))
    largest = float_of_bits(max(bits, _SMALLEST))
    steps = largest_step / largest
    for i in range(len(row)):
        packed[i] = np.int16(nearest(row[i] * steps))
    return largest / largest_step


@jit
def normalize(row: Any, gain: Any, eps: np.float32, out: Any) -> None:
    total = np.float32(0)
    for i in range(len(row)):
        total += row[i] * row[i]
    inverse = np.float32(1) / np.sqrt(total / np.float32(len(row)) + eps)
    for i in range(len(row)):
        out[i] = row[i] * inverse * gain[i]
