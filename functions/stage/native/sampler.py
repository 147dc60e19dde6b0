"""Draws tokens and computes log-probabilities in C. Several threads may call it at once."""

import threading
from typing import Final

import numpy as np

from functions.stage.native.library import library
from functions.stage.native.records import Array, DrawRecord, MemoryRecord, SoftmaxRecord, memory_of


class _Scratch(threading.local):
    """Temporary memory of a thread, for the largest vocabulary so far."""

    def __init__(self) -> None:
        self.weights = np.empty(0, np.float32)
        self.keys = np.empty(0, np.uint64)

    def memory(self, size: int) -> tuple[MemoryRecord, MemoryRecord]:
        """Temporary memory for weights and keys of `size` tokens. The next call may free it."""
        if len(self.weights) < size:
            self.weights, self.keys = np.empty(size, np.float32), np.empty(size, np.uint64)
        return memory_of(self.weights), memory_of(self.keys)


_scratch: Final = _Scratch()


def draw(scores: Array, top_k: int, top_p: float, min_p: float, seed: int, position: int) -> int:
    """The token drawn from float32 scores [vocab]; see `Draw` in `c/native.h`.

    Raises NativeError if a score is a NaN or the greatest is infinite.
    """
    weights, keys = _scratch.memory(len(scores))
    return library().draw(DrawRecord(memory_of(scores), weights, keys, top_k, top_p, min_p, seed, position))


def softmax(scores: Array, count: int) -> tuple[float, list[int]]:
    """The logarithm of the sum of exp(score - greatest score), and the `count` most probable tokens. scores: float32 [vocab].

    Raises NativeError if a score is a NaN or the greatest is infinite.
    """
    weights, keys = _scratch.memory(len(scores))
    top = np.empty(count, np.int64)
    record = SoftmaxRecord(memory_of(scores), weights, keys, memory_of(top))
    library().softmax(record)
    return record.log_sum, top.tolist()
