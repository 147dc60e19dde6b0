"""A layer group that computes nothing and sleeps as long as a pass would take on another device. For tests and benchmarks.

KV is counted as in a real group. It is sent between pods if the speed of their links is given. Hidden states carry the id of
their token, and the logits of the last stage select the same token, so that a generation runs to its end.
"""

import time
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np

from functions.configuration.pass_times import PassTimes, pairs
from functions.stage.models.floats import Array, Float32, HiddenDtype, narrowed, widened
from functions.stage.models.kv_cache import KVBlocks, KVBudget, KVLayout
from functions.stage.models.layer_group import PreparedAdapter, Segment
from storage.loading.weight_loader import RawTensor

_BF16_BYTES: Final = 2
# A token id travels as digits of 7 bits. Every dtype of hidden states holds them exactly, I8 because _LARGEST is in each row.
_DIGITS: Final = np.array([1, 2**7, 2**14, 2**21])
_LARGEST: Final = 2**7 - 1


class SleepKV(KVBlocks):
    """Implements `KVBlocks` with two meaningless bytes for each token in place of keys and values."""

    layout = KVLayout("sleep", num_layers=1, kv_heads=1, head_bytes=1)

    def __init__(self, tokens: int, token_seconds: float) -> None:
        """token_seconds: how long the emulated link takes to send the KV of one token."""
        super().__init__(tokens)
        self.token_seconds = token_seconds

    def _copy_kv(self, source: int, target: int, tokens: int) -> None:
        """Does nothing."""

    def copy_out(self, handle: int, first: int, target: Array, *, windowed: bool = False) -> None:
        """Leaves `target` as it is."""

    def copy_in(self, handle: int, first: int, source: Array, *, windowed: bool = False) -> None:
        """Does nothing."""


class SleepGroup:
    """Implements `LayerGroup` by sleeping."""

    shares_work: Final = True
    takes_token_ids: Final = False
    native_threads: Final = None
    short_context: Final = None
    hidden_dtype: HiddenDtype = "BF16"
    runs_by = "nothing: passes sleep"

    def __init__(
        self,
        config: Mapping[str, Any],
        first_layer: int,
        last_layer: int,
        kv_budget_bytes: int,
        times: PassTimes,
        link_bytes_per_second: float | None = None,
    ) -> None:
        """Creates layers [first_layer, last_layer). config: a config.json with Llama's names.

        times: how long passes take. link_bytes_per_second: speed of the emulated link of a pod. If None, KV is not sent
        between pods, and a pod computes the KV that it lacks.
        """
        self.first_layer = first_layer
        self.last_layer = last_layer
        self.num_layers: int = config["num_hidden_layers"]
        self.hidden_size: int = config["hidden_size"]
        self.vocab_size: int = config["vocab_size"]
        self.max_positions: int = config["max_position_embeddings"]
        token_bytes = self._kv_bytes_per_token(config)
        tokens = kv_budget_bytes // token_bytes
        self.kv: KVBudget = SleepKV(tokens, token_bytes / link_bytes_per_second) if link_bytes_per_second else KVBudget(tokens)
        self._times = times

    def use_threads(self, count: int) -> None:
        """Does nothing: sleeping takes no threads."""

    def prepare_adapter(self, tensors: Mapping[str, RawTensor]) -> PreparedAdapter:
        return PreparedAdapter(None, sum(len(tensor.data) for tensor in tensors.values()))

    def place_adapter(self, number: int, prepared: PreparedAdapter | None) -> None:
        """Does nothing: adapters take no time."""

    def forward(self, inputs: Array, segments: Sequence[Segment]) -> Array:
        held = sum(segment.position + segment.length for segment in segments)
        paired = sum(pairs(segment.position, segment.length) for segment in segments)
        time.sleep(self._times.forward_seconds(len(inputs), paired, held))
        for segment in segments:
            self.kv.extend(segment.handle, segment.length)
        if self.first_layer > 0:
            return inputs.copy()
        # Only the digits are converted: rows of float32 would cost more processor time than all else at a sleeping stage.
        largest = narrowed(np.full((1, 1), _LARGEST, np.float32), self.hidden_dtype)
        hidden = np.empty((len(inputs), self.hidden_size), largest.dtype)
        hidden[:] = largest
        hidden[:, : len(_DIGITS)] = narrowed((inputs[:, None] // _DIGITS % 2**7).astype(np.float32), self.hidden_dtype)
        return hidden

    def logits(self, hidden: Array) -> Float32:
        time.sleep(self._times.logits_seconds(len(hidden)))
        digits = widened(hidden[:, : len(_DIGITS)], self.hidden_dtype).astype(np.int64)
        logits = np.zeros((len(hidden), self.vocab_size), np.float32)
        logits[np.arange(len(hidden)), (digits * _DIGITS).sum(axis=-1)] = 1
        return logits

    def _kv_bytes_per_token(self, config: Mapping[str, Any]) -> int:
        heads: int = config["num_attention_heads"]
        head_size: int = config.get("head_dim") or self.hidden_size // heads
        kv_heads: int = config.get("num_key_value_heads") or heads
        return 2 * (self.last_layer - self.first_layer) * kv_heads * head_size * _BF16_BYTES
