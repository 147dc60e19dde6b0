"""What the native layers are told, as records that Python fills in and machine code reads: numbers, and addresses of memory.

Addresses are those of contiguous tensors on the CPU; 0 stands for what a layer does not have.
"""

from typing import Final

import numpy as np


def _record(**fields: type | np.dtype[np.void]) -> np.dtype[np.void]:
    return np.dtype(list(fields.items()), align=True)


MATRIX: Final = _record(
    weights=np.int64,  # [outs, width], int8 or bf16
    scales=np.int64,  # float32 [outs]
    biases=np.int64,  # float32 [outs]
    int8=np.int64,
    outs=np.int64,
    width=np.int64,
)

LAYER: Final = _record(
    input_gain=np.int64,  # gains: float32
    qkv=MATRIX,
    qk_gain=np.int64,  # [heads + kv_heads, head_dim]
    out=MATRIX,
    mlp_gain=np.int64,
    gate=MATRIX,
    up=MATRIX,
    down=MATRIX,
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
    heads=np.int64,
    kv_heads=np.int64,
    head_dim=np.int64,
    capacity=np.int64,  # tokens of the KV arena
    thread_number=np.int64,  # functions of OpenMP
    threads=np.int64,
    give_way=np.int64,
)

PASS: Final = _record(
    rows=np.int64,
    hidden=np.int64,  # float32 [rows, hidden_size]: read, and written
    rotations=np.int64,  # complex64 [rows, head_dim / 2]
    slots=np.int64,  # int64 [rows]: where in the arena the row's token goes
    positions=np.int64,  # int64 [rows]: how many tokens of its sequence lie before that
    bundles=np.int64,  # int64 [num_bundles, 3]: rows of one sequence whose attention is computed together: the first, how many,
    num_bundles=np.int64,  # and the first block of their sequence, or -1
    blocks=np.int64,  # int64 [num_blocks, 2]: places in the arena whose keys and values are laid out: the first, how many
    num_blocks=np.int64,
    laid_keys=np.int64,  # bf16 [kv_heads, num_blocks, head_dim / 2, COLUMNS, 2]: pairs of a key's numbers
    laid_values=np.int64,  # bf16 [kv_heads, num_blocks, COLUMNS / 2, head_dim, 2]: pairs of tokens
    heads=np.int64,  # float32 [rows, heads + 2 * kv_heads, head_dim]
    attended=np.int64,  # float32 [rows, heads * head_dim]
    inner=np.int64,  # float32 [rows, inner_size]
    scratch=np.int64,  # of the first thread, then of the next
    scratch_bytes=np.int64,  # of each
    counters=np.int64,  # int64 [num_layers * PHASES, threads + 1], each in a line of its own; zeros: see `sharing`
    most_tokens=np.int64,  # that any row attends to
)

PRODUCT: Final = _record(
    matrix=MATRIX,
    rows=np.int64,
    source=np.int64,  # float32 [rows, width]
    product=np.int64,  # float32 [rows, outs]
    scratch=np.int64,
    scratch_bytes=np.int64,
    counters=np.int64,  # of one phase
)
"""One matrix by itself: the head."""
