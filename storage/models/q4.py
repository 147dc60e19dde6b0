"""Matrices in four bits, as publications of dtype `q4` hold them and as the kernel of stages reads them.

A matrix [outs, width] is cut along its width into blocks of 32 weights; weight = scale * q + minimum, where q is 0 … 15, and
scale and minimum are float16, one of each for a block of a row. Those are the numbers of GGUF's Q4_1; Q4_0 is minimum = -8 *
scale.

Stored as `X.weight`, U8 [groups, blocks, 320]: a group is 16 rows of outputs, one for each 32-bit lane of a vector. The 320
bytes of 32 weights in 16 rows:

    [4, 16, 4]   q: byte [part, row, i] has weight 8 * part + i of its row in its lower half, 8 * part + 4 + i in the upper
    [16]         scales, float16
    [16]         minima, float16

Rows behind the last one and weights behind the width's end are zeros in all of their bits. A kernel reads a group from its
begin to its end, 5 bits a weight; groups of several matrices one behind the other are the matrices stacked, where their rows
are whole groups.

In a q4 publication the seven matrices of a layer are stored so; embedding and head are I8 [outs, width] with
`X.weight_scale` F32 [outs] as in int8, and what is no matrix (gains of norms, biases) is F32.
"""

from typing import Any, Final

import numpy as np
import numpy.typing as npt

BLOCK: Final = 32
"""Weights of a row that share scale and minimum."""
GROUP: Final = 16
"""Rows that lie together."""
BLOCK_BYTES: Final = 320
"""Of a group."""
_Q_BYTES: Final = GROUP * BLOCK // 2

Array = npt.NDArray[Any]


def packed_shape(outs: int, width: int) -> tuple[int, int, int]:
    """Of the U8 tensor of a matrix [outs, width]."""
    return -(-outs // GROUP), -(-width // BLOCK), BLOCK_BYTES


def pack(quants: Array, scales: Array, minima: Array) -> Array:
    """U8 `packed_shape` of quants [outs, width], integers 0 … 15, and scales and minima [outs, blocks], as float16.

    Rows may come in pieces: packed pieces one behind the other are the matrix, where all but the last have whole groups. Raises
    ValueError for shapes that do not belong together, and for numbers that q4 has no bits for.
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
    """What `pack` was given: quants uint8 [outs, width], scales and minima float16 [outs, blocks]."""
    groups, blocks, _ = packed.shape
    q = packed[..., :_Q_BYTES].reshape(groups, blocks, 4, GROUP, 4).transpose(0, 3, 1, 2, 4)
    quants = np.stack([q & 15, q >> 4], axis=-2).reshape(groups * GROUP, blocks * BLOCK)[:outs, :width]
    ends = np.ascontiguousarray(packed[..., _Q_BYTES:]).view(np.float16).reshape(groups, blocks, 2, GROUP)
    scales, minima = ends.transpose(2, 0, 3, 1).reshape(2, groups * GROUP, blocks)[:, :outs]
    return np.ascontiguousarray(quants), scales, minima


def dequantize(packed: Array, outs: int, width: int) -> Array:
    """The weights, float32 [outs, width]."""
    quants, scales, minima = unpack(packed, outs, width)
    of_weight = [np.repeat(ends.astype(np.float32), BLOCK, axis=1)[:, :width] for ends in (scales, minima)]
    weights: Array = quants * of_weight[0] + of_weight[1]
    return weights


def packed_rows(packed: Array, rows: Array) -> Array:
    """The matrix of some rows of another, in their order: [groups of rows, blocks, 320]."""
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
