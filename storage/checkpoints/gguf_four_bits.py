"""GGUF's Q4_0 and Q4_1 taken apart: the numbers of the file, which four bits of a publication hold without loss.

A block is 32 weights of a row (ggml-common.h): float16 `d`, in Q4_1 also float16 `m`, and 16 bytes, whose lower halves are q of
the first 16 weights and whose upper halves are q of the others. Q4_1 is d * q + m, Q4_0 is d * (q - 8).
"""

from collections.abc import Callable
from functools import partial
from typing import Final

import numpy as np
from numpy.typing import NDArray

from storage.checkpoints.checkpoint import FourBits

_Q4_0: Final = 2
_Q4_1: Final = 3
"""As GGMLQuantizationType numbers them."""
_ENDS_BYTES: Final = {_Q4_0: 2, _Q4_1: 4}
_Q_BYTES: Final = 16


def four_bits(kind: int) -> Callable[[NDArray[np.uint8]], FourBits] | None:
    """What takes rows of this type apart, given their bytes [rows, row_bytes]; None: the type is another."""
    return partial(_taken_apart, kind) if kind in _ENDS_BYTES else None


def _taken_apart(kind: int, rows: NDArray[np.uint8]) -> FourBits:
    ends_bytes = _ENDS_BYTES[kind]
    blocks = rows.reshape(len(rows), -1, ends_bytes + _Q_BYTES)
    q = blocks[..., ends_bytes:]
    ends = np.ascontiguousarray(blocks[..., :ends_bytes]).view("<f2")
    scales = ends[..., 0]
    with np.errstate(over="ignore"):  # what is infinite is refused where it would be written
        minima = ends[..., 1] if kind == _Q4_1 else scales * np.float16(-8)
    return FourBits(np.concatenate([q & 15, q >> 4], axis=-1).reshape(len(rows), -1), scales, minima)
