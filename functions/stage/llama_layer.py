"""One decoder layer of a Llama-shaped model: about ten operators a pass, beside the attention of each sequence."""

from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

import torch
from torch.nn import functional

from functions.stage.attention import PassAttention
from functions.stage.kv_pool import KVPool
from functions.stage.linear import Linear, float_linear
from functions.stage.llama_config import LlamaConfig
from functions.stage.rope import interleaved_rows, rotate


class MissingTensors(Exception):
    """The stage lacks tensors that its layers need. Publish the model again from a complete checkpoint."""


@dataclass(frozen=True, slots=True)
class Pass:
    """What all layers share in one forward pass."""

    slots: torch.Tensor
    """Where in the KV pool the new tokens go, int64 [n]."""
    rotations: torch.Tensor
    attention: Mapping[int | None, PassAttention]
    """By window."""


class Tensors:
    """A checkpoint's tensors under one prefix. What is taken is removed, so that sources are freed as fused ones appear."""

    def __init__(
        self, tensors: MutableMapping[str, torch.Tensor], prefix: str, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._tensors = tensors
        self._prefix = prefix
        self._dtype = dtype
        self._device = device

    def take(self, name: str) -> torch.Tensor:
        """Raises MissingTensors."""
        try:
            tensor = self._tensors.pop(self._prefix + name)
        except KeyError as missing:
            raise MissingTensors(f"{missing} is missing") from None
        return tensor.to(device=self._device, dtype=self._dtype)

    def linear(self, *names: str, biased: bool, rows: torch.Tensor | None = None) -> Linear:
        """The matrices of these names stacked; `rows` reorders the outcome."""
        weight = self._stacked([f"{name}.weight" for name in names], rows)
        bias = self._stacked([f"{name}.bias" for name in names], rows) if biased else None
        return float_linear(weight, bias)

    def _stacked(self, names: list[str], rows: torch.Tensor | None) -> torch.Tensor:
        tensors = [self.take(name) for name in names]
        stacked = tensors[0] if len(tensors) == 1 else torch.cat(tensors)
        return stacked if rows is None else stacked[rows.to(stacked.device)]


class LlamaLayer:
    """A layer with its weights."""

    def __init__(self, model: LlamaConfig, layer: int, slot: int, tensors: Tensors) -> None:
        """layer: number in the whole model, slot: in this group's KV pool."""
        self._slot = slot
        self._window = model.windows[layer]
        self._rotary = model.rotary[layer]
        self._heads = model.num_heads
        self._kv_heads = model.num_kv_heads
        self._head_dim = model.head_dim
        self._eps = model.rms_norm_eps
        self._input_norm = tensors.take("input_layernorm.weight")
        self._qkv = tensors.linear(*(f"self_attn.{name}_proj" for name in "qkv"), biased=model.qkv_bias, rows=_qkv_rows(model))
        self._qk_norm = _qk_norm(model, tensors) if model.qk_norm else None
        self._out = tensors.linear("self_attn.o_proj", biased=model.out_bias)
        self._mlp_norm = tensors.take("post_attention_layernorm.weight")
        self._gate = tensors.linear("mlp.gate_proj", biased=model.mlp_bias)
        self._up = tensors.linear("mlp.up_proj", biased=model.mlp_bias)
        self._down = tensors.linear("mlp.down_proj", biased=model.mlp_bias)

    def __call__(self, hidden: torch.Tensor, state: Pass, pool: KVPool) -> torch.Tensor:
        """hidden [n, hidden_size] → the same; keys and values of the n tokens are in the pool behind it."""
        heads = self._qkv(self._normalized(hidden, self._input_norm)).view(len(hidden), -1, self._head_dim)
        rotated = heads.narrow(1, 0, self._heads + self._kv_heads)
        if self._qk_norm is not None:
            rotated.copy_(functional.rms_norm(rotated, (self._head_dim,), eps=self._eps).mul_(self._qk_norm))
        if self._rotary:
            rotate(rotated, state.rotations)
        queries, keys_and_values = torch.split(heads, (self._heads, 2 * self._kv_heads), 1)
        pool.write(self._slot, state.slots, keys_and_values.view(len(hidden), 2, self._kv_heads, self._head_dim))
        queries = queries.view(len(hidden), self._kv_heads, -1, self._head_dim)
        hidden = self._out.add_to(hidden, state.attention[self._window](self._slot, queries))
        x = self._normalized(hidden, self._mlp_norm)
        return self._down.add_to(hidden, self._up.times(x, self._gate.silu(x)))

    def _normalized(self, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return functional.rms_norm(hidden, weight.shape, weight, self._eps)


def _qkv_rows(model: LlamaConfig) -> torch.Tensor:
    """Queries and keys with rotated pairs side by side, values as they are."""
    rotated = interleaved_rows(model.num_heads + model.num_kv_heads, model.head_dim)
    values = torch.arange(model.num_kv_heads * model.head_dim) + len(rotated)
    return torch.cat((rotated, values))


def _qk_norm(model: LlamaConfig, tensors: Tensors) -> torch.Tensor:
    """The gains of all query heads and all key heads [heads, head_dim], ordered as `rotate` wants them."""
    of_queries = tensors.take("self_attn.q_norm.weight").expand(model.num_heads, -1)
    of_keys = tensors.take("self_attn.k_norm.weight").expand(model.num_kv_heads, -1)
    return torch.cat((of_queries, of_keys))[:, interleaved_rows(1, model.head_dim)]
