"""The structs and constants of `c/native.h` for ctypes, with the same names and order. The header explains their fields."""

import ctypes
from collections.abc import Sequence
from enum import IntEnum
from typing import Any, Final

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

# See LAMINA_STEP, LAMINA_BLOCK_TOKENS, LAMINA_PAGE_TOKENS, LAMINA_MOST_THREADS, LAMINA_LINE_BYTES,
# LAMINA_PARTS, LAMINA_LOW_PARTS and LAMINA_GROUP_OUTS of the header.
STEP: Final = 32
BLOCK_TOKENS: Final = 16
PAGE_TOKENS: Final = 64
MOST_THREADS: Final = 64
LINE_BYTES: Final = 64
PARTS: Final = 3
LOW_PARTS: Final = 4
GROUP_OUTS: Final = 16
BLOCK_FORMATS: Final = (
    "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "MXFP4",
    "INT4_32", "INT4_64", "INT4_128", "INT8_32", "INT8_128", "E4M3_32", "E4M3_128",
)  # fmt: skip
"""Formats of matrices in blocks. The index is the number in LAMINA_BLOCK_FORMATS and LAMINA_FLOAT_BLOCK_FORMATS."""


class NormKind(IntEnum):
    """The kind of a norm. C also has the kind 0, no norm: that of a record which was not filled in."""

    RMS = 1
    LAYER = 2


class Activation(IntEnum):
    SILU = 0
    GELU = 1
    GELU_TANH = 2
    RELU = 3
    RELU2 = 4
    XIELU = 5
    SWIGLU = 6


class RouterScores(IntEnum):
    SOFTMAX = 0
    SOFTMAX_OF_CHOSEN = 1
    SIGMOID = 2
    SPARSE_MIX = 3


class RecurrentKind(IntEnum):
    """The kind of a recurrent mixer. C also has the kind 0: that of a layer without one."""

    CONVOLUTION = 1
    DELTA = 2
    MAMBA = 3


class Dtype(IntEnum):
    BF16 = 0
    INT8 = 1
    F32 = 2
    Q4 = 3
    BLOCKS = 4
    FLOAT_BLOCKS = 5


def _fields(kind: Any, names: str) -> list[tuple[str, Any]]:
    """Returns consecutive fields of one type. names: names of the fields, separated by spaces."""
    return [(name, kind) for name in names.split()]


class MemoryRecord(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("bytes", ctypes.c_int64))


class MatrixRecord(ctypes.Structure):
    _fields_ = (
        *_fields(ctypes.c_int64, "dtype outs width"),
        *_fields(MemoryRecord, "weights scales biases order"),
        *_fields(ctypes.c_int64 * PARTS, "formats ends"),
    )


class NormRecord(ctypes.Structure):
    _fields_ = (("kind", ctypes.c_int64), *_fields(MemoryRecord, "gain biases"))


class ExpertRecord(ctypes.Structure):
    _fields_ = _fields(MatrixRecord, "gate up down")


class ExpertsRecord(ctypes.Structure):
    _fields_ = (
        ("experts", MemoryRecord),
        *_fields(MatrixRecord, "router narrow widen"),
        *_fields(MemoryRecord, "correction used used_at scales"),
        *_fields(NormRecord, "before before_router after after_shared"),
        *_fields(ctypes.c_int64, "num_experts chosen scores groups chosen_groups two_of_group normalized shared_gate"),
        *_fields(ctypes.c_double, "normal_eps scale threshold"),
    )


class RecurrentRecord(ctypes.Structure):
    _fields_ = (
        *_fields(
            ctypes.c_int64,
            "kind taps channels groups key_size heads head_size norm_parts gate_first channels_at query_at "
            "key_at value_at gate_at steps_at tail_at matrix_at kept_at",
        ),
        *_fields(MatrixRecord, "in steps out"),
        *_fields(MemoryRecord, "kernel kernel_biases rates step_biases skips"),
        ("norm", NormRecord),
        *_fields(ctypes.c_double, "eps gate_scale step_scale out_scale"),
    )


class BudgetRecord(ctypes.Structure):
    _fields_ = _fields(ctypes.c_int64, "most_bytes bytes clock found read")


class LatentRecord(ctypes.Structure):
    _fields_ = (
        ("down", MatrixRecord),
        ("query_norm", NormRecord),
        ("queries", MatrixRecord),
        ("norm", NormRecord),
        *_fields(MemoryRecord, "absorb expand"),
        *_fields(ctypes.c_int64, "rank nope rope value_size"),
        ("eps", ctypes.c_double),
    )


class StreamsRecord(ctypes.Structure):
    _fields_ = (
        ("router", MatrixRecord),
        ("norm", NormRecord),
        *_fields(MatrixRecord, "predict correct"),
        ("scale", MemoryRecord),
        *_fields(MatrixRecord, "narrow widen"),
        ("after", NormRecord),
    )


class LayerRecord(ctypes.Structure):
    _fields_ = (
        ("before_attention", NormRecord),
        ("qkv", MatrixRecord),
        ("latent", MemoryRecord),
        *_fields(NormRecord, "qk value"),
        ("sinks", MemoryRecord),
        ("out", MatrixRecord),
        *_fields(NormRecord, "after_attention before_mlp"),
        *_fields(MatrixRecord, "gate up down"),
        ("experts", MemoryRecord),
        ("after_mlp", NormRecord),
        *_fields(MatrixRecord, "input_gate input_out"),
        ("after_input", NormRecord),
        ("streams", MemoryRecord),
        *_fields(
            ctypes.c_int64,
            "qk_as_one qk_rotated gates activation sparse parallel window ring query_rotation key_rotation",
        ),
        *_fields(ctypes.c_double, "score_scale score_cap attention_scale mlp_scale gate_scale output_scale"),
        ("swiglu", ctypes.c_double * 2),
        ("xielu", ctypes.c_double * 4),
        ("cutoff", ctypes.c_double),
        *_fields(ctypes.c_int64, "kv_heads head_dim reads_kv kv_row kv_pages"),
        ("recurrent", RecurrentRecord),
    )


class LowRankRecord(ctypes.Structure):
    _fields_ = (
        ("dtype", ctypes.c_int64),
        *_fields(ctypes.c_int64 * LOW_PARTS, "ranks ends"),
        ("scales", ctypes.c_double * LOW_PARTS),
        *_fields(MemoryRecord, "a b"),
    )


class AdapterLayerRecord(ctypes.Structure):
    _fields_ = _fields(LowRankRecord, "qkv out gate up down")


class GroupRecord(ctypes.Structure):
    _fields_ = (
        *_fields(MemoryRecord, "layers arena budget adapters"),
        *_fields(
            ctypes.c_int64,
            "num_layers hidden_size inner_size expert_size most_experts most_chosen heads head_dim row_numbers "
            "latent_outs query_size value_size num_pages page_bytes kv_dtype rotations kv_rows input_size "
            "streams recurrent_inputs recurrent_outputs recurrent_heads state_values kept_values low_floats "
            "rounds bidirectional",
        ),
        ("eps", ctypes.c_double),
    )


class SegmentRecord(ctypes.Structure):
    _fields_ = (
        ("pages", MemoryRecord),
        *_fields(ctypes.c_int64, "position length"),
        *_fields(MemoryRecord, "states copies copied_at kept"),
        *_fields(ctypes.c_int64, "kept_from adapter"),
    )


class PassRecord(ctypes.Structure):
    _fields_ = (
        *_fields(ctypes.c_int64, "rows threads repeats"),
        *_fields(MemoryRecord, "hidden inputs rotations segments workspace"),
    )


class ProductRecord(ctypes.Structure):
    _fields_ = (("matrix", MatrixRecord), *_fields(ctypes.c_int64, "rows threads"), *_fields(MemoryRecord, "x y workspace"))


class DrawRecord(ctypes.Structure):
    _fields_ = (
        *_fields(MemoryRecord, "logits allowed"),
        ("temperature", ctypes.c_double),
        ("top_k", ctypes.c_int64),
        *_fields(ctypes.c_double, "top_p min_p"),
        *_fields(ctypes.c_int64, "seed position token"),
    )


class DrawsRecord(ctypes.Structure):
    _fields_ = (("draws", MemoryRecord), ("threads", ctypes.c_int64), ("workspace", MemoryRecord))


class SoftmaxRecord(ctypes.Structure):
    _fields_ = (*_fields(MemoryRecord, "scores weights keys top"), ("log_sum", ctypes.c_double))


RECORDS: Final[Sequence[type[ctypes.Structure]]] = (
    MemoryRecord,
    MatrixRecord,
    NormRecord,
    RecurrentRecord,
    ExpertRecord,
    ExpertsRecord,
    BudgetRecord,
    LatentRecord,
    StreamsRecord,
    LayerRecord,
    LowRankRecord,
    AdapterLayerRecord,
    GroupRecord,
    SegmentRecord,
    PassRecord,
    ProductRecord,
    DrawRecord,
    DrawsRecord,
    SoftmaxRecord,
)
"""All records, in the order in which `lamina_size_of` numbers the structs."""


def memory_of(array: Array | None) -> MemoryRecord:
    """Returns the address and size of an array. The caller must keep the array alive while C uses the record.

    For None, both are 0.

    Raises ValueError if the array is not contiguous.
    """
    if array is None:
        return MemoryRecord(None, 0)
    if not array.flags.c_contiguous:
        raise ValueError(f"an array of shape {array.shape} with strides {array.strides} is not contiguous")
    return MemoryRecord(array.__array_interface__["data"][0], array.nbytes)


def new_workspace(num_bytes: int) -> Array:
    """Returns uninitialized temporary memory for C, uint8 [num_bytes], that begins on a cache line."""
    memory = np.empty(num_bytes + LINE_BYTES, np.uint8)
    first = -memory.ctypes.data % LINE_BYTES
    return memory[first : first + num_bytes]
