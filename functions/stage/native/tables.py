"""What the native layers are told, as records that Python fills in and machine code reads: numbers, and addresses of memory.

Addresses are those of contiguous tensors on the CPU; 0 stands for what a layer does not have.
"""

from typing import Final

import numpy as np


def _record(**fields: type) -> np.dtype[np.void]:
    return np.dtype(list(fields.items()), align=True)


LAYER: Final = _record(
    input_gain=np.int64,  # gains, scales and biases: float32
    qkv=np.int64,  # matrices [out, in]: int8 or bf16
    qkv_scale=np.int64,
    qkv_bias=np.int64,
    qkv_int8=np.int64,  # else bf16
    qk_gain=np.int64,  # [heads + kv_heads, head_dim]
    out=np.int64,
    out_scale=np.int64,
    out_bias=np.int64,
    out_int8=np.int64,
    mlp_gain=np.int64,
    gate=np.int64,
    gate_scale=np.int64,
    gate_bias=np.int64,
    gate_int8=np.int64,
    up=np.int64,
    up_scale=np.int64,
    up_bias=np.int64,
    up_int8=np.int64,
    down=np.int64,
    down_scale=np.int64,
    down_bias=np.int64,
    down_int8=np.int64,
    keys=np.int64,  # bf16 [kv_heads, capacity, head_dim]
    values=np.int64,
    window=np.int64,  # how many tokens a token attends to, its own included
    rotary=np.int64,  # whether queries and keys are rotated
)

GROUP: Final = _record(
    layers=np.int64,  # [num_layers] of LAYER
    num_layers=np.int64,
    largest=np.float32,  # to which the largest activation of a row is scaled for an int8 matrix
    eps=np.float32,
    hidden_size=np.int64,
    inner_size=np.int64,
    heads=np.int64,
    kv_heads=np.int64,
    head_dim=np.int64,
    capacity=np.int64,  # tokens of the KV arena
    thread_number=np.int64,  # functions of OpenMP
    threads=np.int64,
    barrier=np.int64,
)

PASS: Final = _record(
    rows=np.int64,
    hidden=np.int64,  # float32 [rows, hidden_size]: read, and written
    rotations=np.int64,  # complex64 [rows, head_dim / 2]
    slots=np.int64,  # int64 [rows]: where in the arena the row's token goes
    positions=np.int64,  # int64 [rows]: how many tokens of its sequence lie before that
    bundles=np.int64,  # int64 [num_bundles, 2]: rows of one sequence whose attention is computed together: the first, how many
    num_bundles=np.int64,
    heads=np.int64,  # float32 [rows, heads + 2 * kv_heads, head_dim]
    attended=np.int64,  # float32 [rows, heads * head_dim]
    inner=np.int64,  # float32 [rows, inner_size]
    scratch=np.int64,  # of the first thread, then of the next
    scratch_bytes=np.int64,  # of each
    most_tokens=np.int64,  # that any row attends to
)
