"""The records of `c/native.h`, in its order and with its names; what each field holds is said there."""

import ctypes
from collections.abc import Sequence
from enum import IntEnum
from typing import Any, Final

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

STEP: Final = 32
BLOCK_TOKENS: Final = 16
MOST_THREADS: Final = 64
LINE_BYTES: Final = 64


class Dtype(IntEnum):
    BF16 = 0
    INT8 = 1
    F32 = 2
    Q4 = 3


class Memory(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("bytes", ctypes.c_int64))

    @classmethod
    def of(cls, array: Array | None) -> "Memory":
        """The caller keeps the array. Raises ValueError for one that is not contiguous."""
        if array is None:
            return cls(None, 0)
        if not array.flags.c_contiguous:
            raise ValueError(f"an array of shape {array.shape} with strides {array.strides} is not contiguous")
        return cls(array.ctypes.data, array.nbytes)


def _numbers(*names: str) -> list[tuple[str, Any]]:
    return [(name, ctypes.c_int64) for name in names]


class Matrix(ctypes.Structure):
    _fields_ = (*_numbers("dtype", "outs", "width"), ("weights", Memory), ("scales", Memory), ("biases", Memory))


class Layer(ctypes.Structure):
    _fields_ = (
        ("input_gain", Memory),
        ("qkv", Matrix),
        ("qk_gain", Memory),
        ("out", Matrix),
        ("mlp_gain", Memory),
        ("gate", Matrix),
        ("up", Matrix),
        ("down", Matrix),
        ("keys", Memory),
        ("values", Memory),
        *_numbers("window", "rotary"),
    )


class Group(ctypes.Structure):
    _fields_ = (
        ("layers", Memory),
        *_numbers("num_layers", "hidden_size", "inner_size", "heads", "kv_heads", "head_dim", "capacity_tokens", "kv_dtype"),
        ("eps", ctypes.c_double),
    )


class Segment(ctypes.Structure):
    _fields_ = tuple(_numbers("first_slot", "position", "length"))


class Pass(ctypes.Structure):
    _fields_ = (
        *_numbers("rows", "threads"),
        ("hidden", Memory),
        ("rotations", Memory),
        ("segments", Memory),
        ("workspace", Memory),
    )


class Product(ctypes.Structure):
    _fields_ = (
        ("matrix", Matrix),
        *_numbers("rows", "threads"),
        ("x", Memory),
        ("y", Memory),
        ("workspace", Memory),
    )


RECORDS: Final[Sequence[type[ctypes.Structure]]] = (Memory, Matrix, Layer, Group, Segment, Pass, Product)
"""In the order of `lamina_size_of`."""


def aligned(num_bytes: int) -> Array:
    """Memory for a workspace."""
    memory = np.empty(num_bytes + LINE_BYTES, np.uint8)
    first = -memory.ctypes.data % LINE_BYTES
    return memory[first : first + num_bytes]
