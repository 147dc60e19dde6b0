"""The layer group of the Llama-shaped families on a CPU: layers and head in C, embedding and final norm in numpy.

A sequence's results never depend on its chunks, on other rows or on the number of threads, to the bit: no sum mixes rows.
Weights are set layer by layer while later ones are still being read. They stay in the memory that they were read into, except
for the matrices of queries, keys and values, which C needs as one.
"""

from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any, Final

import numpy as np

from functions.stage.models.floats import HIDDEN_DTYPES, Array, Float32, narrowed, widened
from functions.stage.models.kv_cache import GOING_BACK
from functions.stage.models.layer_group import KVDtype, Segment, segments_within
from functions.stage.models.llama.rope import rope_frequencies
from functions.stage.models.llama.structure import check_layers, check_placed, check_shapes, checked_positions, layers_in
from functions.stage.models.native.kv_pool import NativeKVPool
from functions.stage.models.native.weights import NativeWeights, rows_of, take_layer
from functions.stage.models.packed_tensors import packing, shapes_of
from functions.stage.native.layers import MatrixArrays, NativeLayers, NativeLinear
from functions.stage.native.library import library
from functions.stage.native.records import MOST_THREADS, Dtype, GroupRecord
from storage.checkpoints.decoder import layer_shapes, outer_shapes
from storage.checkpoints.decoder_config import decoder_of
from storage.loading.weight_loader import RawTensor

# dtype of a publication → of keys and values
_KV_DTYPES: Final = {"float32": Dtype.F32, "bfloat16": Dtype.BF16, "int8": Dtype.BF16, "q4": Dtype.BF16, "gguf": Dtype.BF16}
_TABLE_ROWS: Final = 1024  # positions that are added to the table of `Rotations` at a time: 1.4 ms for heads of 64


class NativeGroup:
    """Implements `LayerGroup`. After creation, call `place` for the weights in any order, and then `finish` once."""

    shares_work: Final = True
    short_context: Final = None

    def __init__(
        self,
        config: Mapping[str, Any],
        first_layer: int,
        last_layer: int,
        dtype: str,
        kv_budget_bytes: int,
        kv_dtype: KVDtype | None = None,
    ) -> None:
        """config: a config.json. Layers are [first_layer, last_layer).

        dtype: of the publication; `native_obstacle` tells which run. kv_dtype: of keys and values; None: float32 for float32,
        else bf16. Raises UnsupportedConfig, ValueError for impossible layers or too small a budget, and one of the errors in
        `library.UNAVAILABLE` if the C library can be neither loaded nor compiled.
        """
        model = self._model = decoder_of(config)
        check_layers(model, first_layer, last_layer)
        self._is_last = last_layer == model.num_layers
        self._dtype = dtype
        self.first_layer = first_layer
        self.last_layer = last_layer
        self.num_layers = model.num_layers
        self.hidden_size = model.hidden_size
        self.vocab_size = model.vocab_size
        self.max_positions = model.max_positions
        self.hidden_dtype = HIDDEN_DTYPES[dtype]
        self.runs_by = f"C, {library().level}"
        kv_numbers = Dtype.INT8 if kv_dtype == "int8" else _KV_DTYPES[dtype]
        self.kv = NativeKVPool(
            model.windows[first_layer:last_layer],
            model.attention.num_kv_heads,
            model.attention.head_dim,
            kv_numbers,
            kv_budget_bytes,
            written_by=f"{dtype} {library().level}" + (f" kv {kv_dtype}" if kv_dtype else ""),
        )
        self._rotations = Rotations(model.ropes["all"].parameters, model.attention.head_dim)
        self._layers = NativeLayers(
            library(),
            GroupRecord(
                num_layers=last_layer - first_layer,
                hidden_size=model.hidden_size,
                inner_size=model.inner_size,
                heads=model.attention.num_heads,
                kv_heads=model.attention.num_kv_heads,
                head_dim=model.attention.head_dim,
                eps=model.final_norm.eps,
                num_pages=len(self.kv.arena),
                kv_dtype=kv_numbers,
                rounds=self.hidden_dtype == "BF16",
            ),
            self.kv.arena,
        )
        self.native_threads = self._layers.threads
        self._placed: set[int] = set()
        self._embedding: MatrixArrays | None = None
        self._final_gain: Float32 | None = None
        self._head: NativeLinear | None = None

    def place(self, tensors: MutableMapping[str, RawTensor]) -> None:
        """Removes this group's weights from `tensors` and keeps them. Ignores weights of other groups.

        tensors: any part of the model, by checkpoint name, but only whole layers. Raises MissingTensors if a layer is not
        complete or a name is unknown, and WrongShape.
        """
        in_four_bits = {name for name, tensor in tensors.items() if tensor.dtype == "U8" and packing(tensors, name) is None}
        check_shapes(self._model, shapes_of(tensors), in_four_bits)
        names = self._model.names
        for layer in layers_in(self._model, tensors):
            if self.first_layer <= layer < self.last_layer:
                weights = NativeWeights(tensors, f"{names.layers}.{layer}.", self._dtype, layer_shapes(self._model))
                matrices, gains = take_layer(self._model, weights)
                slot = layer - self.first_layer
                attention = self._model.layers[layer].attention
                ring = self.kv.need.ring_blocks if self.kv.windowed[slot] else 0
                self._layers.place(slot, matrices, gains, attention.window, ring, attention.rope is not None)
                self._placed.add(layer)
        others = NativeWeights(tensors, "", self._dtype, outer_shapes(self._model))
        needs_embedding = self.first_layer == 0 or (self._is_last and self._model.tied)
        if needs_embedding and f"{names.embedding}.weight" in others:
            self._embedding = others.matrix(names.embedding)
        if self._is_last and f"{names.final_norm}.weight" in others:
            self._final_gain = others.vector(f"{names.final_norm}.weight")
        if self._is_last and f"{names.head}.weight" in others:
            self._head = self._layers.linear(others.matrix(names.head))

    def finish(self) -> None:
        """Makes the group ready to run. Raises MissingTensors, naming the weights that `place` never got."""
        if self._is_last and self._head is None and self._model.tied and self._embedding is not None:
            self._head = self._layers.linear(self._embedding)
        check_placed(
            self._model,
            self.first_layer,
            self.last_layer,
            self._placed,
            embedding=self._embedding is not None,
            norm=self._final_gain is not None,
            head=self._head is not None,
        )
        if self.first_layer > 0:  # it was needed for the head alone
            self._embedding = None

    def use_threads(self, count: int) -> None:
        self.native_threads.count = min(count, MOST_THREADS)

    def forward(self, inputs: Array, segments: Sequence[Segment]) -> Array:
        """See `LayerGroup`. Raises ValueError for segments that do not fit the KV cache, which then stays unchanged."""
        rotations = self._rotations(checked_positions(self.kv, len(inputs), segments))
        if self._embedding is not None:
            hidden = rows_of(self._embedding, inputs)
        else:
            hidden = np.ascontiguousarray(widened(inputs, self.hidden_dtype))
        at_once = GOING_BACK if self.kv.need.windowed_units else len(inputs)  # more would overwrite rings
        for first in range(0, len(inputs), at_once):
            rows = slice(first, min(first + at_once, len(inputs)))
            parts = segments_within(segments, rows.start, rows.stop)
            places = [(self.kv.table(part.handle), part.position, part.length) for part in parts]
            self._layers.run(hidden[rows], rotations[rows], places, self.native_threads.count)
            for part in parts:
                self.kv.extend(part.handle, part.length)
        if self._final_gain is not None:
            hidden = rms_norm(hidden, self._final_gain, self._model.final_norm.eps)
        return narrowed(hidden, self.hidden_dtype)

    def logits(self, hidden: Array) -> Float32:
        """See `LayerGroup`. Raises ValueError if the group is not the last."""
        if self._head is None:
            raise ValueError(f"layers {self.first_layer}:{self.last_layer} have no head: only the last group has")
        logits: Float32 = self._head(widened(hidden, self.hidden_dtype), self.native_threads.count)
        return logits


class Rotations:
    """Cosines and sines of rotary position embeddings, kept in a table that grows with the largest position so far.

    Angles are float32, as in transformers. Cosines and sines are rounded from float64, so that they do not depend on a CPU's
    vector instructions.
    """

    def __init__(self, parameters: Mapping[str, Any], head_dim: int) -> None:
        """parameters: of the position embeddings, Rotation.parameters."""
        self._frequencies, self._scaling = rope_frequencies(parameters, head_dim)
        self._table: Float32 = np.empty((0, head_dim // 2, 2), np.float32)

    def __call__(self, positions: Sequence[int]) -> Float32:
        """Cosine and sine of each pair of a head at `positions` [n]: float32 [n, head_dim / 2, 2]."""
        if (end := max(positions) + 1) > len(self._table):
            parts = [self._table]
            for first in range(len(self._table), end, _TABLE_ROWS):
                angles = np.arange(first, first + _TABLE_ROWS, dtype=np.float32)[:, None] * self._frequencies
                wide = angles.astype(np.float64)
                turns = np.stack((np.cos(wide), np.sin(wide)), axis=-1).astype(np.float32)
                parts.append(turns * np.float32(self._scaling))
            self._table = np.concatenate(parts)
        rows: Float32 = self._table[np.array(positions)]
        return rows


def rms_norm(x: Float32, gain: Float32, eps: float) -> Float32:
    """RMSNorm: x * gain / sqrt(mean(x²) + eps) for each row of contiguous x [n, size], independently of other rows.

    One row of 576 takes 12 µs, 256 rows 160 (Xeon with AMX, one thread).
    """
    with np.errstate(over="ignore", invalid="ignore"):  # the engine finds rows that are not finite
        lengths = np.square(x).sum(axis=-1, keepdims=True)
        lengths /= x.shape[-1]
        lengths += np.float32(eps)
        y: Float32 = x / np.sqrt(lengths, out=lengths)
        y *= gain
    return y
