"""A layer group whose results tell which tokens it saw, and which fails on demand: for tests of the engine alone."""

import threading
from collections.abc import Sequence
from typing import Final

import numpy as np

from functions.stage.models.floats import Array, Float32, HiddenDtype
from functions.stage.models.kv_cache import KVBudget
from functions.stage.models.layer_group import Segment

VOCAB = 97
HIDDEN = 4


class Poisoned(Exception):
    """What the group raises on a poisoned token."""


class CountingGroup:
    """Implements `LayerGroup`: the hidden state of a token is [sum of the sequence's tokens up to it, 0, 0, 0].

    The last stage's token is that sum modulo VOCAB. A pass waits for `gate`; `began` is set when one begins; `passes`
    lists how many tokens each segment of each pass had. A pass with token `poison` raises, one with `not_a_number` gives
    NaN for that sequence.
    """

    shares_work: bool = False
    takes_token_ids: bool = False
    native_threads: None = None
    short_context: int | None = None
    runs_by: Final = "counting"
    hidden_dtype: HiddenDtype = "F32"

    def __init__(
        self,
        first_layer: int = 0,
        last_layer: int = 2,
        num_layers: int = 2,
        *,
        capacity_tokens: int = 100,
        max_positions: int = 64,
    ) -> None:
        self.first_layer = first_layer
        self.last_layer = last_layer
        self.num_layers = num_layers
        self.hidden_size = HIDDEN
        self.vocab_size = VOCAB
        self.max_positions = max_positions
        self.kv = KVBudget(capacity_tokens)
        self.gate = threading.Event()
        self.gate.set()
        self.began = threading.Event()
        self.passes: list[list[int]] = []
        self.poison: int | None = None
        self.not_a_number: int | None = None
        self._sums: dict[int, list[float]] = {}

    def use_threads(self, count: int) -> None:
        """Counting takes one."""

    def forward(self, inputs: Array, segments: Sequence[Segment]) -> Array:
        self.began.set()
        assert self.gate.wait(30)
        self.passes.append([segment.length for segment in segments])
        values = inputs.astype(np.float32) if self.first_layer == 0 else inputs[:, 0]
        outputs = []
        parts = np.split(values, np.cumsum([segment.length for segment in segments])[:-1])
        for segment, part in zip(segments, parts, strict=True):
            assert self.kv.length(segment.handle) == segment.position
            sums = self._sums.setdefault(segment.handle, [])
            del sums[segment.position :]
            for value in part.tolist():
                sums.append((sums[-1] if sums and self.first_layer == 0 else 0.0) + value)
            self.kv.extend(segment.handle, segment.length)
            if self.poison in part.tolist():
                raise Poisoned(f"token {self.poison}")
            states = np.zeros((segment.length, HIDDEN), np.float32)
            states[:, 0] = sums[segment.position :]
            if self.not_a_number in part.tolist():
                states[-1, 1] = np.nan
            outputs.append(states)
        return np.concatenate(outputs)

    def logits(self, hidden: Array) -> Float32:
        logits = np.zeros((len(hidden), VOCAB), np.float32)
        logits[np.arange(len(hidden)), hidden[:, 0].astype(np.int64) % VOCAB] = 1
        return logits
