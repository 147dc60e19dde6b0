"""How much is computed together. No numba here: what is compiled must not be imported before its target is selected."""

from typing import Final

LANES: Final = 16
"""Of a vector: 32-bit numbers."""
OUTS: Final = 4
"""Rows of weights in a tile."""
ROWS: Final = 4
"""Most rows of activations in a tile."""
TILE: Final = OUTS * ROWS
SUMS: Final = 2 * TILE
"""Floats at the beginning of a thread's scratch memory, for the sums of two tiles."""
STEP: Final = 32
"""Sums run over multiples of this many products."""
BLOCK_ROWS: Final = 64
"""So many rows go through a matrix together: rounded to 16 bits, they stay in the second level of the cache."""
VECTORS: Final = 4
"""Queries that read keys and values together."""
QUERIES: Final = 8
"""Those of a chunk, whose keys and values are laid out for them."""
PHASES: Final = 7
"""Of a layer, one after the other; what is in one is computed in any order."""
UNIT_BYTES: Final = 98_304
"""Of weights in a piece of work: some microseconds."""
LINE_BYTES: Final = 64
"""Of the cache: threads' memory does not share one."""
COLUMNS: Final = 32
"""Of a tile whose columns lie side by side in pairs."""
