"""RMSNorm ahead of the head, by numpy: one row of 576 takes 12 µs, 256 rows 160 (Xeon with AMX, one thread)."""

import numpy as np

from functions.stage.models.floats import Float32


class RmsNorm:
    """x * gain / sqrt(mean(x²) + eps), row by row: each gets the same bits in any company."""

    def __init__(self, gain: Float32, eps: float) -> None:
        self._gain = gain
        self._eps = np.float32(eps)

    def __call__(self, x: Float32) -> Float32:
        """Contiguous float32 [n, size] → the same."""
        with np.errstate(over="ignore", invalid="ignore"):  # rows that are not finite are found behind it
            lengths = np.square(x).sum(axis=-1, keepdims=True)
            lengths /= x.shape[-1]
            lengths += self._eps
            y: Float32 = x / np.sqrt(lengths, out=lengths)
            y *= self._gain
        return y
