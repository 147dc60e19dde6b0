"""ModelShape: the sizes of a model that a cut needs, from a config, a folder of safetensors or a publication."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import msgspec

from functions.stage.native.limits import SCALE_BYTES, obstacle, padded_head
from knative.spec.errors import SpecError, UnknownShape
from storage.checkpoints.checkpoint import Checkpoint, SourceTensor
from storage.checkpoints.decoder import Decoder, Layer, all_shapes, layer_shapes
from storage.checkpoints.decoder_config import decoder_of
from storage.checkpoints.decoder_families import UnsupportedConfig
from storage.checkpoints.families import EMBEDDINGS_PASSED_ON, part_of
from storage.checkpoints.model_description import describe_model
from storage.checkpoints.recurrent_layers import LayerSizes, described_sizes, layer_sizes
from storage.checkpoints.safetensors_format import read_spans, tensor_bytes
from storage.models.checks import check_runnable, check_shapes
from storage.models.model_repository import ModelManifest, Reader, layer_object, read_file
from storage.models.placement import place_tensors

# Bytes of a number in a layer's matrix; q4 stores four bits and a scale and a minimum per block (storage/models/q4.py). What
# kept stores depends on the checkpoint; this is a guess for files of four bits.
_LAYER_BYTES: Final = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0, "int8": 1.0, "q4": 0.625, "kept": 0.625}
# Bytes of a number in embedding and head.
_OUTER_BYTES: Final = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0, "int8": 1.0625, "q4": 1.0625, "kept": 1.0625}

# Families that the table of storage/checkpoints/decoder_families.py does not describe:
_UNGATED: Final = frozenset({"bloom", "falcon", "gptj", "openai-gpt"})  # feed-forwards have two matrices, and no gate
_TIED: Final = frozenset({"bloom", "falcon"})  # embedding and head are one matrix, although config.json does not say so


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Sizes of a model whose weights are stored in one dtype. Compute is in multiply-adds per token."""

    name: str
    dtype: str
    hidden_size: int
    row_size: int  # numbers of a token between layers
    layer_bytes: tuple[int, ...]
    embedding_bytes: int
    head_bytes: int  # norm and head as the last stage reads them; includes the embedding if the two are tied
    layer_compute: tuple[int, ...]
    head_compute: int
    kv_values_per_layer: int  # numbers per token and layer in the KV cache: 2 × KV heads × head size (padded by native layers)
    layer_sizes: tuple[LayerSizes, ...] = ()  # empty: each layer keeps KV of one size, and none is recurrent
    kv_vectors_per_layer: int = 2  # keys and values per token and layer: 2 × KV heads
    adapter_values: int = 0  # numbers of an adapter of rank 1 in a layer, if all linear modules are adapted
    slow_because: str | None = None  # why a CPU cannot run the layers in C; None: it can
    joined: Mapping[int, str] = field(default_factory=dict)  # layers that no stage can begin with, and the reasons
    has_layer_inputs: bool = False  # every stage has the embedding, from which layers get inputs of their own

    @property
    def num_layers(self) -> int:
        return len(self.layer_bytes)

    @property
    def value_bytes(self) -> int:
        """Bytes of one number in hidden states and, without a `kv_dtype`, in KV. int8 and q4 are dtypes of weights only."""
        return 4 if self.dtype == "float32" else 2

    def kv_bytes(self, first: int, last: int, kv_dtype: str | None = None) -> int:
        """Bytes of a token's keys and values in layers [first, last).

        Raises SpecError if stages cannot keep this model's in `kv_dtype`.
        """
        if kv_dtype is not None and self.slow_because is not None:
            raise SpecError(f"$.kv_dtype: {kv_dtype} takes layers in C, which do not run {self.name}: {self.slow_because}")
        found = [(self.kv_values_per_layer, self.kv_vectors_per_layer)] * (last - first)
        if self.layer_sizes:
            found = [
                (self.kv_values_per_layer, self.kv_vectors_per_layer)
                if layer.kv_heads is None
                else (2 * layer.kv_heads[0] * padded_head(layer.kv_heads[1]), 2 * layer.kv_heads[0])
                for layer in self.layer_sizes[first:last]
                if layer.has_kv
            ]
        if kv_dtype is None:
            return sum(values for values, _ in found) * self.value_bytes
        return sum(values + vectors * SCALE_BYTES for values, vectors in found)

    def outer_bytes(self, first: int, last: int) -> int:
        """Bytes of the weights that a stage of layers [first, last) has besides them."""
        head = self.head_bytes if last == self.num_layers else 0
        needs_embedding = first == 0 or (self.has_layer_inputs and not head)
        return head + (self.embedding_bytes if needs_embedding else 0)


def shape_from_config(config: Mapping[str, Any], name: str, dtype: str) -> ModelShape:
    """Sizes that a Hugging Face config alone implies: for layers in C those of a publication's objects, otherwise an estimate.

    name: the model's, for messages. Raises UnknownShape, or ArchitectureUnsupported for a dtype in which no stage runs it.
    """
    decoder = _Decoder(config, name)
    shape = _estimated(decoder, dtype)
    if shape.slow_because is not None or decoder.model is None or dtype == "kept":
        return shape
    from storage.models.publisher import plan_objects  # msgspec's structs and hashes of publications

    model = decoder.model
    tensors = {name: SourceTensor("F32", each, _unread) for name, each in all_shapes(model).items()}
    in_float32 = check_shapes(decoder.config, all_shapes(model), dtype)
    plans = plan_objects(place_tensors(tensors, describe_model(decoder.config)), dtype, in_float32)
    sizes = {plan.name: plan.bytes for plan in plans}
    return replace(
        shape,
        layer_bytes=tuple(sizes[layer_object(layer)] for layer in range(model.num_layers)),
        embedding_bytes=sizes["embedding"],
        head_bytes=sizes["head"] + (sizes["embedding"] if decoder.reads_embedding_last else 0),
    )


def _estimated(decoder: "_Decoder", dtype: str) -> ModelShape:
    """Biases are left out (under 0.1 percent)."""
    dense, _ = decoder.layer_parameters()
    matrix = decoder.vocabulary * decoder.hidden
    return _shape(decoder, dtype, [dense] * decoder.layers, matrix, matrix + decoder.hidden)


def _unread(first: int, last: int) -> memoryview:
    raise AssertionError("only the shape of this tensor is known")


def shape_from_folder(folder: Path, dtype: str) -> ModelShape:
    """Sizes of a Hugging Face folder, by its config.json; if it has safetensors, exact sizes by their headers.

    Packed tensors of a quantized checkpoint have sizes that a stage would see in dtype kept only: else its config.json counts.
    Raises a StorageError, or what `shape_from_config` raises.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UnknownShape(f"{path}: cannot be read as JSON ({error}); --model takes a Hugging Face folder") from error
    if not isinstance(config, dict):
        raise UnknownShape(f"{path}: holds {type(config).__name__}, not an object")
    files = sorted(folder.glob("*.safetensors"))
    quantized = config.pop("quantization_config", None)  # which a publication does not have
    if quantized and files and dtype == "kept":
        from storage.checkpoints.hugging_face_folder import open_folder  # numpy

        return _shape_of_checkpoint(open_folder(folder), folder.name, dtype)
    if quantized or not files:
        return shape_from_config(config, folder.name, dtype)
    sizes = {key: math.prod(span.shape) for file in files for key, span in read_spans(file).items()}
    decoder = _Decoder(config, folder.name)
    return _shape(decoder, dtype, *_by_object(decoder, sizes))


def shape_from_gguf(path: Path, dtype: str) -> ModelShape:
    """Sizes of the model in a GGUF file, by its header: exact. Raises a StorageError, or UnknownShape."""
    from storage.checkpoints.gguf_checkpoint import open_gguf  # gguf and numpy, which only this format needs

    return _shape_of_checkpoint(open_gguf(path, tokenizer={}), path.stem, dtype)


def _shape_of_checkpoint(checkpoint: Checkpoint, name: str, dtype: str) -> ModelShape:
    from storage.models.conversion import convert_tensor  # numpy
    from storage.models.expert_tensors import split_experts

    tensors = split_experts(str(checkpoint.config.get("model_type")), checkpoint.tensors)
    sizes = {key: math.prod(tensor.shape) for key, tensor in tensors.items()}
    decoder = _Decoder(checkpoint.config, name)
    shape = _shape(decoder, dtype, *_by_object(decoder, sizes))
    if dtype != "kept":
        return shape
    stored = {
        key: sum(tensor_bytes(each.dtype, each.shape) for each in convert_tensor(key, tensor, "kept").values())
        for key, tensor in tensors.items()
    }
    layers, embedding, head = _by_object(decoder, stored)
    return replace(shape, layer_bytes=tuple(layers), embedding_bytes=embedding, head_bytes=head)


def _by_object(decoder: "_Decoder", sizes: Mapping[str, int]) -> tuple[list[int], int, int]:
    """Sizes by tensor, added up: those of each layer, of the embedding, and of what makes logits. Raises UnknownShape."""
    layers, embedding, head = [0] * decoder.layers, 0, 0
    for key, size in sizes.items():
        part = part_of(key)
        if part == "embedding":
            embedding += size
        elif not isinstance(part, int):
            head += size
        elif part < decoder.layers:  # others predict further tokens, and are not published
            layers[part] += size
    if not all(layers):
        raise UnknownShape(f"{decoder.name} has no tensor of layer {layers.index(0)} of {decoder.layers}")
    return layers, embedding, head + (embedding if decoder.reads_embedding_last else 0)


def published_shape(reader: Reader, manifest: ModelManifest) -> ModelShape:
    """Sizes of a publication: exact bytes of its objects, and compute and KV by its config.json.

    Raises a StorageError, or UnknownShape.
    """
    config = msgspec.json.decode(read_file(reader, manifest, "config.json"))
    embedding_bytes, head_bytes = manifest.objects["embedding"].bytes, manifest.objects["head"].bytes
    decoder = _Decoder(config, manifest.name)
    return replace(
        _estimated(decoder, manifest.dtype),
        layer_bytes=tuple(manifest.objects[layer_object(layer)].bytes for layer in range(manifest.num_layers)),
        embedding_bytes=embedding_bytes,
        head_bytes=head_bytes + (embedding_bytes if decoder.reads_embedding_last else 0),
    )


class _Decoder:
    """Sizes of a decoder, read from a Hugging Face config. Model families use different keys for the same size.

    Raises UnknownShape if a size is missing.
    """

    def __init__(self, config: Mapping[str, Any], name: str) -> None:
        nested = config.get("text_config")  # models that also see or hear keep the decoder's sizes here
        self.config: Mapping[str, Any] = nested if isinstance(nested, dict) else config
        self.name = name
        self.sizes = layer_sizes(self.config)
        self.layers = len(self.sizes) or self.size("num_hidden_layers", "n_layer", "n_layers", "num_layers")
        self.hidden = self.size("hidden_size", "n_embd", "d_model")
        has_attention = any(layer.has_kv for layer in self.sizes) or not self.sizes
        self.heads = self.size("num_attention_heads", "n_head", "n_heads") if has_attention else 1
        self.head_size = self.optional("head_dim", "attention_head_dim") or self.hidden // self.heads
        self.vocabulary = self.size("vocab_size")
        if self.config.get("multi_query") and not self.config.get("new_decoder_architecture"):  # Falcon
            self.kv_heads = 1
        else:
            self.kv_heads = self.optional("num_key_value_heads", "num_kv_heads") or self.heads
        self.model: Decoder | None = None  # None: no layers of Lamina's own run it
        self.slow_because: str | None = None
        try:
            self.model = decoder_of(self.config)
        except UnsupportedConfig as error:
            self.slow_because = str(error)
        if self.model is not None:
            own = [layer.feed_forward for layer in self.model.kinds] + [each.each for each in self.model.experts]
            self.gated = all(part.gated for part in own if part is not None)
            self.row_size = self.model.row_size
            self.reads_embedding_last = self.model.tied or self.model.layer_input is not None
        else:
            family = self.config.get("model_type")
            self.gated = family not in _UNGATED
            self.row_size = self.hidden * (2 if family in EMBEDDINGS_PASSED_ON else 1)
            self.reads_embedding_last = bool(self.config.get("tie_word_embeddings", family in _TIED))
        self.latent = self.optional("kv_lora_rank")
        if self.latent is not None:  # KV is one latent of a token, with the part of a key that is rotated
            self.kv_heads, self.head_size = 1, self.latent + self.size("qk_rope_head_dim")

    def optional(self, *keys: str) -> int | None:
        """Value of the first of these keys that has a positive integer; None if none has."""
        values = (self.config.get(key) for key in keys)
        return next((value for value in values if isinstance(value, int) and value > 0), None)

    def size(self, *keys: str) -> int:
        found = self.optional(*keys)
        if found is None:
            raise UnknownShape(f"{self.name}: config.json has no positive integer {' or '.join(keys)}")
        return found

    def _attention_parameters(self) -> int:
        if self.latent is None:
            return self.hidden * self.head_size * (2 * self.heads + 2 * self.kv_heads)
        nope, value_size = self.size("qk_nope_head_dim"), self.size("v_head_dim")
        queries, rank = self.heads * (nope + self.size("qk_rope_head_dim")), self.optional("q_lora_rank")
        of_queries = rank * (self.hidden + queries) if rank else self.hidden * queries
        of_heads = self.latent * self.heads * (nope + value_size) + self.hidden * self.heads * value_size
        return of_queries + self.hidden * self.head_size + of_heads

    def layer_parameters(self) -> tuple[int, int]:
        """Number of parameters of one layer, and number of those that one token is multiplied with: fewer with experts."""
        hidden = self.hidden
        norms = 2 * hidden
        attention = self._attention_parameters() + norms
        matrices = 3 if self.gated else 2
        experts = self.optional("num_local_experts", "num_experts", "n_routed_experts")
        if not experts:
            inner = self.optional("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size") or 4 * hidden
            return (attention + matrices * hidden * inner,) * 2
        inner = self.optional("moe_intermediate_size", "expert_ffn_hidden_size") or self.size("intermediate_size")
        shared = self.optional("n_shared_experts") or 0
        chosen = self.optional("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk") or experts
        if self.config.get("model_type") == "longcat_flash":  # two attentions and two feed-forwards beside the experts
            attention = 2 * (attention + matrices * hidden * self.size("ffn_hidden_size"))
        router, expert = hidden * experts, matrices * hidden * inner
        return attention + router + (experts + shared) * expert, attention + router + (chosen + shared) * expert

    def adapter_values(self) -> int:
        """Inputs and outputs of all linear modules of a layer together; experts are none."""
        queries, keys = self.heads * self.head_size, self.kv_heads * self.head_size
        attention = 4 * self.hidden + 2 * queries + 2 * keys
        if self.optional("num_local_experts", "num_experts", "n_routed_experts"):
            return attention
        inner = self.optional("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size") or 4 * self.hidden
        return attention + (3 if self.gated else 2) * (self.hidden + inner)


def _shape(decoder: _Decoder, dtype: str, layers: list[int], embedding: int, head: int) -> ModelShape:
    """The shape of a decoder whose layers, embedding and head have these numbers of parameters, stored as `dtype`."""
    check_runnable(decoder.config, dtype)
    dense, active = decoder.layer_parameters()
    slow_because = obstacle(dtype, "cpu", {"head_dim": decoder.head_size})
    head_size, sizes = decoder.head_size, decoder.sizes
    compute = tuple(count * active // dense for count in layers)
    if slow_because is None and decoder.model is not None:
        of_kinds = [_compute(decoder.model, layer) for layer in decoder.model.kinds]
        compute = tuple(of_kinds[kind] for kind in decoder.model.order)
        sizes, head_size = described_sizes(decoder.model), padded_head(head_size)
    joined = {}
    if decoder.model is not None:
        found = {layer: decoder.model.obstacle_to_cut(layer) for layer in range(1, decoder.model.num_layers)}
        joined = {layer: reason for layer, reason in found.items() if reason is not None}
    return ModelShape(
        name=decoder.name,
        dtype=dtype,
        hidden_size=decoder.hidden,
        row_size=decoder.row_size,
        layer_bytes=tuple(int(count * _LAYER_BYTES[dtype]) for count in layers),
        embedding_bytes=int(embedding * _OUTER_BYTES[dtype]),
        head_bytes=int(head * _OUTER_BYTES[dtype]),
        layer_compute=compute,
        head_compute=decoder.vocabulary * decoder.hidden,
        kv_values_per_layer=2 * decoder.kv_heads * head_size,
        layer_sizes=sizes,
        kv_vectors_per_layer=2 * decoder.kv_heads,
        adapter_values=decoder.adapter_values(),
        slow_because=slow_because or decoder.slow_because,
        joined=joined,
        has_layer_inputs=decoder.model is not None and decoder.model.layer_input is not None,
    )


def _compute(model: Decoder, layer: Layer) -> int:
    """Numbers that a token is multiplied with in the layer: of its experts, those that are chosen."""
    total = 0
    of_experts = tuple(name.partition("{expert}")[0] for name in model.names.experts if name)
    for name, shape in layer_shapes(model, layer).items():
        count = math.prod(shape)
        if layer.experts is not None and name.startswith(of_experts):
            count = count * layer.experts.router.chosen // layer.experts.router.num_experts
        total += count
    return total
