"""Matrices in four bits: the layout that published models of dtype `q4` have and kernels read, and the rounding to it.

A matrix [outs, width] is cut along its width into blocks of 32 weights. weight = scale * q + minimum, with q 0 … 15. Scale and
minimum are float16, one of each for a block of a row. GGUF's Q4_1 has the same numbers; Q4_0 has minimum = -8 * scale.

A matrix is stored as `X.weight`, U8 [groups, blocks, 320], in the layout that `blocks` gives to Q4_1: 16 rows of outputs
together, 5 bits a weight. Padding rows and padding weights are zero bits. If the rows of several matrices form whole groups,
their groups can be concatenated to the stacked matrix.

The seven matrices of a layer are stored in this way. Embedding and head are I8 [outs, width] with `X.weight_scale` F32 [outs]
as in int8; all other tensors (gains of norms, biases) are F32.
"""

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from storage.checkpoints.checkpoint import Blocks
from storage.floats import Floats
from storage.models import blocks
from storage.models.blocks import BLOCK, FORMATS

_Q4_1: Final = FORMATS["Q4_1"]
_MAX_Q: Final = 15
_BLOCKS_AT_ONCE: Final = 4096  # as many as fit the processor's cache
# Steps tried between a block's smallest and largest weight. docs/log.md has what more of them gain.
_TRIED_STEPS: Final = (15.0, 13.8, 14.4, 15.6, 16.2, 16.8)

Array = NDArray[Any]


def packed_shape(outs: int, width: int) -> tuple[int, int, int]:
    """The shape [groups, blocks, 320] of a matrix [outs, width] after `pack`."""
    return blocks.packed_shape(_Q4_1, outs, width + -width % BLOCK)


def pack(quants: Array, scales: Array, minima: Array) -> Array:
    """Packs a matrix in four bits into the bytes that are published, U8 of `packed_shape`.

    quants: integers 0 … 15 [outs, width]. scales, minima: [outs, blocks], converted to float16.

    Pieces of a matrix may be packed separately and concatenated, if all but the last have whole groups. Raises ValueError for
    shapes that do not match, and for numbers that q4 cannot hold.
    """
    outs, width = quants.shape
    _, count, _ = packed_shape(outs, width)
    for name, numbers in (("scales", scales), ("minima", minima)):
        if numbers.shape != (outs, count):
            raise ValueError(f"{name} are {list(numbers.shape)}; a matrix [{outs}, {width}] has [{outs}, {count}]")
        if not np.isfinite(numbers.astype(np.float16)).all():
            raise ValueError(f"{name} are beyond float16; publish the model as bfloat16")
    if quants.size and (quants.max() > 15 or quants.min() < 0):
        raise ValueError(f"quants are {quants.min()} to {quants.max()}, and four bits hold 0 to 15")
    padded = np.zeros((outs, count * BLOCK), np.uint8)
    padded[:, :width] = quants
    return blocks.pack(_Q4_1, Blocks(padded, scales.astype(np.float16), minima.astype(np.float16)))


def dequantize(packed: Array, outs: int, width: int) -> Array:
    """The weights of a packed matrix, float32 [outs, width]."""
    return blocks.floats_of(_Q4_1, blocks.unpack(_Q4_1, packed, outs))[:, :width]


def packed_rows(packed: Array, rows: Array) -> Array:
    """Selects rows of a packed matrix, as `blocks.packed_rows` does."""
    return blocks.packed_rows(_Q4_1, packed, rows)


def quantize(rows: Floats) -> tuple[NDArray[np.uint8], NDArray[np.float16], NDArray[np.float16]]:
    """Rounds rows of weights [outs, width] to four bits.

    Returns q 0 … 15 [outs, width], scales and minima [outs, blocks], as `pack` takes them.

    Several scales are tried for every block, and the one with the least square error is used. The scale that maps the block's
    smallest and largest weight to 0 and 15 often fits the other weights badly. So scales near it are tried, too. Each of them
    rounds the weights; least squares over the rounded weights then give scale and minimum. A scale or minimum beyond float16 is
    infinite.
    """
    outs, width = rows.shape
    # A last block that is not whole repeats its row's last weight.
    padding = -width % BLOCK
    blocks = (np.pad(rows, ((0, 0), (0, padding)), mode="edge") if padding else rows).reshape(-1, BLOCK)
    quants = np.empty(blocks.shape, np.uint8)
    scales, minima = (np.empty(len(blocks), np.float16) for _ in range(2))
    with np.errstate(over="ignore", invalid="ignore"):
        for first in range(0, len(blocks), _BLOCKS_AT_ONCE):
            some = slice(first, first + _BLOCKS_AT_ONCE)
            scales[some], minima[some] = _best_ends(blocks[some])
            found = blocks[some] - minima[some].astype(np.float32)[:, None]
            found *= _inverse(scales[some].astype(np.float32))[:, None]
            np.rint(found, out=found)
            quants[some] = np.clip(found, 0, _MAX_Q, out=found)
    return quants.reshape(outs, -1)[:, :width], scales.reshape(outs, -1), minima.reshape(outs, -1)


def _best_ends(blocks: Floats) -> tuple[Floats, Floats]:
    """Finds scale and minimum of each block for the least square error of those tried. Returns two arrays [blocks].

    blocks: weights [blocks, 32].
    """
    weights = np.ascontiguousarray(blocks.T)  # the sums of all blocks are then sums of rows, which are fast
    mean = weights.mean(axis=0)
    weights -= mean  # else the sums below lose the digits in which close weights differ
    lowest = weights.min(axis=0)
    steps_of_one = _inverse(weights.max(axis=0) - lowest)
    raised = weights - lowest
    quants = np.empty_like(weights)
    best_gain, scales, minima = np.zeros_like(mean), np.zeros_like(mean), lowest.copy()
    for steps in _TRIED_STEPS:
        np.multiply(raised, np.float32(steps) * steps_of_one, out=quants)
        np.rint(quants, out=quants)
        np.minimum(quants, _MAX_Q, out=quants)
        # The weights' mean is 0, so the least square error is the sum of their squares less scale * products.
        products = np.einsum("ij,ij->j", quants, weights)
        mean_q = quants.mean(axis=0)
        scale = products * _inverse(np.einsum("ij,ij->j", quants, quants) - BLOCK * mean_q * mean_q)
        gain = scale * products
        better = gain > best_gain
        for best, found in ((best_gain, gain), (scales, scale), (minima, -scale * mean_q)):
            np.copyto(best, found, where=better)
    return scales, minima + mean


def _inverse(numbers: Floats) -> Floats:
    """1 / number for each number; 0 for a 0, which means that all weights of a block are equal."""
    return np.divide(1, numbers, out=np.zeros_like(numbers), where=numbers != 0)
