"""The layer group of the Llama-shaped families on a CPU: layers and head in C, embedding and final norm in numpy.

No sum mixes rows. So the results of a sequence are the same to the bit, however it is cut into chunks, and whatever the other
rows and the number of threads. Weights are set layer by layer while later layers are still being read. They stay in the memory
that they were read into, except for the matrices of queries, keys and values, which C needs as one matrix.
"""

import logging
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from dataclasses import replace
from typing import Any, Final

import numpy as np

from functions.stage.models.adapters import LowRank, low_ranks
from functions.stage.models.floats import HIDDEN_DTYPES, Array, Float32, narrowed, widened
from functions.stage.models.kv_cache import GOING_BACK
from functions.stage.models.layer_group import ColdExperts, KVDtype, PreparedAdapter, Segment, segments_within
from functions.stage.models.llama.structure import check_layers, check_placed, check_shapes, checked_positions, layers_in
from functions.stage.models.native.adapters import pack_layer
from functions.stage.models.native.expert_weights import take_experts
from functions.stage.models.native.kv_pool import LayerKV, NativeKVPool
from functions.stage.models.native.layer_inputs import LayerInputs
from functions.stage.models.native.layer_weights import latent_sizes, row_heads, take_layer, take_norm
from functions.stage.models.native.recurrent_weights import StatePlaces, inputs_of, take_recurrent
from functions.stage.models.native.rotations import Rotations
from functions.stage.models.native.streams import StreamMatrices
from functions.stage.models.native.weights import NativeWeights, rows_of
from functions.stage.models.packed_tensors import packing, shapes_of
from functions.stage.native.layers import (
    AdapterArrays,
    ExpertsArrays,
    MatrixArrays,
    NativeLayers,
    NativeLinear,
    NormArrays,
    SegmentArrays,
)
from functions.stage.native.library import library
from functions.stage.native.records import MOST_THREADS, Dtype, GroupRecord
from storage.checkpoints.decoder import full_name, layer_shapes, outer_shapes
from storage.checkpoints.decoder_config import decoder_of
from storage.loading.memory import address_of, drop_pages
from storage.loading.weight_loader import RawTensor

_log: Final = logging.getLogger(__name__)

# dtype of a published model → dtype of keys and values
_KV_DTYPES: Final = {"float32": Dtype.F32, "bfloat16": Dtype.BF16, "int8": Dtype.BF16, "q4": Dtype.BF16, "kept": Dtype.BF16}


class NativeGroup:
    """Implements `LayerGroup`. After creation, call `place` for the weights in any order, and then `finish` once."""

    shares_work: Final = True

    def __init__(
        self,
        config: Mapping[str, Any],
        first_layer: int,
        last_layer: int,
        dtype: str,
        kv_budget_bytes: int,
        kv_dtype: KVDtype | None = None,
        weights_budget_bytes: int | None = None,
    ) -> None:
        """Creates layers [first_layer, last_layer) without weights.

        config: a config.json. dtype: of the published model; `native_obstacle` tells whether it can run. kv_dtype: of keys and
        values; if None, float32 for a float32 model, otherwise bf16. weights_budget_bytes: most memory for weights. If it is
        exceeded, the least recently used experts that can be read again from the weight cache are dropped. The experts that a
        layer uses in one pass are in memory together, even if they exceed the budget. If None, all weights stay in memory.

        Raises UnsupportedConfig, ValueError for impossible layers or too small a KV budget, and one of the errors in
        `library.UNAVAILABLE` if the C library can be neither loaded nor compiled.
        """
        model = self._model = decoder_of(config)
        check_layers(model, first_layer, last_layer)
        self._is_last = last_layer == model.num_layers
        self._dtype = dtype
        self.first_layer = first_layer
        self.last_layer = last_layer
        self.num_layers = model.num_layers
        self.hidden_size = model.row_size
        self.vocab_size = model.vocab_size
        self.max_positions = model.max_positions
        self.hidden_dtype = HIDDEN_DTYPES[dtype]
        self.runs_by = f"C, {library().level}"
        own = model.layers[first_layer:last_layer]
        attending = [layer.attention for layer in own if layer.attention is not None]
        recurrent = [layer.recurrent for layer in own if layer.recurrent is not None]
        self._places = StatePlaces.of(own, model.hidden_size)
        kv_owners = [
            number
            for number, layer in enumerate(own, first_layer)
            if layer.attention is not None and layer.attention.kv_layer is None
        ]
        kv_numbers = Dtype.INT8 if kv_dtype == "int8" else _KV_DTYPES[dtype]
        self.kv = NativeKVPool(
            [
                LayerKV(each.window if model.causal else None, each.num_kv_heads, each.head_dim)
                for each in attending
                if each.kv_layer is None
            ],
            kv_numbers,
            kv_budget_bytes,
            written_by=f"{dtype} {library().level}" + (f" kv {kv_dtype}" if kv_dtype else ""),
            state_values=self._places.state_values,
            kept_values=self._places.kept_values,
        )
        self.kv.repeat = lambda segment: self._layers.run(None, None, [segment], self.native_threads.count)
        self._kv_places = dict(zip(kv_owners, self.kv.places, strict=True))
        self._rotations = Rotations(model)
        self.short_context = self._rotations.short_context
        self._layers = NativeLayers(
            library(),
            GroupRecord(
                num_layers=last_layer - first_layer,
                hidden_size=model.hidden_size,
                inner_size=max(
                    model.inner_size,
                    0 if model.layer_input is None else model.layer_input.size,
                    0 if model.streams is None else model.streams.rank,
                ),
                expert_size=max((experts.each.inner_size for experts in model.experts), default=0),
                most_experts=max((experts.router.num_experts for experts in model.experts), default=0),
                most_chosen=max((experts.router.chosen for experts in model.experts), default=0),
                heads=model.attention.num_heads,
                head_dim=model.attention.head_dim,
                row_numbers=max(row_heads(each) * each.head_dim for each in attending or [model.attention]),
                **latent_sizes(model.attention),
                eps=model.final_norm.eps,
                num_pages=len(self.kv.arena),
                page_bytes=self.kv.arena.shape[1],
                kv_dtype=kv_numbers,
                rotations=len(self._rotations.tables),
                kv_rows=len(self.kv.windowed),
                input_size=0 if model.layer_input is None else model.layer_input.size,
                streams=0 if model.streams is None else model.streams.count,
                recurrent_inputs=max((inputs_of(each, model.hidden_size) for each in recurrent), default=0),
                recurrent_outputs=max((each.inner_size or model.hidden_size for each in recurrent), default=0),
                recurrent_heads=max((each.num_heads for each in recurrent), default=0),
                state_values=self._places.state_values,
                kept_values=self._places.kept_values,
                rounds=self.hidden_dtype == "BF16",
                bidirectional=not model.causal,
            ),
            self.kv.arena,
        )
        self.native_threads = self._layers.threads
        self._inputs = None if model.layer_input is None else LayerInputs(model, first_layer, last_layer)
        self.takes_token_ids = self._inputs is not None and first_layer > 0
        self._streams: StreamMatrices | None = None
        if model.streams is not None:
            self._streams = StreamMatrices(model, is_first=first_layer == 0, is_last=self._is_last)
        self._placed: set[int] = set()
        self._weights_budget_bytes = weights_budget_bytes
        self._kept_bytes = 0  # of weights that stay in memory
        self._embedding: MatrixArrays | None = None
        self._positions: Float32 | None = None
        self._final_norm: NormArrays | None = None
        self._head: NativeLinear | None = None
        self._tied_head_biases: Float32 | None = None

    def place(self, tensors: MutableMapping[str, RawTensor]) -> None:
        """Removes this group's weights from `tensors` and keeps them. Ignores weights of other groups.

        tensors: by checkpoint name, any part of the model that has each layer whole or not at all. Raises MissingTensors if a
        layer is incomplete or a name is unknown, and WrongShape.
        """
        for name in list(tensors):
            tensors[full_name(self._model, name)] = tensors.pop(name)
        in_four_bits = {name for name, tensor in tensors.items() if tensor.dtype == "U8" and packing(tensors, name) is None}
        check_shapes(self._model, shapes_of(tensors), in_four_bits)
        names = self._model.names
        for layer in layers_in(self._model, tensors):
            if self.first_layer <= layer < self.last_layer:
                own, slot = self._model.layers[layer], layer - self.first_layer
                shapes = layer_shapes(self._model, own)
                prefix = f"{names.layers}.{layer}."
                own_tensors = {name: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
                self._kept_bytes += sum(len(tensor.data) for tensor in own_tensors.values())
                weights = NativeWeights(tensors, prefix, self._dtype, shapes, transposed=names.transposed)
                arrays = take_layer(self._model, own, weights)
                if own.attention is not None:
                    kv_layer = layer if own.attention.kv_layer is None else own.attention.kv_layer
                    kv_row, kv_pages = self._kv_places[kv_layer]
                    arrays.numbers.update(
                        self._rotations.numbers(own.attention.rope),
                        kv_row=kv_row,
                        kv_pages=kv_pages,
                        window=own.attention.window or 0,
                        ring=self.kv.need.ring_blocks if own.attention.window is not None and self._model.causal else 0,
                    )
                if own.recurrent is not None:
                    arrays.recurrent = take_recurrent(
                        self._model, own.recurrent, self._places, slot, weights, own.residual_scale
                    )
                self._layers.place(slot, arrays)
                if own.experts is not None:
                    experts = take_experts(self._model, own.experts, weights)
                    if self._weights_budget_bytes is not None:
                        experts = self._in_files(layer, experts, own_tensors.values())
                    self._layers.place_experts(slot, experts)
                self._placed.add(layer)
        others = NativeWeights(tensors, "", self._dtype, outer_shapes(self._model))
        self._kept_bytes += sum(len(tensors[name].data) for name in outer_shapes(self._model) if name in tensors)
        needs_embedding = self.first_layer == 0 or self._inputs is not None or (self._is_last and self._model.tied)
        if needs_embedding and f"{names.embedding}.weight" in others:
            self._embedding = others.matrix(names.embedding)
        if self._inputs is not None:
            self._inputs.place(others, self.native_threads)
        if self._streams is not None:
            self._streams.place(others, self.native_threads)
        if self.first_layer == 0 and f"{names.positions}.weight" in others:
            self._positions = others.vector(f"{names.positions}.weight")
        if self._is_last and f"{names.final_norm}.weight" in others:
            self._final_norm = take_norm(names.final_norm, self._model.final_norm, others)
        if self._is_last and f"{names.head}.weight" in others:
            self._head = NativeLinear(library(), self.native_threads, others.matrix(names.head, self._model.head_bias))
        elif self._is_last and f"{names.head}.bias" in others:
            self._tied_head_biases = others.vector(f"{names.head}.bias")

    def finish(self) -> None:
        """Makes the group ready to run. Raises MissingTensors, which names the weights that `place` never got."""
        has_biases = self._tied_head_biases is not None or not self._model.head_bias
        if self._is_last and self._head is None and self._model.tied and self._embedding is not None and has_biases:
            tied = replace(self._embedding, biases=self._tied_head_biases)
            self._head = NativeLinear(library(), self.native_threads, tied)
        check_placed(
            self._model,
            self.first_layer,
            self.last_layer,
            self._placed,
            embedding=self._embedding is not None,
            positions=self._positions is not None,
            norm=self._final_norm is not None,
            head=self._head is not None or not self._model.has_head,
            inputs=self._inputs is not None and self._inputs.is_placed and self._embedding is not None,
            others=() if self._streams is None else self._streams.missing,
        )
        if self.first_layer > 0 and self._inputs is None:  # it was needed for the head alone
            self._embedding = None
        if self._weights_budget_bytes is not None:
            self._layers.budget.most_bytes = max(0, self._weights_budget_bytes - self._kept_bytes)

    def _in_files(self, layer: int, experts: ExpertsArrays, tensors: Iterable[RawTensor]) -> ExpertsArrays:
        """Marks the experts of a layer as ones that may be dropped from memory, and drops them, if possible.

        That is possible only if C reads their weights from files as they are. Otherwise returns the experts unchanged.
        """
        in_files = {address_of(tensor.data) for tensor in tensors if tensor.from_file}
        weights = [matrix.weights for matrices in experts.experts for matrix in matrices.values()]
        padded = any(matrix.is_padded for matrices in experts.experts for matrix in matrices.values())
        if padded or any(each.ctypes.data not in in_files for each in weights):
            _log.warning("the experts of layer %d stay in memory: no file of the weight cache has them as C reads them", layer)
            return experts
        for each in weights:
            drop_pages(each.ctypes.data, each.nbytes)
        self._kept_bytes -= sum(each.nbytes for each in weights)
        return replace(experts, used_at=np.zeros_like(experts.used))

    def cold_experts(self) -> ColdExperts:
        """Returns counters of the experts that may be dropped from memory, for a group with a weights budget."""
        budget = self._layers.budget
        return ColdExperts(found=budget.found, read=budget.read, resident_bytes=budget.bytes)

    def use_threads(self, count: int) -> None:
        self.native_threads.count = min(count, MOST_THREADS)

    def prepare_adapter(self, tensors: Mapping[str, RawTensor]) -> PreparedAdapter:
        narrow = self._dtype != "float32"
        of_layers: list[dict[str, LowRank]] = [{} for _ in range(self.first_layer, self.last_layer)]
        for module, low in low_ranks(tensors, "F32").items():
            layer, _, name = module.removeprefix(f"{self._model.names.layers}.").partition(".")
            of_layers[int(layer) - self.first_layer][name] = low
        layers = self._model.layers[self.first_layer : self.last_layer]
        packed = [pack_layer(self._model, layer, own, narrow) for layer, own in zip(layers, of_layers, strict=True)]
        adapter = AdapterArrays.of(packed)
        return PreparedAdapter(adapter, sum(each.nbytes for each in adapter.kept))

    def place_adapter(self, number: int, prepared: PreparedAdapter | None) -> None:
        self._layers.place_adapter(number, None if prepared is None else prepared.share)

    def forward(self, inputs: Array, segments: Sequence[Segment]) -> Array:
        """See `LayerGroup`. Raises ValueError if segments do not fit the KV cache, and then leaves the cache unchanged."""
        positions = checked_positions(self.kv, len(inputs), segments)
        rotations = self._rotations(positions, segments)
        if self.first_layer == 0 and self._embedding is not None:
            hidden = self._embedded(self._embedding, inputs, positions)
        else:
            hidden = np.ascontiguousarray(widened(inputs, self.hidden_dtype))
        of_layers = None if self._inputs is None else self._layer_inputs(self._inputs, inputs, hidden, segments)
        if self._streams is not None and self.first_layer == 0:
            hidden = self._streams.split(hidden, self.native_threads.count)
        states = {part.handle: self.kv.begin_pass(part.handle, part.length, part.draft_tokens) for part in segments}
        at_once = GOING_BACK if self.kv.need.windowed_units else len(inputs)  # more would overwrite rings
        for first in range(0, len(inputs), at_once):
            rows = slice(first, min(first + at_once, len(inputs)))
            parts = segments_within(segments, rows.start, rows.stop)
            arrays = [
                SegmentArrays(self.kv.tables[part.handle], part.position, part.length, states[part.handle], part.adapter)
                for part in parts
            ]
            given = None if of_layers is None else np.ascontiguousarray(of_layers[:, rows])
            turns = np.ascontiguousarray(rotations[:, rows])
            self._layers.run(hidden[rows], turns, arrays, self.native_threads.count, given)
            for part in parts:
                self.kv.extend(part.handle, part.length)
        for part in segments:
            self.kv.end_pass(part.handle, part.draft_tokens)
        if self._streams is not None and self._is_last:
            hidden = self._streams.join(hidden, self.native_threads.count)
        if self._final_norm is not None:
            hidden = self._final_norm(hidden, self._model.final_norm.eps)
        return narrowed(hidden, self.hidden_dtype)

    def logits(self, hidden: Array) -> Float32:
        """See `LayerGroup`. Raises ValueError if the group is not the last."""
        if self._head is None:
            raise ValueError(f"layers {self.first_layer}:{self.last_layer} have no head: only the last group has")
        logits: Float32 = self._head(widened(hidden, self.hidden_dtype), self.native_threads.count)
        if self._model.logit_scale != 1:
            logits *= np.float32(self._model.logit_scale)
        if (cap := self._model.logit_soft_cap) is not None:
            logits = np.tanh(logits / np.float32(cap)) * np.float32(cap)
        return logits

    def _layer_inputs(self, layer_inputs: LayerInputs, inputs: Array, hidden: Float32, segments: Sequence[Segment]) -> Float32:
        """Returns the inputs of layers besides hidden states. Raises ValueError if segments of a later stage lack token ids."""
        if self.first_layer == 0:
            return layer_inputs(inputs, hidden, self.native_threads.count)
        given = [segment.token_ids for segment in segments if segment.token_ids is not None]
        if len(given) < len(segments) or self._embedding is None:
            raise ValueError("segments without token ids: layers compute with them besides hidden states")
        token_ids = np.concatenate(given)
        return layer_inputs(token_ids, self._embedded(self._embedding, token_ids, ()), self.native_threads.count)

    def _embedded(self, embedding: MatrixArrays, token_ids: Array, positions: Sequence[int]) -> Float32:
        hidden = rows_of(embedding, token_ids)
        if self._model.embedding_scale != 1:
            hidden *= np.float32(self._model.embedding_scale)
        if self._positions is not None:
            hidden += self._positions[np.array(positions) + (self._model.position_offset or 0)]
        return hidden
