"""Matrices in four bits: the layout that publications of dtype `q4` hold and stages' kernels read, and the rounding to it.

A matrix [outs, width] is cut along its width into blocks of 32 weights. weight = scale * q + minimum, with q 0 … 15; scale and
minimum are float16, one of each for a block of a row. GGUF's Q4_1 has the same numbers; Q4_0 is minimum = -8 * scale.

A matrix is stored as `X.weight`, U8 [groups, blocks, 320]: a group is 16 rows of outputs, one for each 32-bit lane of a vector.
The 320 bytes of 32 weights in 16 rows:

    [4, 16, 4]   q: byte [part, row, i] has weight 8 * part + i of its row in its lower half, 8 * part + 4 + i in the upper
    [16]         scales, float16
    [16]         minima, float16

Padding rows and padding weights are zero bits. A kernel reads a group from begin to end, 5 bits a weight. The groups of
several matrices, concatenated, are the stacked matrix, if all rows form whole groups.

A q4 publication stores the seven matrices of a layer so. Embedding and head are I8 [outs, width] with `X.weight_scale` F32
[outs] as in int8; all other tensors (gains of norms, biases) are F32.
"""

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from storage.floats import Floats

BLOCK: Final = 32  # weights of a row that share scale and minimum
GROUP: Final = 16  # rows that are stored together
BLOCK_BYTES: Final = 320  # of a group
_Q_BYTES: Final = GROUP * BLOCK // 2
_MAX_Q: Final = 15
# Steps tried between a block's smallest and largest weight. docs/log.md has what more of them gain.
_TRIED_STEPS: Final = (15.0, 13.8, 14.4, 15.6, 16.2, 16.8)

Array = NDArray[Any]


def packed_shape(outs: int, width: int) -> tuple[int, int, int]:
    """The shape [groups, blocks, 320] of a matrix [outs, width] that `pack` has packed into bytes.

    groups: of 16 rows. blocks: of 32 weights of a row. 320: bytes of one block in the 16 rows of a group.
    """
    return -(-outs // GROUP), -(-width // BLOCK), BLOCK_BYTES


def pack(quants: Array, scales: Array, minima: Array) -> Array:
    """Packs a matrix in four bits into the bytes that are published, U8 of `packed_shape`.

    quants: integers 0 … 15 [outs, width]. scales, minima: [outs, blocks], converted to float16.

    Pieces of a matrix may be packed separately and concatenated, if all but the last have whole groups. Raises ValueError for
    shapes that do not match, and for numbers that q4 cannot hold.
    """
    outs, width = quants.shape
    groups, blocks, _ = packed_shape(outs, width)
    for name, numbers in (("scales", scales), ("minima", minima)):
        if numbers.shape != (outs, blocks):
            raise ValueError(f"{name} are {list(numbers.shape)}; a matrix [{outs}, {width}] has [{outs}, {blocks}]")
        if not np.isfinite(numbers.astype(np.float16)).all():
            raise ValueError(f"{name} are beyond float16; publish the model as bfloat16")
    if quants.size and (quants.max() > 15 or quants.min() < 0):
        raise ValueError(f"quants are {quants.min()} to {quants.max()}, and four bits hold 0 to 15")
    padded = np.zeros((groups * GROUP, blocks * BLOCK), np.uint8)
    padded[:outs, :width] = quants
    halves = padded.reshape(groups, GROUP, blocks, 4, 2, 4)
    packed = np.empty((groups, blocks, BLOCK_BYTES), np.uint8)
    q = packed[..., :_Q_BYTES].reshape(groups, blocks, 4, GROUP, 4)
    q[...] = (halves[..., 0, :] | halves[..., 1, :] << 4).transpose(0, 2, 3, 1, 4)
    packed[..., :_Q_BYTES] = q.reshape(groups, blocks, _Q_BYTES)
    ends = np.zeros((2, groups * GROUP, blocks), np.float16)
    ends[0, :outs], ends[1, :outs] = scales, minima
    in_groups = ends.reshape(2, groups, GROUP, blocks).transpose(1, 3, 0, 2)
    packed[..., _Q_BYTES:] = np.ascontiguousarray(in_groups).view(np.uint8).reshape(groups, blocks, -1)
    return packed


def unpack(packed: Array, outs: int, width: int) -> tuple[Array, Array, Array]:
    """The inverse of `pack`. Returns quants uint8 [outs, width], and scales and minima float16 [outs, blocks]."""
    groups, blocks, _ = packed.shape
    q = packed[..., :_Q_BYTES].reshape(groups, blocks, 4, GROUP, 4).transpose(0, 3, 1, 2, 4)
    quants = np.stack([q & 15, q >> 4], axis=-2).reshape(groups * GROUP, blocks * BLOCK)[:outs, :width]
    ends = np.ascontiguousarray(packed[..., _Q_BYTES:]).view(np.float16).reshape(groups, blocks, 2, GROUP)
    scales, minima = ends.transpose(2, 0, 3, 1).reshape(2, groups * GROUP, blocks)[:, :outs]
    return np.ascontiguousarray(quants), scales, minima


def dequantize(packed: Array, outs: int, width: int) -> Array:
    """The weights of a packed matrix, float32 [outs, width]."""
    quants, scales, minima = unpack(packed, outs, width)
    of_weight = [np.repeat(ends.astype(np.float32), BLOCK, axis=1)[:, :width] for ends in (scales, minima)]
    weights: Array = quants * of_weight[0] + of_weight[1]
    return weights


def packed_rows(packed: Array, rows: Array) -> Array:
    """Selects rows of a matrix in four bits, and returns them as a matrix that is packed like it.

    packed: U8 [groups, blocks, 320], from `pack`; it is not unpacked. rows: numbers of the rows to select, in the order of the
    result, in which each 16 of them form a group. Rows that the last group lacks are zero bits.
    """
    blocks = packed.shape[1]
    chosen = np.zeros(-(-len(rows) // GROUP) * GROUP, np.int64)
    chosen[: len(rows)] = rows
    group, lane = (index.reshape(-1, GROUP) for index in np.divmod(chosen, GROUP))
    taken = np.empty((len(group), blocks, BLOCK_BYTES), np.uint8)
    start = 0
    for parts, count, lane_dtype in ((4, _Q_BYTES, np.uint32), (2, BLOCK_BYTES - _Q_BYTES, np.uint16)):
        lanes = np.ascontiguousarray(packed[..., start : start + count]).view(lane_dtype).reshape(-1, blocks, parts, GROUP)
        # Advanced indices on both sides of a slice come first: [groups, lanes, blocks, parts].
        found = lanes[group, :, :, lane].transpose(0, 2, 3, 1)
        found.reshape(-1, blocks, parts, GROUP)[len(rows) // GROUP :, ..., len(rows) % GROUP or GROUP :] = 0
        taken[..., start : start + count] = np.ascontiguousarray(found).view(np.uint8).reshape(-1, blocks, count)
        start += count
    return taken


def quantize(rows: Floats) -> tuple[NDArray[np.uint8], NDArray[np.float16], NDArray[np.float16]]:
    """Rounds rows of weights [outs, width] to four bits.

    Returns q 0 … 15 [outs, width], scales and minima [outs, blocks], as `pack` takes them.

    Every block gets the scale and minimum with the least square error of those tried. The scale that makes its smallest and
    largest weight 0 and 15 often fits the others badly, so some scales near it are tried too. Each of them rounds the weights;
    least squares over these give scale and minimum. A scale or minimum beyond float16 is infinite.
    """
    outs, width = rows.shape
    # A last block that is not whole repeats its row's last weight.
    padding = -width % BLOCK
    blocks = (np.pad(rows, ((0, 0), (0, padding)), mode="edge") if padding else rows).reshape(-1, BLOCK)
    with np.errstate(over="ignore", invalid="ignore"):
        ends = _best_ends(blocks)
        scales, minima = (end.astype(np.float16) for end in ends)
        quants = _rounded(blocks, minima.astype(np.float32), _inverse(scales.astype(np.float32))).astype(np.uint8)
    return quants.reshape(outs, -1)[:, :width], scales.reshape(outs, -1), minima.reshape(outs, -1)


def _best_ends(blocks: Floats) -> tuple[Floats, Floats]:
    """For each row of `blocks` [blocks, 32] the scale and minimum with the least square error of those tried: two arrays
    [blocks]."""
    mean = blocks.mean(axis=1)
    centred = blocks - mean[:, None]  # else the sums below lose the digits in which close weights differ
    lowest, highest = centred.min(axis=1), centred.max(axis=1)
    best_error = np.full(len(blocks), np.inf, np.float32)
    scales, minima = np.zeros_like(mean), np.zeros_like(mean)
    for steps in _TRIED_STEPS:
        quants = _rounded(centred, lowest, np.float32(steps) * _inverse(highest - lowest))
        scale, minimum = _least_squares(centred, quants)
        quants *= scale[:, None]
        quants += minimum[:, None]
        quants -= centred
        error = np.einsum("ij,ij->i", quants, quants)
        better = error < best_error
        best_error[better], scales[better], minima[better] = error[better], scale[better], minimum[better]
    return scales, minima + mean


def _rounded(blocks: Floats, minima: Floats, inverse_scales: Floats) -> Floats:
    """Rounds each weight to its q 0 … 15, returned as float, by the minimum and 1 / scale of its block.

    blocks: [blocks, 32]. minima, inverse_scales: [blocks], or one scale for all.
    """
    quants = blocks - minima[:, None]
    quants *= inverse_scales[:, None]
    np.rint(quants, out=quants)
    return np.clip(quants, 0, _MAX_Q, out=quants)


def _least_squares(centred: Floats, quants: Floats) -> tuple[Floats, Floats]:
    """Scale and minimum of each block with the least sum of (scale * q + minimum - weight)².

    centred: weights whose mean in each block is 0. quants: their q.
    """
    mean_q = quants.mean(axis=1)
    spread = np.einsum("ij,ij->i", quants, quants) - BLOCK * mean_q * mean_q
    scale = np.einsum("ij,ij->i", quants, centred) * _inverse(spread)
    return scale, -scale * mean_q


def _inverse(numbers: Floats) -> Floats:
    """1 / number for each number; 0 for a 0, which means that all weights of a block are equal."""
    return np.divide(1, numbers, out=np.zeros_like(numbers), where=numbers != 0)
