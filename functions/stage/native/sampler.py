"""Draws tokens and computes log-probabilities in C. The functions are thread-safe."""

import ctypes
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from functions.stage.native.layers import NativeThreads
from functions.stage.native.library import library
from functions.stage.native.records import (
    Array,
    DrawRecord,
    DrawsRecord,
    MemoryRecord,
    SoftmaxRecord,
    memory_of,
    new_workspace,
)


@dataclass(frozen=True, slots=True)
class Draw:
    """The parameters for drawing one token. `Draw` in `c/native.h` explains the fields."""

    logits: Array  # float32 [vocab]
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    seed: int
    position: int
    allowed: Array | None = None  # uint32: a bit for each token, the lowest first


class _Scratch(threading.local):
    """Temporary memory of one thread, large enough for the largest vocabulary so far."""

    def __init__(self) -> None:
        self.weights = np.empty(0, np.float32)
        self.keys = np.empty(0, np.uint64)
        self.workspace = np.empty(0, np.uint8)


_scratch: Final = _Scratch()


def draw(draws: Sequence[Draw], threads: NativeThreads | None = None) -> list[int | None]:
    """Draws a token for each of `draws`, which must have the same vocabulary.

    A token is None if the greatest logit is not finite, or if the greatest score of an allowed token is not finite. A score is
    a logit divided by the temperature. threads: C threads that share the draws; they must be idle. Raises NativeError for
    values that are out of range.
    """
    records = (DrawRecord * len(draws))()
    for record, each in zip(records, draws, strict=True):
        record.logits, record.allowed = memory_of(each.logits), memory_of(each.allowed)
        record.temperature, record.top_k, record.top_p, record.min_p = each.temperature, each.top_k, each.top_p, each.min_p
        record.seed, record.position = each.seed, each.position
    count = 1 if threads is None else min(threads.count, len(draws))
    needed = library().bytes_for("lamina_draw_bytes", len(draws[0].logits), count)
    if len(_scratch.workspace) < needed:
        _scratch.workspace = new_workspace(needed)
    memory = MemoryRecord(ctypes.addressof(records), ctypes.sizeof(records))
    wanted = DrawsRecord(memory, count, memory_of(_scratch.workspace))
    library().call("lamina_draw", None if threads is None else threads.pool, wanted)
    return [None if record.token < 0 else record.token for record in records]


def softmax(scores: Array, count: int) -> tuple[float, list[int]]:
    """Returns the logarithm of the sum of exp(score - greatest score), and the `count` most probable tokens.

    scores: float32 [vocab]. Raises NativeError if a score is a NaN or the greatest is infinite.
    """
    if len(_scratch.weights) < len(scores):
        _scratch.weights, _scratch.keys = np.empty(len(scores), np.float32), np.empty(len(scores), np.uint64)
    top = np.empty(count, np.int64)
    record = SoftmaxRecord(memory_of(scores), memory_of(_scratch.weights), memory_of(_scratch.keys), memory_of(top))
    library().call("lamina_softmax", record)
    return record.log_sum, top.tolist()
