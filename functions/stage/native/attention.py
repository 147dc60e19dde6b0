"""Queries, keys and values made ready, and attention over the KV arena: a few queries of one sequence at a time."""

from typing import Any

import numpy as np
from numba import carray

from functions.stage.native import vector_code as code
from functions.stage.native.arithmetic import bf16, by_rows, exp, floats, integers, jit, normalize, vector
from functions.stage.native.matrices import tile
from functions.stage.native.scalar_code import bits_of_float, float_of_bits, pointer
from functions.stage.native.shapes import COLUMNS, LANES, OUTS, QUERIES, SUMS, VECTORS

_one_key = by_rows(lambda rows: code.tile_of(code.BFloat16, 1, rows, False))
_pairs_tile = by_rows(code.pairs_tile_of, QUERIES)
_weighted_sum = by_rows(code.weighted_sum_of)


@jit
def prepare_head(group: Any, layer: Any, head: Any, gain: int, rotation: Any) -> None:
    """A query or key head: normalized where there is a gain, rotated where the layer rotates; in place."""
    if gain != 0:
        normalize(head, vector(gain, len(head)), group.eps, head)
    if layer.rotary != 0:
        for i in range(len(head) // 2):
            real, imaginary = head[2 * i], head[2 * i + 1]
            cosine, sine = rotation[2 * i], rotation[2 * i + 1]
            head[2 * i] = real * cosine - imaginary * sine
            head[2 * i + 1] = real * sine + imaginary * cosine


@jit
def write_kv(row: int, kv_head: int, group: Any, layer: Any, state: Any) -> None:
    """The heads of one row that share a key head: made ready, and key and value written to the arena."""
    size = group.head_dim
    shared = group.heads // group.kv_heads
    all_heads = group.heads + 2 * group.kv_heads
    heads = carray(pointer(state.heads), (state.rows, all_heads, size), np.float32)
    rotation = vector(state.rotations + row * size * 4, size)
    for head in range(kv_head * shared, (kv_head + 1) * shared):
        gain = 0 if layer.qk_gain == 0 else layer.qk_gain + 4 * head * size
        prepare_head(group, layer, heads[row, head], gain, rotation)
    key = heads[row, group.heads + kv_head]
    gain = 0 if layer.qk_gain == 0 else layer.qk_gain + 4 * (group.heads + kv_head) * size
    prepare_head(group, layer, key, gain, rotation)
    value = heads[row, group.heads + group.kv_heads + kv_head]
    place = 2 * size * (kv_head * group.capacity + integers(state.slots, state.rows)[row])
    keys = carray(pointer(layer.keys + place), size, np.int16)
    values = carray(pointer(layer.values + place), size, np.int16)
    for i in range(size):
        keys[i] = bf16(key[i])
        values[i] = bf16(value[i])


@jit
def lay_out(block: int, kv_head: int, group: Any, layer: Any, state: Any) -> None:
    """Keys and values of up to COLUMNS tokens in one head as `_pairs_tile` reads them. Tokens that are missing are zeros."""
    size = group.head_dim
    first, count = carray(pointer(state.blocks), (state.num_blocks, 2), np.int64)[block]
    place = 2 * size * (kv_head * group.capacity + first)
    keys = carray(pointer(layer.keys + place), (count, size // 2), np.int32)
    laid_keys = carray(pointer(laid_at(group, state, state.laid_keys, block, kv_head)), (size // 2, COLUMNS), np.int32)
    for pair in range(size // 2):
        for token in range(count):
            laid_keys[pair, token] = keys[token, pair]
        laid_keys[pair, count:] = 0
    values = carray(pointer(layer.values + place), (count, size), np.int16)
    laid_values = carray(pointer(laid_at(group, state, state.laid_values, block, kv_head)), (COLUMNS // 2, size, 2), np.int16)
    for token in range(count):
        for i in range(size):
            laid_values[token // 2, i, token % 2] = values[token, i]
    for token in range(count, COLUMNS):
        laid_values[token // 2, :, token % 2] = 0


@jit
def laid_at(group: Any, state: Any, laid: int, block: int, kv_head: int) -> int:
    return laid + 2 * COLUMNS * group.head_dim * (kv_head * state.num_blocks + block)


@jit
def attend(group: Any, layer: Any, state: Any, first_row: int, rows: int, first_block: int, kv_head: int, scratch: int) -> None:
    """Attention of some rows of one sequence, one behind the other, in the heads that share a key head.

    Some queries read keys and values together: heads of one row, or rows in one head. first_block: of their sequence, laid out,
    or -1.
    """
    shared = group.heads // group.kv_heads
    begin, end = kv_head * shared, (kv_head + 1) * shared
    if rows == 1:
        for head in range(begin, end, VECTORS):
            count = min(VECTORS, end - head)
            attend_together(group, layer, state, first_row, 0, head, 1, count, first_block, kv_head, scratch)
    else:
        for head in range(begin, end):
            attend_together(group, layer, state, first_row, 1, head, 0, rows, first_block, kv_head, scratch)


@jit
def attend_together(
    group: Any,
    layer: Any,
    state: Any,
    row: int,
    next_row: int,
    head: int,
    next_head: int,
    count: int,
    first_block: int,
    kv_head: int,
    scratch: int,
) -> None:
    """Of `count` queries, the first in `row` and `head`, every other one `next_row` rows and `next_head` heads further."""
    size = group.head_dim
    heads = carray(pointer(state.heads), (state.rows, group.heads + 2 * group.kv_heads, size), np.float32)
    positions = integers(state.positions, state.rows)
    begin = max(positions[row] - layer.window + 1, 0)
    if first_block >= 0:
        begin = begin // COLUMNS * COLUMNS
    tokens = positions[row + next_row * (count - 1)] + 1 - begin
    slot = integers(state.slots, state.rows)[row] - positions[row] + begin
    place = 2 * size * (kv_head * group.capacity + slot)
    queries_at = scratch + 4 * SUMS
    scores_at = queries_at + 2 * QUERIES * size
    queries = carray(pointer(queries_at), (QUERIES, size), np.int16)
    scores = floats(scores_at, QUERIES, state.most_tokens)
    scale = np.float32(1) / np.sqrt(np.float32(size))
    for query in range(count):
        for i in range(size):
            queries[query, i] = bf16(heads[row + query * next_row, head + query * next_head, i] * scale)
    block = first_block + begin // COLUMNS
    if first_block >= 0:
        for token in range(0, tokens, COLUMNS):
            keys = laid_at(group, state, state.laid_keys, block + token // COLUMNS, kv_head)
            _pairs_tile(count, keys, 4 * COLUMNS, queries_at, 2 * size, size // 2, scores_at + 4 * token, 4 * state.most_tokens)
    else:
        score(layer.keys + place, queries_at, size, tokens, count, scores, vector(scratch, SUMS), scratch)
    for query in range(count):
        position = positions[row + query * next_row]
        first = max(position - layer.window + 1, 0) - begin
        last = position + 1 - begin
        scores[query, :first] = 0
        scores[query, last:] = 0
        softmax(scores[query, first:last])
    out = state.attended + 4 * size * (row * group.heads + head)
    out_stride = 4 * size * (next_row * group.heads + next_head)
    if first_block >= 0:
        shares_at = scores_at + 4 * QUERIES * state.most_tokens
        shares = carray(pointer(shares_at), (QUERIES, state.most_tokens), np.int16)
        for query in range(count):
            for token in range(tokens + tokens % 2):
                shares[query, token] = bf16(scores[query, token])
        values = laid_at(group, state, state.laid_values, block, kv_head)
        for i in range(0, size, COLUMNS):
            _pairs_tile(
                count, values + 4 * i, 4 * size, shares_at, 2 * state.most_tokens, (tokens + 1) // 2, out + 4 * i, out_stride
            )
    else:
        for i in range(0, size, LANES):
            values = layer.values + place + 2 * i
            _weighted_sum(count, scores_at, 4 * state.most_tokens, values, 2 * size, tokens, out + 4 * i, out_stride)


@jit
def score(keys: int, queries: int, size: int, tokens: int, count: int, scores: Any, sums: Any, scratch: int) -> None:
    whole = tokens // OUTS * OUTS
    for token in range(0, whole, OUTS):
        tile(False, True, count, keys + 2 * size * token, queries, size, scratch)
        for head in range(count):
            for o in range(OUTS):
                scores[head, token + o] = sums[head * OUTS + o]
    for token in range(whole, tokens):
        _one_key(count, keys + 2 * size * token, 2 * size, queries, 2 * size, size, scratch)
        for head in range(count):
            scores[head, token] = sums[head]


@jit
def largest_of(numbers: Any) -> np.float32:
    """By the numbers' bits as integers of the same order, whose maximum vectors find."""
    found = np.int32(-(2**31))
    for i in range(len(numbers)):
        bits = bits_of_float(numbers[i])
        found = max(found, bits ^ ((bits >> np.int32(31)) & np.int32(0x7FFFFFFF)))
    return float_of_bits(found ^ ((found >> np.int32(31)) & np.int32(0x7FFFFFFF)))


@jit
def softmax(scores: Any) -> None:
    largest = largest_of(scores)
    total = np.float32(0)
    for i in range(len(scores)):
        scores[i] = exp(scores[i] - largest)
        total += scores[i]
    share = np.float32(1) / total
    for i in range(len(scores)):
        scores[i] *= share
