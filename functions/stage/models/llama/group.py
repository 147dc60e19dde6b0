"""The lean layer group of the Llama-shaped families: a stage that uses it never imports transformers.

All rows of a pass, prompt chunks and decode steps mixed, go through each matrix together; only attention is computed
sequence by sequence. On CPUs, layers run in C of our own (`native`) wherever it can be compiled, all others by torch's
operators. Weights can be placed layer by layer while later ones are still on their way.
"""

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any, Self

import torch
from torch.nn import functional

from functions.stage.models.layer_group import MissingTensors, Segment
from functions.stage.models.llama.attention import PassAttention
from functions.stage.models.llama.kv_pool import KVPool, in_blocks
from functions.stage.models.llama.layer import LayerWeights, LlamaLayer, Pass, Places
from functions.stage.models.llama.linear import Matrix, linear
from functions.stage.models.llama.native_choice import native_library, native_obstacle
from functions.stage.models.llama.native_layers import NativeLayers
from functions.stage.models.llama.norm import RmsNorm
from functions.stage.models.llama.rope import Rope
from functions.stage.models.llama.shapes import LAYER_NAME, check_shapes
from functions.stage.models.llama.weights import PRECISIONS, Precision, Weights
from storage.checkpoints.llama_config import LlamaConfig, UnsupportedConfig


class LlamaGroup:
    """Implements `LayerGroup`. Create it, `place` what it needs in any order, `finish`; or `build` it in one go."""

    def __init__(
        self,
        config: Mapping[str, Any],
        first_layer: int,
        last_layer: int,
        dtype: str,
        device: torch.device | str,
        kv_budget_bytes: int,
    ) -> None:
        """config: a config.json. Raises UnsupportedConfig, and ValueError for a cut or budget that cannot be."""
        model = LlamaConfig.from_dict(config)
        if not 0 <= first_layer < last_layer <= model.num_layers:
            raise ValueError(f"layers {first_layer}:{last_layer} are no group of a model of {model.num_layers}")
        self._model = model
        self._device = torch.device(device)
        self._precision = _precision(dtype, self._device)
        self.first_layer = first_layer
        self.last_layer = last_layer
        self.num_layers = model.num_layers
        self.hidden_size = model.hidden_size
        self.vocab_size = model.vocab_size
        self.max_positions = model.max_positions
        self.hidden_dtype = self._precision.hidden
        library = native_library(model, dtype, self._device)
        make_pool = KVPool if library is None else in_blocks
        self.kv = make_pool(
            last_layer - first_layer, model.num_kv_heads, model.head_dim, self._precision.kv, self._device, kv_budget_bytes
        )
        self._rope = Rope(model.rope, model.head_dim, self._device)
        self._native = None if library is None else NativeLayers(library, model, first_layer, self.kv)
        """All layers in C, where they can be; `_layers` is empty then."""
        why = native_obstacle(model, dtype, self._device) or "the log says why"
        self.runs_by = f"torch's operators: {why}" if library is None else f"C, {library.level}"
        self._layers: dict[int, LlamaLayer] = {}
        self._placed: set[int] = set()
        self._embedding: torch.Tensor | None = None
        self._norm: RmsNorm | None = None
        self._head: Callable[[torch.Tensor], torch.Tensor] | None = None

    @staticmethod
    def supports(config: Mapping[str, Any]) -> bool:
        """Whether this group runs the model of a config.json exactly; if not, the transformers group does."""
        try:
            LlamaConfig.from_dict(config)
        except UnsupportedConfig:
            return False
        return True

    @classmethod
    def build(
        cls,
        config: Mapping[str, Any],
        tensors: MutableMapping[str, torch.Tensor],
        first_layer: int,
        last_layer: int,
        dtype: str,
        device: torch.device | str,
        kv_budget_bytes: int,
    ) -> Self:
        """A finished group. `tensors` by checkpoint name; what the group uses is removed from it, so that it is freed.

        Raises UnsupportedConfig, MissingTensors, ValueError.
        """
        group = cls(config, first_layer, last_layer, dtype, device, kv_budget_bytes)
        group.place(tensors)
        group.finish()
        return group

    def place(self, tensors: MutableMapping[str, torch.Tensor]) -> None:
        """Takes this group's weights out of `tensors`, any part of the model; a layer comes whole or not at all.

        Raises MissingTensors for a layer of which only some tensors are there, and WrongShape.
        """
        check_shapes(self._model, {name: tuple(tensor.shape) for name, tensor in tensors.items()})
        for layer in sorted({int(found[1]) for found in map(LAYER_NAME.match, tensors) if found}):
            if self.first_layer <= layer < self.last_layer:
                named = Weights(tensors, f"model.layers.{layer}.", self._precision, self._device)
                self._place_layer(layer, LayerWeights.take(self._model, named))
        others = Weights(tensors, "", self._precision, self._device)
        if "model.embed_tokens.weight" in others and (self._is_first or (self._is_last and self._model.tie_word_embeddings)):
            self._embedding = others.matrix("model.embed_tokens").weight
        if self._is_last and "model.norm.weight" in others:
            self._norm = RmsNorm(others.vector("model.norm.weight"), self._model.rms_norm_eps)
        if self._is_last and "lm_head.weight" in others:
            self._head = self._linear(others.matrix("lm_head"))

    def finish(self) -> None:
        """Everything has been placed. Raises MissingTensors, naming what has not."""
        if self._is_last and self._head is None and self._model.tie_word_embeddings and self._embedding is not None:
            self._head = self._linear(Matrix(self._embedding))
        missing = [f"model.layers.{layer}" for layer in range(self.first_layer, self.last_layer) if layer not in self._placed]
        if self._is_first and self._embedding is None:
            missing.append("model.embed_tokens.weight")
        if self._is_last and self._norm is None:
            missing.append("model.norm.weight")
        if self._is_last and self._head is None:
            missing.append("model.embed_tokens.weight" if self._model.tie_word_embeddings else "lm_head.weight")
        if missing:
            raise MissingTensors(f"not placed: {', '.join(missing)}")
        if not self._is_first:
            self._embedding = None

    @torch.inference_mode()
    def forward(self, inputs: torch.Tensor, segments: Sequence[Segment]) -> torch.Tensor:
        """As `LayerGroup` says. Raises ValueError, and leaves the cache as it was, for segments that do not fit it."""
        self._check(inputs, segments)
        hidden = self._embedded(inputs.to(self._device))
        if self._native is None:
            hidden = self._by_torch(hidden, segments)
        else:
            plain = hidden.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
            hidden = self._native(plain, segments, self._rotations(self._positions(segments)))
        for segment in segments:
            self.kv.extend(segment.handle, segment.length)
        if self._norm is not None:
            hidden = self._norm(hidden)
        return hidden.to("cpu", self.hidden_dtype)

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """As `LayerGroup` says. Raises ValueError where the group is not the last."""
        if self._head is None:
            raise ValueError(f"layers {self.first_layer}:{self.last_layer} have no head: only the last group has")
        return self._head(hidden.to(device=self._device, dtype=self._precision.activations)).to("cpu", torch.float32)

    @property
    def shares_work(self) -> bool:
        return self._native is not None

    @property
    def _is_first(self) -> bool:
        return self.first_layer == 0

    @property
    def _is_last(self) -> bool:
        return self.last_layer == self.num_layers

    def _embedded(self, inputs: torch.Tensor) -> torch.Tensor:
        hidden = inputs if self._embedding is None else functional.embedding(inputs, self._embedding)
        return hidden.to(self._precision.activations)

    def _linear(self, matrix: Matrix) -> Callable[[torch.Tensor], torch.Tensor]:
        return linear([matrix], self._precision.activations) if self._native is None else self._native.linear(matrix)

    def _place_layer(self, layer: int, weights: LayerWeights) -> None:
        slot = layer - self.first_layer
        if self._native is not None:
            self._native.place(layer, weights)
        else:
            self._layers[layer] = LlamaLayer(self._model, layer, slot, weights, self._precision)
        self._placed.add(layer)

    def _by_torch(self, hidden: torch.Tensor, segments: Sequence[Segment]) -> torch.Tensor:
        windows = set(self._model.windows[self.first_layer : self.last_layer])
        attention = {window: PassAttention(segments, self.kv, window, self._precision.kv) for window in windows}
        state = Pass(self._places(segments), attention)
        for layer in range(self.first_layer, self.last_layer):
            hidden = self._layers[layer](hidden, state, self.kv)
        return hidden

    def _places(self, segments: Sequence[Segment]) -> Places:
        spans = [(segment.handle, segment.position, segment.position + segment.length) for segment in segments]
        return Places(self.kv.slots(spans), self._rotations(self._positions(segments)))

    def _positions(self, segments: Sequence[Segment]) -> list[int]:
        return [segment.position + token for segment in segments for token in range(segment.length)]

    def _rotations(self, positions: Sequence[int]) -> torch.Tensor:
        return self._rope.rotations(torch.tensor(positions, device=self._device))

    def _check(self, inputs: torch.Tensor, segments: Sequence[Segment]) -> None:
        handles = {segment.handle for segment in segments}
        if not segments or len(handles) < len(segments):
            raise ValueError(f"{len(segments)} segments of {len(handles)} sequences: one for each, and at least one")
        rows = sum(segment.length for segment in segments)
        if inputs.shape[0] != rows:
            raise ValueError(f"{inputs.shape[0]} rows of input for segments of {rows} tokens in all")
        for segment in segments:
            held, reserved = self.kv.length(segment.handle), self.kv.reserved(segment.handle)
            if segment.length < 1 or held != segment.position or held + segment.length > reserved:
                raise ValueError(f"{segment} does not follow the {held} tokens held, of {reserved} reserved")


def _precision(dtype: str, device: torch.device) -> Precision:
    if dtype not in PRECISIONS:
        raise ValueError(f"dtype {dtype!r} is none of {', '.join(PRECISIONS)}")
    if dtype == "int8" and device.type != "cpu":
        raise ValueError(f"int8 runs on CPUs, not on {device}: publish the model in bfloat16 for it")
    return PRECISIONS[dtype]
