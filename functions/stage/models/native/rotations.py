"""Cosines and sines of rotary position embeddings, by position."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np

from functions.stage.models.floats import Float32
from functions.stage.models.llama.rope import rope_frequencies

_ROWS_AT_ONCE: Final = 1024
"""Positions that the table grows by: 1.4 ms for heads of 64."""


class Rotations:
    """A table that grows with the positions that come. Angles are float32, as transformers has them; their cosines and sines
    are rounded from float64, so that they do not depend on the vectors of a CPU."""

    def __init__(self, parameters: Mapping[str, Any], head_dim: int) -> None:
        """parameters: as `rope_parameters` returns them."""
        self._frequencies, self._scaling = rope_frequencies(parameters, head_dim)
        self._table: Float32 = np.empty((0, head_dim // 2, 2), np.float32)

    def __call__(self, positions: Sequence[int]) -> Float32:
        """[n, head_dim / 2, 2], cosine and sine."""
        if (end := max(positions) + 1) > len(self._table):
            self._grow(-(-end // _ROWS_AT_ONCE) * _ROWS_AT_ONCE)
        rows: Float32 = self._table[np.array(positions)]
        return rows

    def _grow(self, rows: int) -> None:
        parts = [self._table]
        for first in range(len(self._table), rows, _ROWS_AT_ONCE):
            angles = np.arange(first, first + _ROWS_AT_ONCE, dtype=np.float32)[:, None] * self._frequencies
            wide = angles.astype(np.float64)
            turns = np.stack((np.cos(wide), np.sin(wide)), axis=-1).astype(np.float32)
            parts.append(turns * np.float32(self._scaling))
        self._table = np.concatenate(parts)
