"""Matrices: rows are rounded to 16 bits once, then multiplied tile by tile.

A piece of the work is a block of rows and a unit of the outputs.
"""

from typing import Any

import numpy as np
from numba import carray

from functions.stage.native import vector_code as code
from functions.stage.native.arithmetic import by_rows, exp, floats, jit, normalize, pack, vector
from functions.stage.native.scalar_code import pointer
from functions.stage.native.shapes import BLOCK_ROWS, LANES, OUTS, ROWS, SUMS, TILE, UNIT_BYTES
from functions.stage.native.sharing import finish, take
from functions.stage.native.vector_code import scale_tile, store_tile

_int8_fetching = by_rows(lambda rows: code.tile_of(code.Int8, OUTS, rows, True))
_int8 = by_rows(lambda rows: code.tile_of(code.Int8, OUTS, rows, False))
_bf16_fetching = by_rows(lambda rows: code.tile_of(code.BFloat16, OUTS, rows, True))
_bf16 = by_rows(lambda rows: code.tile_of(code.BFloat16, OUTS, rows, False))


@jit
def packed_rows(group: Any, int8: bool, source: int, width: int, first: int, last: int, gain: int, scratch: int) -> int:
    """Rows [first, last) of the float32 matrix at `source`, normalized where there is a gain, packed into the scratch memory.

    Returns where the packed rows are; the rows' scales lie before them.
    """
    rows = floats(source, last, width)
    scales = floats(scratch + 4 * SUMS, BLOCK_ROWS, OUTS)
    normalized = vector(scratch + 4 * (SUMS + BLOCK_ROWS * OUTS), width)
    packed_at = scratch + 4 * (SUMS + BLOCK_ROWS * OUTS + (width + LANES - 1) // LANES * LANES)
    packed = carray(pointer(packed_at), (last - first, width), np.int16)
    for row in range(first, last):
        if gain == 0:
            scales[row - first, :] = pack(int8, group.largest, rows[row], packed[row - first])
        else:
            normalize(rows[row], vector(gain, width), group.eps, normalized)
            scales[row - first, :] = pack(int8, group.largest, normalized, packed[row - first])
    return packed_at


@jit
def tile(int8: bool, fetch: bool, rows: int, weights: int, x: int, width: int, out: int) -> None:
    """out[row * OUTS + weight row] of up to ROWS packed rows."""
    if int8:
        if fetch:
            _int8_fetching(rows, weights, width, x, 2 * width, width, out)
        else:
            _int8(rows, weights, width, x, 2 * width, width, out)
    elif fetch:
        _bf16_fetching(rows, weights, 2 * width, x, 2 * width, width, out)
    else:
        _bf16(rows, weights, 2 * width, x, 2 * width, width, out)


@jit
def blocks_of(rows: int) -> Any:
    """How many blocks the rows are cut into, and how many rows each has, the last perhaps fewer."""
    blocks = (rows + BLOCK_ROWS - 1) // BLOCK_ROWS
    return blocks, ((rows + blocks - 1) // blocks + ROWS - 1) // ROWS * ROWS


@jit
def units_of(outs: int, row_bytes: int) -> Any:
    """How many units the outputs are cut into, and how many each has, the last perhaps fewer."""
    size = max(1, UNIT_BYTES // (row_bytes * OUTS)) * OUTS
    return (outs + size - 1) // size, size


@jit
def next_piece(worker: Any, phase: int, blocks: int, units: int) -> int:
    """Block and unit as one number. A thread keeps to its blocks where there are several: it packs only those."""
    if blocks == 1:
        return take(worker, phase, units, 1)
    return take(worker, phase, blocks, units)


@jit
def multiply(group: Any, matrix: Any, source: int, gain: int, out: int, add: int, rows: int, worker: Any, phase: int) -> None:
    """out [rows, outs] = (out, where `add`) + source [rows, width] · weightsᵀ + bias.

    gain: of the norm that the source goes through, or 0.
    """
    int8 = matrix.int8 != 0
    width, outs = matrix.width, matrix.outs
    row_bytes = width if int8 else 2 * width
    scratch = worker.scratch
    row_scales = scratch + 4 * SUMS
    blocks, block_rows = blocks_of(rows)
    units, unit_outs = units_of(outs, row_bytes)
    packed, x, done = -1, 0, 0
    piece = next_piece(worker, phase, blocks, units)
    while piece >= 0:
        block, unit = piece // units, piece % units
        first, last = block * block_rows, min(rows, (block + 1) * block_rows)
        if block != packed:
            x = packed_rows(group, int8, source, width, first, last, gain, scratch)
            packed = block
        for j in range(unit * unit_outs, min(outs, (unit + 1) * unit_outs), OUTS):
            for row in range(first, last, ROWS):
                count = min(ROWS, last - row)
                tile(int8, row == first, count, matrix.weights + j * row_bytes, x + (row - first) * width * 2, width, scratch)
                scale_tile(scratch, row_scales + 4 * OUTS * (row - first), matrix.scales + 4 * j, matrix.biases + 4 * j)
                store_tile(scratch, out + 4 * (row * outs + j), 4 * outs, count, add)
        done += 1
        piece = next_piece(worker, phase, blocks, units)
    finish(worker, phase, done, blocks * units)


@jit
def multiply_gated(group: Any, layer: Any, state: Any, worker: Any, phase: int) -> None:
    """inner [rows, inner_size] = silu(gate x) * (up x) of the normalized hidden state."""
    gate, up = layer.gate, layer.up
    int8 = gate.int8 != 0
    width, outs, rows = gate.width, gate.outs, state.rows
    row_bytes = width if int8 else 2 * width
    scratch = worker.scratch
    row_scales = scratch + 4 * SUMS
    gates, ups = vector(scratch, TILE), vector(scratch + 4 * TILE, TILE)
    blocks, block_rows = blocks_of(rows)
    units, unit_outs = units_of(outs, 2 * row_bytes)
    packed, x, done = -1, 0, 0
    piece = next_piece(worker, phase, blocks, units)
    while piece >= 0:
        block, unit = piece // units, piece % units
        first, last = block * block_rows, min(rows, (block + 1) * block_rows)
        if block != packed:
            x = packed_rows(group, int8, state.hidden, width, first, last, layer.mlp_gain, scratch)
            packed = block
        for j in range(unit * unit_outs, min(outs, (unit + 1) * unit_outs), OUTS):
            for row in range(first, last, ROWS):
                count = min(ROWS, last - row)
                place, scales = x + (row - first) * width * 2, row_scales + 4 * OUTS * (row - first)
                tile(int8, row == first, count, gate.weights + j * row_bytes, place, width, scratch)
                scale_tile(scratch, scales, gate.scales + 4 * j, gate.biases + 4 * j)
                tile(int8, row == first, count, up.weights + j * row_bytes, place, width, scratch + 4 * TILE)
                scale_tile(scratch + 4 * TILE, scales, up.scales + 4 * j, up.biases + 4 * j)
                for i in range(TILE):
                    gates[i] = gates[i] / (np.float32(1) + exp(-gates[i])) * ups[i]
                store_tile(scratch, state.inner + 4 * (row * outs + j), 4 * outs, count, 0)
        done += 1
        piece = next_piece(worker, phase, blocks, units)
    finish(worker, phase, done, blocks * units)
