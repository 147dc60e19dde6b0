"""Queries, keys and values made ready, and attention over the KV arena: a few queries of one sequence at a time."""

from typing import Any, Final

import numpy as np
from numba import carray

from functions.stage.native import vector_code as code
from functions.stage.native.arithmetic import bf16, exp, floats, integers, jit, normalize, vector
from functions.stage.native.matrices import SUMS, tile
from functions.stage.native.vector_code import OUTS, pointer

VECTORS: Final = 4
"""Queries that read keys and values together."""

_one_key_1, _one_key_2, _one_key_3, _one_key_4 = (code.tile_of(code.BFloat16, 1, rows, False) for rows in (1, 2, 3, 4))
_sum_1, _sum_2, _sum_3, _sum_4 = (code.weighted_sum_of(heads) for heads in (1, 2, 3, 4))


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
def write_kv(group: Any, layer: Any, state: Any, row: int, kv_head: int) -> None:
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
def attend(group: Any, layer: Any, state: Any, first_row: int, rows: int, kv_head: int, scratch: int) -> None:
    """Attention of some rows of one sequence, one behind the other, in the heads that share a key head.

    Up to VECTORS queries read keys and values together: heads of one row, or rows in one head.
    """
    shared = group.heads // group.kv_heads
    begin, end = kv_head * shared, (kv_head + 1) * shared
    if rows == 1:
        for head in range(begin, end, VECTORS):
            attend_together(group, layer, state, first_row, 0, head, 1, min(VECTORS, end - head), kv_head, scratch)
    else:
        for head in range(begin, end):
            attend_together(group, layer, state, first_row, 1, head, 0, rows, kv_head, scratch)


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
    kv_head: int,
    scratch: int,
) -> None:
    """Of `count` queries, the first in `row` and `head`, every other one `next_row` rows and `next_head` heads further."""
    size = group.head_dim
    heads = carray(pointer(state.heads), (state.rows, group.heads + 2 * group.kv_heads, size), np.float32)
    positions = integers(state.positions, state.rows)
    begin = max(positions[row] - layer.window + 1, 0)
    tokens = positions[row + next_row * (count - 1)] + 1 - begin
    slot = integers(state.slots, state.rows)[row] - positions[row] + begin
    place = 2 * size * (kv_head * group.capacity + slot)
    queries_at = scratch + 4 * SUMS
    scores_at = queries_at + 2 * VECTORS * size
    queries = carray(pointer(queries_at), (VECTORS, size), np.int16)
    scores = floats(scores_at, VECTORS, state.most_tokens)
    for query in range(count):
        for i in range(size):
            queries[query, i] = bf16(heads[row + query * next_row, head + query * next_head, i])
    scale = np.float32(1) / np.sqrt(np.float32(size))
    score(layer.keys + place, queries_at, size, tokens, count, scores, vector(scratch, SUMS), scratch, scale)
    for query in range(count):
        position = positions[row + query * next_row]
        first = max(position - layer.window + 1, 0) - begin
        last = position + 1 - begin
        scores[query, :first] = 0
        scores[query, last:tokens] = 0
        softmax(scores[query, first:last])
    out = state.attended + 4 * size * (row * group.heads + head)
    out_stride = 4 * size * (next_row * group.heads + next_head)
    for i in range(0, size, 16):
        weighted(
            count, scores_at, 4 * state.most_tokens, layer.values + place + 2 * i, 2 * size, tokens, out + 4 * i, out_stride
        )


@jit
def score(
    keys: int, queries: int, size: int, tokens: int, count: int, scores: Any, sums: Any, scratch: int, scale: np.float32
) -> None:
    whole = tokens // OUTS * OUTS
    for token in range(0, whole, OUTS):
        tile(False, True, count, keys + 2 * size * token, queries, size, scratch)
        for head in range(count):
            for o in range(OUTS):
                scores[head, token + o] = sums[head * OUTS + o] * scale
    for token in range(whole, tokens):
        one_key(count, keys + 2 * size * token, queries, size, scratch)
        for head in range(count):
            scores[head, token] = sums[head] * scale


@jit
def one_key(count: int, key: int, queries: int, size: int, out: int) -> None:
    if count == 1:
        _one_key_1(key, 2 * size, queries, 2 * size, size, out)
    elif count == 2:
        _one_key_2(key, 2 * size, queries, 2 * size, size, out)
    elif count == 3:
        _one_key_3(key, 2 * size, queries, 2 * size, size, out)
    else:
        _one_key_4(key, 2 * size, queries, 2 * size, size, out)


@jit
def weighted(
    count: int, weights: int, weights_stride: int, values: int, values_stride: int, tokens: int, out: int, out_stride: int
) -> None:
    if count == 1:
        _sum_1(weights, weights_stride, values, values_stride, tokens, out, out_stride)
    elif count == 2:
        _sum_2(weights, weights_stride, values, values_stride, tokens, out, out_stride)
    elif count == 3:
        _sum_3(weights, weights_stride, values, values_stride, tokens, out, out_stride)
    else:
        _sum_4(weights, weights_stride, values, values_stride, tokens, out, out_stride)


@jit
def softmax(scores: Any) -> None:
    largest = scores[0]
    for i in range(len(scores)):
        largest = max(largest, scores[i])
    total = np.float32(0)
    for i in range(len(scores)):
        scores[i] = exp(scores[i] - largest)
        total += scores[i]
    share = np.float32(1) / total
    for i in range(len(scores)):
        scores[i] *= share
