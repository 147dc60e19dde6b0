"""One decoder layer of a Llama-shaped model in torch: about ten operators, and the attention of each sequence."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from functions.stage.models.llama.attention import PassAttention
from functions.stage.models.llama.kv_pool import TorchKVPool
from functions.stage.models.llama.linear import Matrix, Precision, TorchWeights, linear, stacked
from functions.stage.models.llama.rope import interleaved_rows, rope_frequencies
from functions.stage.models.torch_adapters import PassAdapters
from storage.checkpoints.decoder import Decoder


@dataclass(frozen=True, slots=True)
class PassState:
    """Tensors that all layers use in one forward pass of n tokens."""

    slots: torch.Tensor  # index of each token in the KV pool, int64 [n]
    rotations: torch.Tensor  # complex64 [n, 1, head_dim / 2]
    attention: Mapping[int | None, PassAttention]  # for each window that a layer has
    adapters: PassAdapters | None  # None: no row has one


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """The weights of one layer. Rows of queries and keys are reordered so that the halves of each rotated pair are adjacent."""

    input_gain: torch.Tensor
    qkv: Sequence[Matrix]  # one matrix, or three if their dtypes differ
    qk_gain: torch.Tensor | None  # [heads + kv heads, head_dim]
    out: Matrix
    mlp_gain: torch.Tensor
    gate: Matrix
    up: Matrix
    down: Matrix

    @classmethod
    def take(cls, model: Decoder, weights: TorchWeights) -> "LayerWeights":
        """Removes the layer's tensors from `weights` and returns them in this form. Raises MissingTensors."""
        layer, names = model.kinds[0], model.names
        attention, mlp_bias = model.attention, layer.feed_forward is not None and layer.feed_forward.biased
        queries, keys, values = (weights.matrix(name, attention.qkv_bias) for name in names.qkv)
        qkv = [
            queries.with_rows(torch.from_numpy(interleaved_rows(attention.num_heads, attention.head_dim))),
            keys.with_rows(torch.from_numpy(interleaved_rows(attention.num_kv_heads, attention.head_dim))),
            values,
        ]
        qk_gain = None
        if attention.qk_norm:
            of_queries = weights.vector(f"{names.query_norm}.weight").expand(attention.num_heads, -1)
            of_keys = weights.vector(f"{names.key_norm}.weight").expand(attention.num_kv_heads, -1)
            qk_gain = torch.cat((of_queries, of_keys))[:, torch.from_numpy(interleaved_rows(1, attention.head_dim))]
        return cls(
            input_gain=weights.vector(f"{names.before_attention}.weight"),
            qkv=stacked(qkv),
            qk_gain=qk_gain,
            out=weights.matrix(names.out, attention.out_bias),
            mlp_gain=weights.vector(f"{names.before_feed_forward}.weight"),
            gate=weights.matrix(names.gate, mlp_bias),
            up=weights.matrix(names.up, mlp_bias),
            down=weights.matrix(names.down, mlp_bias),
        )


class LlamaLayer:
    """A decoder layer: attention and MLP, each with its norm and residual sum."""

    def __init__(self, model: Decoder, layer: int, slot: int, weights: LayerWeights, precision: Precision) -> None:
        """Builds layer number `layer` of the whole model. slot: number of the layer in this group's KV pool."""
        self._slot = slot
        attention = model.layers[layer].attention
        assert attention is not None, "see torch_obstacle"
        self._window = attention.window
        self._rotary = attention.rope is not None
        self._heads = attention.num_heads
        self._kv_heads = attention.num_kv_heads
        self._head_dim = attention.head_dim
        self._kv_dtype = precision.kv
        self._input_norm = RmsNorm(weights.input_gain, model.final_norm.eps)
        self._qkv = linear(weights.qkv, precision.activations)
        self._qk_norm = None if weights.qk_gain is None else RmsNorm(weights.qk_gain, model.final_norm.eps)
        self._out = linear([weights.out], precision.activations)
        self._mlp_norm = RmsNorm(weights.mlp_gain, model.final_norm.eps)
        self._mlp = GatedMlp(weights.gate, weights.up, weights.down, precision.activations)

    def __call__(self, hidden: torch.Tensor, state: PassState, pool: TorchKVPool) -> torch.Tensor:
        """Computes the layer: hidden states [n, hidden_size] in, the same shape out.

        Writes the tokens' keys and values to `pool`.
        """
        normalized, adapters = self._input_norm(hidden), state.adapters
        projected = self._qkv(normalized)
        if adapters is not None:
            adapters.add(self._slot, "qkv", normalized, projected)
        heads = projected.view(len(hidden), -1, self._head_dim)
        queries_and_keys = heads.narrow(1, 0, self._heads + self._kv_heads)
        if self._qk_norm is not None:
            queries_and_keys.copy_(self._qk_norm(queries_and_keys))
        if self._rotary:
            rotate(queries_and_keys, state.rotations)
        heads = heads.to(self._kv_dtype)
        queries, keys_and_values = torch.split(heads, [self._heads, 2 * self._kv_heads], 1)
        pool.write(self._slot, state.slots, keys_and_values.view(len(hidden), 2, self._kv_heads, self._head_dim))
        queries = queries.view(len(hidden), self._kv_heads, -1, self._head_dim)
        attended = state.attention[self._window](self._slot, queries).to(hidden.dtype)
        hidden = self._out.add_to(hidden, attended)
        if adapters is None:
            return self._mlp.add_to(hidden, self._mlp_norm(hidden))
        adapters.add(self._slot, "out", attended, hidden)
        return self._mlp.adapted(hidden, self._mlp_norm(hidden), self._slot, adapters)


class RmsNorm:
    """RMSNorm over the last dimension: x * weight / sqrt(mean(x²) + eps), computed in float32 with five operators.

    On CPUs `F.rms_norm` runs eight operators. One row of 576 in fp32 takes 6.1 µs here and 7.1 µs with `F.rms_norm`; 512 rows
    take 103 and 638 µs (Xeon with AMX, one thread).
    """

    def __init__(self, weight: torch.Tensor, eps: float) -> None:
        """Sets the gain `weight`: [size], or [heads, size] if each head has its own. eps: added to the mean square."""
        self._weight = weight.float()
        self._eps = torch.tensor(eps, dtype=torch.float32, device=weight.device)
        self._share = 1 / weight.shape[-1]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Normalizes x [..., size] over its last dimension. Returns a new tensor of the same shape and dtype."""
        wide = x.float()
        norms = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        inverse = torch.addcmul(self._eps, norms, norms, value=self._share).rsqrt_()
        return (wide * inverse).mul_(self._weight).to(x.dtype)


class GatedMlp:
    """The gated MLP of a layer: residual + W_down (silu(W_gate x) * W_up x).

    In int8, gate and up are stacked into one matrix, so that x is quantized once for both. In other dtypes they are two
    matrices, whose kernels also compute SiLU and the product.
    """

    def __init__(self, gate: Matrix, up: Matrix, down: Matrix, dtype: torch.dtype) -> None:
        """Prepares the three matrices for multiplication. dtype: of activations."""
        self._is_stacked = gate.weight.dtype == up.weight.dtype == torch.int8
        self._gate = linear([gate, up] if self._is_stacked else [gate], dtype)
        self._up = self._gate if self._is_stacked else linear([up], dtype)
        self._down = linear([down], dtype)

    def add_to(self, residual: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Returns residual + MLP(x). Both are [n, hidden_size]."""
        if not self._is_stacked:
            return self._down.add_to(residual, self._up.times(x, self._gate.silu(x)))
        gate, up = self._gate(x).chunk(2, 1)
        return self._down.add_to(residual, functional.silu(gate).mul_(up))

    def adapted(self, residual: torch.Tensor, x: torch.Tensor, slot: int, adapters: PassAdapters) -> torch.Tensor:
        """Returns the same as `add_to`, with adapters applied. slot: number of the layer in the group."""
        gate, up = self._gate(x).chunk(2, 1) if self._is_stacked else (self._gate(x), self._up(x))
        adapters.add(slot, "gate", x, gate)
        adapters.add(slot, "up", x, up)
        inner = functional.silu(gate).mul_(up)
        hidden = self._down.add_to(residual, inner)
        adapters.add(slot, "down", inner, hidden)
        return hidden


class Rope:
    """Computes the rotations of rotary position embeddings, once per pass. The function `rotate` applies them in a layer."""

    def __init__(self, parameters: Mapping[str, Any], head_dim: int, device: torch.device) -> None:
        frequencies, scaling = rope_frequencies(parameters, head_dim)
        self._frequencies = torch.from_numpy(frequencies).to(device)
        self._scaling = torch.tensor(scaling, dtype=torch.float32, device=device)

    def rotations(self, positions: torch.Tensor) -> torch.Tensor:
        """Returns the rotation of each pair of a head at int64 positions [n], as complex64 [n, 1, head_dim / 2]."""
        angles = positions.float().unsqueeze(1) * self._frequencies
        return torch.polar(self._scaling.expand_as(angles), angles).unsqueeze(1)


def rotate(heads: torch.Tensor, rotations: torch.Tensor) -> None:
    """Rotates heads [n, heads, head_dim] in place. The halves of a pair are adjacent and form one complex number.

    This takes 6.6 µs for 16 rows of 12 heads. If the halves were not adjacent, it would take 78 µs (Xeon with AMX, one thread).
    """
    pairs = heads.view(*heads.shape[:2], -1, 2)
    if heads.dtype == torch.float32:
        torch.view_as_complex(pairs).mul_(rotations)
    else:
        pairs.copy_(torch.view_as_real(torch.view_as_complex(pairs.float()).mul_(rotations)))
