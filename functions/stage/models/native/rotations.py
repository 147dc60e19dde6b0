"""Computes the cosines and sines by which a pass rotates queries and keys."""

from collections.abc import Sequence
from typing import Final

import numpy as np
from msgspec.structs import replace

from functions.stage.models.floats import Array, Float32
from functions.stage.models.layer_group import Segment
from functions.stage.models.llama.rope import rope_frequencies
from storage.checkpoints.decoder import Decoder, Rotation

_TABLE_ROWS: Final = 1024  # positions that are added to a table at a time: 1.4 ms for heads of 64


class Rotations:
    """All rotations of a model: one for each rope, and another if a rope scales queries with their position."""

    def __init__(self, model: Decoder) -> None:
        self.tables: list[RotationTable] = []
        self._long_tables: dict[int, RotationTable] = {}  # of LongRoPE, by the number of the table that they replace
        self._numbers: dict[str, tuple[int, int]] = {}
        self.short_context: int | None = None  # see `LayerGroup`
        for name, rotation in model.ropes.items():
            self.tables.append(RotationTable(rotation, model.attention.head_dim))
            of_keys = of_queries = len(self.tables)
            if rotation.query_growth is not None:
                self.tables.append(RotationTable(rotation, model.attention.head_dim, of_queries=True))
                of_queries += 1
            self._numbers[name] = of_queries, of_keys
            if rotation.parameters["rope_type"] == "longrope":
                long = {**rotation.parameters, "short_factor": rotation.parameters["long_factor"]}
                self._long_tables[of_keys - 1] = RotationTable(replace(rotation, parameters=long), model.attention.head_dim)
                original = rotation.parameters["original_max_position_embeddings"]
                self.short_context = min(original, self.short_context or original)
        self._head_dim = model.attention.head_dim

    def numbers(self, rope: str | None) -> dict[str, int]:
        """Returns the numbers of the rotations of a layer's queries and keys in `c/native.h`: from 1 on; 0 for no rotation."""
        of_queries, of_keys = (0, 0) if rope is None else self._numbers[rope]
        return {"query_rotation": of_queries, "key_rotation": of_keys}

    def __call__(self, positions: Sequence[int], segments: Sequence[Segment]) -> Float32:
        """Returns the cosines and sines of all rotations, float32 [rotations, len(positions), head_dim / 2, 2].

        positions: of all tokens of the segments, in order.
        """
        if len(self.tables) == 1 and not self._long_tables:
            return self.tables[0](positions)[None]
        rows: Float32 = np.empty((len(self.tables), len(positions), self._head_dim // 2, 2), np.float32)
        for number, table in enumerate(self.tables):
            rows[number] = table(positions)
        first = 0
        for segment in segments if self._long_tables else ():
            end = first + segment.length
            if segment.is_long:
                for number, table in self._long_tables.items():
                    rows[number, first:end] = table(positions[first:end])
            first = end
        return rows


class RotationTable:
    """Cosines and sines of one rotation, kept in a table that grows with the largest position so far.

    Angles are float32, as in transformers. Cosines and sines are rounded from float64, so that they do not depend on a CPU's
    vector instructions. Pairs of a head that are not rotated have cosine 1 and sine 0.
    """

    def __init__(self, rotation: Rotation, head_dim: int, *, of_queries: bool = False) -> None:
        """Creates an empty table. of_queries: whether to multiply by `Rotation.query_growth`, which grows with positions."""
        self._frequencies, self._scaling = rope_frequencies(rotation.parameters, rotation.rotated)
        self._growth = rotation.query_growth if of_queries else None
        self._table: Float32 = np.empty((0, head_dim // 2, 2), np.float32)

    def __call__(self, positions: Sequence[int]) -> Float32:
        """Returns cosine and sine of each pair of a head at `positions` [n], as float32 [n, head_dim / 2, 2]."""
        if (end := max(positions) + 1) > len(self._table):
            parts = [self._table]
            for first in range(len(self._table), end, _TABLE_ROWS):
                parts.append(self._rows(np.arange(first, first + _TABLE_ROWS)))
            self._table = np.concatenate(parts)
        rows: Float32 = self._table[np.array(positions)]
        return rows

    def _rows(self, positions: Array) -> Float32:
        turns: Float32 = np.empty((len(positions), *self._table.shape[1:]), np.float32)
        turns[...] = 1, 0
        wide = (positions.astype(np.float32)[:, None] * self._frequencies).astype(np.float64)
        rotated = np.stack((np.cos(wide), np.sin(wide)), axis=-1).astype(np.float32)
        turns[:, : len(self._frequencies)] = rotated * np.float32(self._scaling)
        if self._growth is not None:
            beta, context = self._growth
            turns *= (1 + beta * np.log1p(positions // context)).astype(np.float32)[:, None, None]
        return turns
