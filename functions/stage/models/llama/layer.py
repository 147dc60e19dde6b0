"""One decoder layer of a Llama-shaped model: about ten operators a pass, beside the attention of each sequence."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from functions.stage.models.llama.attention import PassAttention
from functions.stage.models.llama.kv_pool import KVPool
from functions.stage.models.llama.linear import Matrix, linear, stacked
from functions.stage.models.llama.mlp import gated_mlp
from functions.stage.models.llama.norm import RmsNorm
from functions.stage.models.llama.rope import interleaved_rows
from functions.stage.models.llama.rotation import rotate
from functions.stage.models.llama.weights import Precision, Weights
from storage.checkpoints.llama_config import LlamaConfig


@dataclass(frozen=True, slots=True)
class Places:
    """Where the new tokens of a pass are."""

    slots: torch.Tensor
    """In the KV pool, int64 [n]."""
    rotations: torch.Tensor
    """complex64 [n, 1, head_dim / 2]"""


@dataclass(frozen=True, slots=True)
class Pass:
    """What all layers share in one forward pass."""

    places: Places
    attention: Mapping[int | None, PassAttention]
    """By window."""


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """What a layer computes with. Queries and keys have the two halves of each rotated pair side by side."""

    input_gain: torch.Tensor
    qkv: Sequence[Matrix]
    """One matrix, or where they are of several kinds, three."""
    qk_gain: torch.Tensor | None
    """[heads + kv heads, head_dim]"""
    out: Matrix
    mlp_gain: torch.Tensor
    gate: Matrix
    up: Matrix
    down: Matrix

    @classmethod
    def take(cls, model: LlamaConfig, weights: Weights) -> "LayerWeights":
        """Raises MissingTensors."""
        return cls(
            input_gain=weights.vector("input_layernorm.weight"),
            qkv=stacked(_qkv(model, weights)),
            qk_gain=_qk_gains(model, weights) if model.qk_norm else None,
            out=weights.matrix("self_attn.o_proj", model.out_bias),
            mlp_gain=weights.vector("post_attention_layernorm.weight"),
            gate=weights.matrix("mlp.gate_proj", model.mlp_bias),
            up=weights.matrix("mlp.up_proj", model.mlp_bias),
            down=weights.matrix("mlp.down_proj", model.mlp_bias),
        )


class LlamaLayer:
    """A layer with its weights, by torch's operators."""

    def __init__(self, model: LlamaConfig, layer: int, slot: int, weights: LayerWeights, precision: Precision) -> None:
        """layer: number in the whole model, slot: in this group's KV pool."""
        self._slot = slot
        self._window = model.windows[layer]
        self._rotary = model.rotary[layer]
        self._heads = model.num_heads
        self._kv_heads = model.num_kv_heads
        self._head_dim = model.head_dim
        self._kv_dtype = precision.kv
        self._input_norm = RmsNorm(weights.input_gain, model.rms_norm_eps)
        self._qkv = linear(weights.qkv, precision.activations)
        self._qk_norm = None if weights.qk_gain is None else RmsNorm(weights.qk_gain, model.rms_norm_eps)
        self._out = linear([weights.out], precision.activations)
        self._mlp_norm = RmsNorm(weights.mlp_gain, model.rms_norm_eps)
        self._mlp = gated_mlp(weights.gate, weights.up, weights.down, precision.activations)

    def __call__(self, hidden: torch.Tensor, state: Pass, pool: KVPool) -> torch.Tensor:
        """hidden [n, hidden_size] → the same; keys and values of the n tokens are in the pool behind it."""
        heads = self._qkv(self._input_norm(hidden)).view(len(hidden), -1, self._head_dim)
        self._normalize_and_rotate(heads.narrow(1, 0, self._heads + self._kv_heads), state)
        heads = heads.to(self._kv_dtype)
        queries, keys_and_values = torch.split(heads, [self._heads, 2 * self._kv_heads], 1)
        pool.write(self._slot, state.places.slots, keys_and_values.view(len(hidden), 2, self._kv_heads, self._head_dim))
        queries = queries.view(len(hidden), self._kv_heads, -1, self._head_dim)
        attended = state.attention[self._window](self._slot, queries).to(hidden.dtype)
        hidden = self._out.add_to(hidden, attended)
        return self._mlp.add_to(hidden, self._mlp_norm(hidden))

    def _normalize_and_rotate(self, heads: torch.Tensor, state: Pass) -> None:
        if self._qk_norm is not None:
            heads.copy_(self._qk_norm(heads))
        if self._rotary:
            rotate(heads, state.places.rotations)


def _qkv(model: LlamaConfig, weights: Weights) -> list[Matrix]:
    """Queries and keys with rotated pairs side by side, and values."""
    queries, keys, values = (weights.matrix(f"self_attn.{name}_proj", model.qkv_bias) for name in "qkv")
    return [
        queries.with_rows(torch.from_numpy(interleaved_rows(model.num_heads, model.head_dim))),
        keys.with_rows(torch.from_numpy(interleaved_rows(model.num_kv_heads, model.head_dim))),
        values,
    ]


def _qk_gains(model: LlamaConfig, weights: Weights) -> torch.Tensor:
    """Of all query heads and all key heads [heads, head_dim], ordered as `rotate` wants them."""
    of_queries = weights.vector("self_attn.q_norm.weight").expand(model.num_heads, -1)
    of_keys = weights.vector("self_attn.k_norm.weight").expand(model.num_kv_heads, -1)
    return torch.cat((of_queries, of_keys))[:, torch.from_numpy(interleaved_rows(1, model.head_dim))]
