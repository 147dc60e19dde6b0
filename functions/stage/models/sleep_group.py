"""A layer group that waits a stated time for each pass instead of computing: what pipelining and scaling are measured with.

KV is accounted for as a real group's. The hidden states carry the token id, and the last stage answers with the token that
came in, so that a generation goes on to its end.
"""

import time
from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch

from functions.stage.models.kv_budget import KVBudget
from functions.stage.models.layer_group import Segment

_DIGITS: Final = torch.tensor([1, 2**7, 2**14, 2**21])
"""A token id as digits of seven bits, which every dtype of hidden states holds exactly."""


class SleepGroup:
    """Implements `LayerGroup`."""

    shares_work: Final = True
    runs_by = "nothing: passes sleep"

    def __init__(
        self, config: Mapping[str, Any], first_layer: int, last_layer: int, kv_budget_bytes: int, seconds: float
    ) -> None:
        """config: a config.json that has the names of Llama's. seconds: of one pass, whatever its size."""
        self.first_layer = first_layer
        self.last_layer = last_layer
        self.num_layers: int = config["num_hidden_layers"]
        self.hidden_size: int = config["hidden_size"]
        self.vocab_size: int = config["vocab_size"]
        self.max_positions: int = config["max_position_embeddings"]
        self.hidden_dtype = torch.bfloat16
        self.kv = KVBudget(kv_budget_bytes // self._kv_bytes_per_token(config))
        self._seconds = seconds

    def forward(self, inputs: torch.Tensor, segments: Sequence[Segment]) -> torch.Tensor:
        time.sleep(self._seconds)
        for segment in segments:
            self.kv.extend(segment.handle, segment.length)
        if self.first_layer > 0:
            return inputs.clone()
        hidden = torch.zeros(len(inputs), self.hidden_size, dtype=self.hidden_dtype)
        hidden[:, : len(_DIGITS)] = (inputs[:, None] // _DIGITS % 2**7).to(self.hidden_dtype)
        return hidden

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        token_ids = (hidden[:, : len(_DIGITS)].to(torch.int64) * _DIGITS).sum(dim=-1)
        return torch.zeros(len(hidden), self.vocab_size).scatter(1, token_ids[:, None], 1.0)

    def _kv_bytes_per_token(self, config: Mapping[str, Any]) -> int:
        heads: int = config["num_attention_heads"]
        head_size: int = config.get("head_dim") or self.hidden_size // heads
        kv_heads: int = config.get("num_key_value_heads") or heads
        return 2 * (self.last_layer - self.first_layer) * kv_heads * head_size * self.hidden_dtype.itemsize
