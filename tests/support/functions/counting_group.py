"""A layer group whose results say which tokens it saw, and that fails when told to: for tests of the engine alone."""

import threading
from collections.abc import Sequence
from typing import Final

import torch

from functions.stage.models.kv_budget import KVBudget
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

    shares_work: Final = False

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
        self.hidden_dtype = torch.float32
        self.kv = KVBudget(capacity_tokens)
        self.gate = threading.Event()
        self.gate.set()
        self.began = threading.Event()
        self.passes: list[list[int]] = []
        self.poison: int | None = None
        self.not_a_number: int | None = None
        self._sums: dict[int, list[float]] = {}

    def forward(self, inputs: torch.Tensor, segments: Sequence[Segment]) -> torch.Tensor:
        self.began.set()
        assert self.gate.wait(30)
        self.passes.append([segment.length for segment in segments])
        values = inputs.to(torch.float32) if self.first_layer == 0 else inputs[:, 0]
        outputs = []
        for segment, part in zip(segments, torch.split(values, [segment.length for segment in segments]), strict=True):
            assert self.kv.length(segment.handle) == segment.position
            sums = self._sums.setdefault(segment.handle, [])
            del sums[segment.position :]
            for value in part.tolist():
                sums.append((sums[-1] if sums and self.first_layer == 0 else 0.0) + value)
            self.kv.extend(segment.handle, segment.length)
            if self.poison in part.tolist():
                raise Poisoned(f"token {self.poison}")
            states = torch.zeros(segment.length, HIDDEN)
            states[:, 0] = torch.tensor(sums[segment.position :])
            if self.not_a_number in part.tolist():
                states[-1, 1] = float("nan")
            outputs.append(states)
        return torch.cat(outputs)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        tokens = hidden[:, 0].to(torch.int64) % VOCAB
        return torch.zeros(len(hidden), VOCAB).scatter(1, tokens[:, None], 1.0)
