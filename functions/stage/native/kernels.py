"""The layers of a group as one function without Python, which several threads of OpenMP run together.

A layer is a few phases, in each of which the threads share the work piece by piece (`sharing`). Small operators (norms,
rounding, quantizing) are done by each thread for the pieces that it takes, so that nobody waits for them.
"""

from typing import Any, Final

import numpy as np
from numba import carray, njit

from functions.stage.native.attention import attend, lay_out, write_kv
from functions.stage.native.matrices import multiply, multiply_gated
from functions.stage.native.scalar_code import call_at, pointer
from functions.stage.native.shapes import PHASES
from functions.stage.native.sharing import Worker, phase_of
from functions.stage.native.tables import GROUP, LAYER, PASS, PRODUCT

_jit: Final = njit(nogil=True, error_model="numpy")
_QKV, _WRITE_KV, _LAY_OUT, _ATTEND, _OUT, _GATED, _DOWN = range(PHASES)


@_jit
def _only_steps(state: Any) -> bool:
    """Of one token each, whose keys and values are written right where they are attended to."""
    return bool(state.num_bundles == state.rows)


@_jit
def _attend_bundle(bundle: int, kv_head: int, group: Any, layer: Any, state: Any, scratch: int) -> None:
    first_row, rows, first_block = carray(pointer(state.bundles), (state.num_bundles, 3), np.int64)[bundle]
    if _only_steps(state):
        write_kv(first_row, kv_head, group, layer, state)
    attend(group, layer, state, first_row, rows, first_block, kv_head, scratch)


_write_kv, _lay_out, _attend = phase_of(write_kv), phase_of(lay_out), phase_of(_attend_bundle)


@_jit
def _run_layer(group: Any, layer: Any, state: Any, worker: Any, phase: int) -> None:
    """phase: the layer's first."""
    rows, hidden, kv_heads = state.rows, state.hidden, group.kv_heads
    multiply(group, layer.qkv, hidden, layer.input_gain, state.heads, 0, rows, worker, phase + _QKV)
    if not _only_steps(state):
        _write_kv(worker, phase + _WRITE_KV, rows, kv_heads, group, layer, state)
    if state.num_blocks:
        _lay_out(worker, phase + _LAY_OUT, state.num_blocks, kv_heads, group, layer, state)
    _attend(worker, phase + _ATTEND, state.num_bundles, kv_heads, group, layer, state, worker.scratch)
    multiply(group, layer.out, state.attended, 0, hidden, 1, rows, worker, phase + _OUT)
    multiply_gated(group, layer, state, worker, phase + _GATED)
    multiply(group, layer.down, state.inner, 0, hidden, 1, rows, worker, phase + _DOWN)


@_jit
def _worker(group: Any, state: Any) -> Worker:
    """The thread that calls."""
    number, threads = int(call_at(group.thread_number)), int(call_at(group.threads))
    return Worker(number, threads, state.scratch + number * state.scratch_bytes, state.counters, group.give_way)


def run_layers(tables: Any) -> None:
    """What a thread does in a pass. tables: addresses of a GROUP and of a PASS."""
    addresses = carray(tables, 2)
    group = carray(pointer(addresses[0]), 1, GROUP)[0]
    state = carray(pointer(addresses[1]), 1, PASS)[0]
    layers = carray(pointer(group.layers), group.num_layers, LAYER)
    worker = _worker(group, state)
    for number in range(group.num_layers):
        _run_layer(group, layers[number], state, worker, number * PHASES)


def run_product(tables: Any) -> None:
    """What a thread does of one matrix. tables: addresses of a GROUP and of a PRODUCT."""
    addresses = carray(tables, 2)
    group = carray(pointer(addresses[0]), 1, GROUP)[0]
    state = carray(pointer(addresses[1]), 1, PRODUCT)[0]
    multiply(group, state.matrix, state.source, 0, state.product, 0, state.rows, _worker(group, state), 0)
