"""The layers of a group as one function without Python, which several threads of OpenMP run together.

Every thread does the small operators (norms, rounding, quantizing) for all rows by itself, so that they need no waiting for
each other, and its share of what takes long: rows of a matrix, heads of a sequence. Six times per layer the threads wait.
"""

from typing import Any, Final

import numpy as np
from numba import carray, njit

from functions.stage.native.attention import attend, lay_out, write_kv
from functions.stage.native.matrices import multiply, multiply_gated
from functions.stage.native.tables import GROUP, LAYER, PASS, PRODUCT
from functions.stage.native.vector_code import call_at, pointer

_jit: Final = njit(nogil=True, error_model="numpy")


@_jit
def _before(group: Any, layer: Any, state: Any, scratch: int, thread: int, threads: int) -> None:
    """Queries, keys and values of all rows."""
    hidden, heads = state.hidden, state.heads
    multiply(group, layer.qkv, hidden, layer.input_gain, heads, 0, state.rows, scratch, thread, threads)
    call_at(group.barrier)
    for unit in range(thread, state.rows * group.kv_heads, threads):
        write_kv(group, layer, state, unit // group.kv_heads, unit % group.kv_heads)
    call_at(group.barrier)


@_jit
def _attention(group: Any, layer: Any, state: Any, scratch: int, thread: int, threads: int) -> None:
    for unit in range(thread, state.num_blocks * group.kv_heads, threads):
        lay_out(group, layer, state, unit // group.kv_heads, unit % group.kv_heads)
    call_at(group.barrier)
    bundles = carray(pointer(state.bundles), (state.num_bundles, 3), np.int64)
    for unit in range(thread, state.num_bundles * group.kv_heads, threads):
        first_row, rows, first_block = bundles[unit // group.kv_heads]
        attend(group, layer, state, first_row, rows, first_block, unit % group.kv_heads, scratch)
    call_at(group.barrier)


@_jit
def _after(group: Any, layer: Any, state: Any, scratch: int, thread: int, threads: int) -> None:
    """What attention found, through its matrix, and the MLP."""
    multiply(group, layer.out, state.attended, 0, state.hidden, 1, state.rows, scratch, thread, threads)
    call_at(group.barrier)
    multiply_gated(group, layer, state, scratch, thread, threads)
    call_at(group.barrier)
    multiply(group, layer.down, state.inner, 0, state.hidden, 1, state.rows, scratch, thread, threads)
    call_at(group.barrier)


def run_layers(tables: Any) -> None:
    """What a thread does in a pass. tables: addresses of a GROUP and of a PASS."""
    addresses = carray(tables, 2)
    group = carray(pointer(addresses[0]), 1, GROUP)[0]
    state = carray(pointer(addresses[1]), 1, PASS)[0]
    layers = carray(pointer(group.layers), group.num_layers, LAYER)
    thread, threads = np.int64(call_at(group.thread_number)), np.int64(call_at(group.threads))
    scratch = state.scratch + thread * state.scratch_bytes
    for layer in layers:
        _before(group, layer, state, scratch, thread, threads)
        _attention(group, layer, state, scratch, thread, threads)
        _after(group, layer, state, scratch, thread, threads)


def run_product(tables: Any) -> None:
    """What a thread does of one matrix. tables: addresses of a GROUP and of a PRODUCT."""
    addresses = carray(tables, 2)
    group = carray(pointer(addresses[0]), 1, GROUP)[0]
    state = carray(pointer(addresses[1]), 1, PRODUCT)[0]
    thread, threads = np.int64(call_at(group.thread_number)), np.int64(call_at(group.threads))
    scratch = state.scratch + thread * state.scratch_bytes
    multiply(group, state.matrix, state.source, 0, state.product, 0, state.rows, scratch, thread, threads)
