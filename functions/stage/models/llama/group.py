"""The layer group of the Llama-shaped families in torch: on GPUs, and on CPUs if layers cannot run in C (`models/native`).

All rows of a pass, prompt chunks and decode steps mixed, are multiplied by each matrix together. Only attention is computed
sequence by sequence. Weights are set layer by layer while later ones are still being read. Does not use transformers.
"""

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any, Final

import numpy as np
import torch
from torch.nn import functional

from functions.stage.models.adapters import LowRank, WrongAdapter, low_ranks
from functions.stage.models.floats import HIDDEN_DTYPES, Array, Float32
from functions.stage.models.layer_group import ColdExperts, PreparedAdapter, Segment
from functions.stage.models.llama.attention import PassAttention
from functions.stage.models.llama.kv_pool import TorchKVPool
from functions.stage.models.llama.layer import LayerWeights, LlamaLayer, PassState, RmsNorm, Rope
from functions.stage.models.llama.linear import PRECISIONS, Matrix, TorchWeights, linear
from functions.stage.models.llama.rope import interleaved_rows
from functions.stage.models.llama.structure import (
    check_layers,
    check_placed,
    check_shapes,
    checked_positions,
    layers_in,
    torch_obstacle,
)
from functions.stage.models.packed_tensors import widen
from functions.stage.models.torch_adapters import PassAdapters, Share, TorchLowRank
from functions.stage.models.torch_border import input_tensor, output_array, use_threads
from storage.checkpoints.decoder_config import decoder_of
from storage.checkpoints.decoder_families import UnsupportedConfig
from storage.loading.weight_loader import RawTensor


class LlamaGroup:
    """Implements `LayerGroup`. After creation, call `place` for the weights in any order, and then `finish` once."""

    shares_work: Final = False
    takes_token_ids: Final = False
    native_threads: Final = None
    short_context: Final = None
    use_threads = staticmethod(use_threads)

    def __init__(
        self,
        config: Mapping[str, Any],
        first_layer: int,
        last_layer: int,
        dtype: str,
        device: torch.device | str,
        kv_budget_bytes: int,
        why: str | None = None,
    ) -> None:
        """Creates layers [first_layer, last_layer) without weights.

        config: a config.json. dtype: of the published model.
        why: the reason why the layers do not run in C, which would be faster; used only in `runs_by`. Raises UnsupportedConfig,
        and ValueError for impossible layers, budget, dtype or device.
        """
        model = self._model = decoder_of(config)
        if (obstacle := torch_obstacle(model)) is not None:
            raise UnsupportedConfig(obstacle)
        check_layers(model, first_layer, last_layer)
        self._is_last = last_layer == model.num_layers
        self._device = torch.device(device)
        if dtype not in PRECISIONS:
            raise ValueError(f"dtype {dtype!r} is none of {', '.join(PRECISIONS)}")
        if dtype == "int8" and self._device.type != "cpu":
            raise ValueError(f"int8 runs on CPUs, not on {device}: publish the model in bfloat16 for it")
        self._precision = PRECISIONS[dtype]
        self.first_layer = first_layer
        self.last_layer = last_layer
        self.num_layers = model.num_layers
        self.hidden_size = model.hidden_size
        self.vocab_size = model.vocab_size
        self.max_positions = model.max_positions
        self.hidden_dtype = HIDDEN_DTYPES[dtype]
        self.kv = TorchKVPool(
            last_layer - first_layer,
            model.attention.num_kv_heads,
            model.attention.head_dim,
            self._precision.kv,
            self._device,
            kv_budget_bytes,
        )
        self._rope = Rope(model.ropes["all"].parameters, model.attention.head_dim, self._device)
        self.runs_by = "torch's operators" if why is None else f"torch's operators: {why}"
        self._layers: dict[int, LlamaLayer] = {}
        self._adapters: dict[int, list[Share]] = {}
        self._embedding: torch.Tensor | None = None
        self._norm: RmsNorm | None = None
        self._head: Callable[[torch.Tensor], torch.Tensor] | None = None

    def place(self, tensors: MutableMapping[str, RawTensor]) -> None:
        """Removes this group's weights from `tensors` and keeps them. Ignores weights of other groups.

        tensors: by checkpoint name, any part of the model that has each layer whole or not at all. Raises MissingTensors if a
        layer is incomplete or a name is unknown, and WrongShape.
        """
        widen(tensors, self.hidden_dtype)
        check_shapes(self._model, {name: tensor.shape for name, tensor in tensors.items()})
        names = self._model.names
        for layer in layers_in(self._model, tensors):
            if self.first_layer <= layer < self.last_layer:
                own = TorchWeights(tensors, f"{names.layers}.{layer}.", self._precision, self._device)
                weights = LayerWeights.take(self._model, own)
                self._layers[layer] = LlamaLayer(self._model, layer, layer - self.first_layer, weights, self._precision)
        others = TorchWeights(tensors, "", self._precision, self._device)
        needs_embedding = self.first_layer == 0 or (self._is_last and self._model.tied)
        if needs_embedding and f"{names.embedding}.weight" in others:
            self._embedding = others.matrix(names.embedding).weight
        if self._is_last and f"{names.final_norm}.weight" in others:
            self._norm = RmsNorm(others.vector(f"{names.final_norm}.weight"), self._model.final_norm.eps)
        if self._is_last and f"{names.head}.weight" in others:
            self._head = linear([others.matrix(names.head)], self._precision.activations)

    def finish(self) -> None:
        """Makes the group ready to run. Raises MissingTensors, which names the weights that `place` never got."""
        if self._is_last and self._head is None and self._model.tied and self._embedding is not None:
            self._head = linear([Matrix(self._embedding)], self._precision.activations)
        check_placed(
            self._model,
            self.first_layer,
            self.last_layer,
            self._layers,
            embedding=self._embedding is not None,
            norm=self._norm is not None,
            head=self._head is not None,
        )
        if self.first_layer > 0:  # it was needed for the head alone
            self._embedding = None

    def prepare_adapter(self, tensors: Mapping[str, RawTensor]) -> PreparedAdapter:
        model, dtype = self._model, self._precision.activations
        attention, names = model.attention, model.names
        places = {"out": names.out, "gate": names.gate, "up": names.up, "down": names.down}
        layers: list[Share] = []
        found = low_ranks(tensors, "F32" if dtype == torch.float32 else self.hidden_dtype)
        for layer in range(self.first_layer, self.last_layer):
            own: dict[str, TorchLowRank] = {}
            prefix = f"{names.layers}.{layer}."
            parts = [found.pop(prefix + name, None) for name in names.qkv]
            if any(part is not None for part in parts):
                counts = (attention.num_heads, attention.num_kv_heads)
                orders = [interleaved_rows(count, attention.head_dim) for count in counts]
                orders.append(np.arange(len(orders[1])))
                own["qkv"] = TorchLowRank.of(_stacked(parts, orders), dtype, self._device)
            for place, name in places.items():
                if (low := found.pop(prefix + name, None)) is not None:
                    own[place] = TorchLowRank.of(low, dtype, self._device)
            layers.append(own)
        if found:
            raise WrongAdapter(f"the adapter changes {min(found)}, which is no matrix of these layers")
        return PreparedAdapter(layers, sum(low.bytes for own in layers for low in own.values()))

    def place_adapter(self, number: int, prepared: PreparedAdapter | None) -> None:
        if prepared is None:
            self._adapters.pop(number, None)
        else:
            self._adapters[number] = prepared.share

    def cold_experts(self) -> ColdExperts:
        """Returns counters of 0, because no layer has experts."""
        return ColdExperts(0, 0, 0)

    @torch.inference_mode()
    def forward(self, inputs: Array, segments: Sequence[Segment]) -> Array:
        """See `LayerGroup`. Raises ValueError if segments do not fit the KV cache, and then leaves the cache unchanged."""
        positions = checked_positions(self.kv, len(inputs), segments)
        hidden = input_tensor(inputs, self.hidden_dtype).to(self._device)
        if self._embedding is not None:
            hidden = functional.embedding(hidden, self._embedding)
        hidden = hidden.to(self._precision.activations)
        windows = set(self._model.windows[self.first_layer : self.last_layer])
        state = PassState(
            self.kv.slots([(segment.handle, segment.position, segment.position + segment.length) for segment in segments]),
            self._rope.rotations(torch.tensor(positions, device=self._device)),
            {window: PassAttention(segments, self.kv, window, self._precision.kv) for window in windows},
            PassAdapters(segments, self._adapters) if any(segment.adapter for segment in segments) else None,
        )
        for layer in range(self.first_layer, self.last_layer):
            hidden = self._layers[layer](hidden, state, self.kv)
            # Rounded after each layer as at the end of a stage, so that the bits do not depend on where the model is cut.
            hidden = hidden.to(self._precision.hidden).to(self._precision.activations)
        for segment in segments:
            self.kv.extend(segment.handle, segment.length)
        if self._norm is not None:
            hidden = self._norm(hidden)
        return output_array(hidden.to("cpu", self._precision.hidden))

    @torch.inference_mode()
    def logits(self, hidden: Array) -> Float32:
        """See `LayerGroup`. Raises ValueError if the group is not the last."""
        if self._head is None:
            raise ValueError(f"layers {self.first_layer}:{self.last_layer} have no head: only the last group has")
        states = input_tensor(hidden, self.hidden_dtype).to(device=self._device, dtype=self._precision.activations)
        return output_array(self._head(states).to("cpu", torch.float32))


def _stacked(parts: Sequence[LowRank | None], orders: Sequence[Array]) -> LowRank:
    """Combines the low-rank matrices of several modules with the same input into one pair. Scales are multiplied into B.

    B has a block for each module. parts: None for a module that the adapter does not change. orders: for each module, the order
    of its outputs.
    """
    given = [part for part in parts if part is not None]
    ranks = [0 if part is None else len(part.a) for part in parts]
    b = np.zeros((sum(map(len, orders)), sum(ranks)), np.float32)
    row = column = 0
    for part, order, rank in zip(parts, orders, ranks, strict=True):
        if part is not None:
            b[row : row + len(order), column : column + rank] = part.b[order] * np.float32(part.scale)
        row, column = row + len(order), column + rank
    return LowRank(np.concatenate([part.a for part in given]), b, 1.0)
