"""The layer group of the Llama-shaped families on a CPU: layers and head in C, embedding and final norm by numpy.

A sequence gets the same bits whatever its chunks, company and threads: every sum here is of one row. Weights are placed layer
by layer while later ones are still on their way, and lie where they were read to, but for queries, keys and values, which C
wants as one matrix.
"""

from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any, Final, Self

import numpy as np

from functions.stage.models.floats import HIDDEN_DTYPES, Array, Float32, narrowed, widened
from functions.stage.models.layer_group import Segment
from functions.stage.models.llama.parts import Parts, check_segments, positions_of
from functions.stage.models.llama.shapes import LAYER_NAME, check_shapes, layer_shapes, outer_shapes
from functions.stage.models.native.kv_pool import NativeKVPool
from functions.stage.models.native.norm import RmsNorm
from functions.stage.models.native.rotations import Rotations
from functions.stage.models.native.weights import Weights, rows_of, take_layer
from functions.stage.native.layers import Layers, Linear, MatrixArrays, Sizes
from functions.stage.native.library import library
from functions.stage.native.records import Dtype
from storage.checkpoints.llama_config import LlamaConfig
from storage.loading.weight_loader import RawTensor

_KV_DTYPES: Final = {"float32": Dtype.F32, "bfloat16": Dtype.BF16, "int8": Dtype.BF16, "q4": Dtype.BF16}
"""dtype of a publication → of keys and values."""


class NativeGroup:
    """Implements `LayerGroup`. Create it, `place` what it needs in any order, `finish`; or `build` it in one go."""

    shares_work: Final = True

    def __init__(self, config: Mapping[str, Any], first_layer: int, last_layer: int, dtype: str, kv_budget_bytes: int) -> None:
        """config: a config.json. dtype: of the publication, one that `native_obstacle` has nothing against.

        Raises UnsupportedConfig, ValueError for a cut or budget that cannot be, and one of `library.UNAVAILABLE`.
        """
        model = self._model = LlamaConfig.from_dict(config)
        self._parts = Parts(model, first_layer, last_layer)
        self._dtype = dtype
        self.first_layer = first_layer
        self.last_layer = last_layer
        self.num_layers = model.num_layers
        self.hidden_size = model.hidden_size
        self.vocab_size = model.vocab_size
        self.max_positions = model.max_positions
        self.hidden_dtype = HIDDEN_DTYPES[dtype]
        kv_dtype = _KV_DTYPES[dtype]
        written_by = f"{dtype} {library().level}"
        self.kv = NativeKVPool(
            last_layer - first_layer, model.num_kv_heads, model.head_dim, kv_dtype, kv_budget_bytes, written_by
        )
        self._rotations = Rotations(model.rope, model.head_dim)
        self.runs_by = f"C, {library().level}"
        self._layers = Layers(library(), _sizes(model, self.kv, kv_dtype))
        self._threads = 1
        self._placed: set[int] = set()
        self._embedding: MatrixArrays | None = None
        self._norm: RmsNorm | None = None
        self._head: Linear | None = None

    @classmethod
    def build(
        cls,
        config: Mapping[str, Any],
        tensors: MutableMapping[str, RawTensor],
        first_layer: int,
        last_layer: int,
        dtype: str,
        kv_budget_bytes: int,
    ) -> Self:
        """A finished group. `tensors` by checkpoint name; what the group uses is removed from it.

        Raises UnsupportedConfig, MissingTensors, ValueError.
        """
        group = cls(config, first_layer, last_layer, dtype, kv_budget_bytes)
        group.place(tensors)
        group.finish()
        return group

    def place(self, tensors: MutableMapping[str, RawTensor]) -> None:
        """Takes this group's weights out of `tensors`, any part of the model; a layer comes whole or not at all.

        Raises MissingTensors for a layer of which only some tensors are there, and WrongShape.
        """
        in_four_bits = {name for name, tensor in tensors.items() if tensor.dtype == "U8"}
        check_shapes(self._model, {name: tensor.shape for name, tensor in tensors.items()}, in_four_bits)
        for layer in sorted({int(found[1]) for found in map(LAYER_NAME.match, tensors) if found}):
            if self.first_layer <= layer < self.last_layer:
                self._place_layer(layer, Weights(tensors, f"model.layers.{layer}.", self._dtype, layer_shapes(self._model)))
        others = Weights(tensors, "", self._dtype, outer_shapes(self._model))
        if "model.embed_tokens.weight" in others and self._parts.has_embedding:
            self._embedding = others.matrix("model.embed_tokens")
        if self._parts.is_last and "model.norm.weight" in others:
            self._norm = RmsNorm(others.vector("model.norm.weight"), self._model.rms_norm_eps)
        if self._parts.is_last and "lm_head.weight" in others:
            self._head = self._layers.linear(others.matrix("lm_head"))

    def finish(self) -> None:
        """Everything has been placed. Raises MissingTensors, naming what has not."""
        if self._parts.is_last and self._head is None and self._model.tie_word_embeddings and self._embedding is not None:
            self._head = self._layers.linear(self._embedding)
        self._parts.check_placed(
            self._placed,
            embedding=self._embedding is not None,
            norm=self._norm is not None,
            head=self._head is not None,
        )
        if not self._parts.is_first:
            self._embedding = None

    def use_threads(self, count: int) -> None:
        self._threads = count

    def forward(self, inputs: Array, segments: Sequence[Segment]) -> Array:
        """As `LayerGroup` says. Raises ValueError, and leaves the cache as it was, for segments that do not fit it."""
        check_segments(self.kv, len(inputs), segments)
        hidden = self._embedded(inputs)
        places = [(self.kv.start(segment.handle), segment.position, segment.length) for segment in segments]
        self._layers.run(hidden, self._rotations(positions_of(segments)), places, self._threads)
        for segment in segments:
            self.kv.extend(segment.handle, segment.length)
        return narrowed(hidden if self._norm is None else self._norm(hidden), self.hidden_dtype)

    def logits(self, hidden: Array) -> Float32:
        """As `LayerGroup` says. Raises ValueError where the group is not the last."""
        if self._head is None:
            raise ValueError(f"layers {self.first_layer}:{self.last_layer} have no head: only the last group has")
        logits: Float32 = self._head(widened(hidden, self.hidden_dtype), self._threads)
        return logits

    def _embedded(self, inputs: Array) -> Float32:
        """Contiguous float32 [n, hidden_size] to be written over."""
        if self._embedding is not None:
            return rows_of(self._embedding, inputs)
        return np.ascontiguousarray(widened(inputs, self.hidden_dtype))

    def _place_layer(self, layer: int, weights: Weights) -> None:
        arrays = take_layer(self._model, weights)
        slot = layer - self.first_layer
        window, rotary = self._model.windows[layer], self._model.rotary[layer]
        self._layers.place(slot, arrays.matrices, arrays.gains, self.kv.arena(slot), window, rotary)
        self._placed.add(layer)


def _sizes(model: LlamaConfig, pool: NativeKVPool, kv_dtype: Dtype) -> Sizes:
    return Sizes(
        num_layers=pool.num_layers,
        hidden_size=model.hidden_size,
        inner_size=model.intermediate_size,
        heads=model.num_heads,
        kv_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        eps=model.rms_norm_eps,
        capacity_tokens=pool.capacity_tokens,
        kv_dtype=kv_dtype,
    )
