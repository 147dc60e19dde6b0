"""Matrices: rows are rounded to 16 bits once, then multiplied tile by tile.

A piece of the work is a block of rows and a unit of the outputs.
"""

from collections.abc import Callable
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
def units_of(outs: int, out_bytes: int) -> Any:
    """How many units the outputs are cut into, and how many each has, the last perhaps fewer."""
    size = max(1, UNIT_BYTES // (out_bytes * OUTS)) * OUTS
    return (outs + size - 1) // size, size


@jit
def next_piece(worker: Any, phase: int, blocks: int, units: int) -> int:
    """Block and unit as one number. A thread keeps to its blocks where there are several: it packs only those."""
    if blocks == 1:
        return take(worker, phase, units, 1)
    return take(worker, phase, blocks, units)


def product_of(multiply_tile: Callable[..., None]) -> Any:
    """A whole phase: all rows at `source`, through the norm of `gain` if not 0, with all outputs of a matrix.

    Calls `multiply_tile(int8, fetch, rows, row, out, x, row_scales, scratch, *arguments)` for each tile. row, out: the first of
    it; x: where its packed rows are. out_bytes: of the weights of one output.
    """

    @jit
    def run(
        group: Any, matrix: Any, out_bytes: int, source: int, gain: int, rows: int, worker: Any, phase: int, *arguments: Any
    ) -> None:
        int8, width, outs = matrix.int8 != 0, matrix.width, matrix.outs
        scratch = worker.scratch
        row_scales = scratch + 4 * SUMS
        blocks, block_rows = blocks_of(rows)
        units, unit_outs = units_of(outs, out_bytes)
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
                    place, scales = x + (row - first) * width * 2, row_scales + 4 * OUTS * (row - first)
                    multiply_tile(int8, row == first, min(ROWS, last - row), row, j, place, scales, scratch, *arguments)
            done += 1
            piece = next_piece(worker, phase, blocks, units)
        finish(worker, phase, done, blocks * units)

    return run


@jit
def row_bytes(matrix: Any) -> int:
    return matrix.width if matrix.int8 != 0 else 2 * matrix.width


@jit
def scaled_tile(int8: bool, fetch: bool, rows: int, out: int, x: int, row_scales: int, matrix: Any, sums: int) -> None:
    """A tile of the product, with its bias."""
    tile(int8, fetch, rows, matrix.weights + out * row_bytes(matrix), x, matrix.width, sums)
    scale_tile(sums, row_scales, matrix.scales + 4 * out, matrix.biases + 4 * out)


@jit
def _tile(
    int8: bool,
    fetch: bool,
    rows: int,
    row: int,
    out: int,
    x: int,
    row_scales: int,
    scratch: int,
    matrix: Any,
    at: int,
    add: int,
) -> None:
    scaled_tile(int8, fetch, rows, out, x, row_scales, matrix, scratch)
    store_tile(scratch, at + 4 * (row * matrix.outs + out), 4 * matrix.outs, rows, add)


@jit
def _gated_tile(
    int8: bool, fetch: bool, rows: int, row: int, out: int, x: int, row_scales: int, scratch: int, layer: Any, at: int
) -> None:
    gates, ups = vector(scratch, TILE), vector(scratch + 4 * TILE, TILE)
    scaled_tile(int8, fetch, rows, out, x, row_scales, layer.gate, scratch)
    scaled_tile(int8, fetch, rows, out, x, row_scales, layer.up, scratch + 4 * TILE)
    for i in range(TILE):
        gates[i] = gates[i] / (np.float32(1) + exp(-gates[i])) * ups[i]
    store_tile(scratch, at + 4 * (row * layer.gate.outs + out), 4 * layer.gate.outs, rows, 0)


_product, _gated_product = product_of(_tile), product_of(_gated_tile)


@jit
def multiply(group: Any, matrix: Any, source: int, gain: int, out: int, add: int, rows: int, worker: Any, phase: int) -> None:
    """out [rows, outs] = (out, where `add`) + source [rows, width] · weightsᵀ + bias.

    gain: of the norm that the source goes through, or 0.
    """
    _product(group, matrix, row_bytes(matrix), source, gain, rows, worker, phase, matrix, out, add)


@jit
def multiply_gated(group: Any, layer: Any, state: Any, worker: Any, phase: int) -> None:
    """inner [rows, inner_size] = silu(gate x) * (up x) of the normalized hidden state."""
    gate, both = layer.gate, 2 * row_bytes(layer.gate)
    _gated_product(group, gate, both, state.hidden, layer.mlp_gain, state.rows, worker, phase, layer, state.inner)
