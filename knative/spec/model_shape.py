"""ModelShape: what a cut needs to know of a model, from a config, a folder of safetensors or a published manifest."""

import json
import math
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import msgspec

from functions.stage.native.limits import obstacle, padded_head
from knative.spec.errors import UnknownShape
from storage.checkpoints.llama_config import LlamaConfig, UnsupportedConfig
from storage.models.model_repository import ModelManifest, Reader, layer_object, read_file
from storage.models.quantizable import check_quantizable

_LAYER_BYTES: Final = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0, "int8": 1.0, "q4": 0.625}
"""Of a number in a layer's matrix; `storage/models/q4.py` has four bits and a block's scale and minimum."""
_OUTER_BYTES: Final = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 2, "q4": 1}
"""Of a number in embedding and head."""

# Families whose feed-forward has two matrices rather than a gated three, and those that share embedding and head
# although their config.json does not say so.
_UNGATED: Final = frozenset({"gpt2", "opt", "bloom", "gpt_neox", "gptj", "phi", "falcon", "starcoder2", "nemotron"})
_TIED: Final = frozenset({"gpt2", "opt", "bloom", "falcon", "gemma", "gemma2", "gemma3_text", "cohere"})
_LAYER_KEY: Final = re.compile(r"(?:^|\.)(?:layers|h|blocks|block)\.(\d+)\.")
_EMBEDDING_KEY: Final = re.compile(r"(?:embed_tokens|wte|wpe|word_embeddings|embed_positions|embed_in|embeddings)\b")


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Sizes of a model as it is stored in one dtype. Compute is in multiply-adds per token."""

    name: str
    dtype: str
    hidden_size: int
    layer_bytes: tuple[int, ...]
    embedding_bytes: int
    head_bytes: int
    """What the last stage reads for norm and head; with tied embeddings that is the embedding once more."""
    layer_compute: tuple[int, ...]
    head_compute: int
    kv_values_per_layer: int
    """Numbers that one token takes in the KV cache of one layer: 2 x key-value heads x head size, which layers in C pad."""
    slow_because: str | None = None
    """Why a CPU runs the layers by slower means than C; None: it does not."""

    @property
    def num_layers(self) -> int:
        return len(self.layer_bytes)

    @property
    def value_bytes(self) -> int:
        """Width of a number in hidden states and KV cache: int8 and q4 are dtypes of weights only."""
        return 4 if self.dtype == "float32" else 2


@dataclass(frozen=True, slots=True)
class _Parameters:
    """Counts of numbers. `active` are those that one token is multiplied with."""

    layers: tuple[int, ...]
    active_layers: tuple[int, ...]
    embedding: int
    head: int


def shape_from_config(config: Mapping[str, Any], name: str, dtype: str) -> ModelShape:
    """From a Hugging Face config alone; biases are left out (under 0.1 percent).

    Raises UnknownShape, or ArchitectureUnsupported for a dtype that no stage would run it in.
    """
    text = _text_config(config)
    layers = _number(text, name, "num_hidden_layers", "n_layer", "n_layers", "num_layers")
    dense, active = _layer_parameters(text, name)
    hidden = _number(text, name, "hidden_size", "n_embd", "d_model")
    matrix = _number(text, name, "vocab_size") * hidden
    return _shape(text, name, dtype, _Parameters((dense,) * layers, (active,) * layers, matrix, matrix + hidden))


def shape_from_folder(folder: Path, dtype: str) -> ModelShape:
    """From `config.json` and, where safetensors lie beside it, their headers, which are exact.

    Raises as `shape_from_config`.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UnknownShape(f"{path}: cannot be read as JSON ({error}); --model takes a Hugging Face folder") from error
    if not isinstance(config, dict):
        raise UnknownShape(f"{path}: holds {type(config).__name__}, not an object")
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        return shape_from_config(config, folder.name, dtype)
    return _shape_from_tensors(config, folder.name, dtype, {k: v for file in files for k, v in _tensor_sizes(file)})


def published_shape(reader: Reader, manifest: ModelManifest) -> ModelShape:
    """From the sizes of a publication's objects, which are exact, and its config.json, which gives compute and KV.

    Raises a StorageError, or UnknownShape.
    """
    config = msgspec.json.decode(read_file(reader, manifest, "config.json"))
    embedding_bytes, head_bytes = manifest.objects["embedding"].bytes, manifest.objects["head"].bytes
    return replace(
        shape_from_config(config, manifest.name, manifest.dtype),
        layer_bytes=tuple(manifest.objects[layer_object(layer)].bytes for layer in range(manifest.num_layers)),
        embedding_bytes=embedding_bytes,
        head_bytes=head_bytes + (embedding_bytes if _tied(_text_config(config)) else 0),
    )


def _shape(text: Mapping[str, Any], name: str, dtype: str, parameters: _Parameters) -> ModelShape:
    check_quantizable(text, dtype)
    outer = _OUTER_BYTES[dtype]
    hidden = _number(text, name, "hidden_size", "n_embd", "d_model")
    return ModelShape(
        name=name,
        dtype=dtype,
        hidden_size=hidden,
        layer_bytes=tuple(int(count * _LAYER_BYTES[dtype]) for count in parameters.layers),
        embedding_bytes=parameters.embedding * outer,
        head_bytes=parameters.head * outer,
        layer_compute=parameters.active_layers,
        head_compute=_number(text, name, "vocab_size") * hidden,
        kv_values_per_layer=2 * _kv_heads(text, name) * _cached_head_size(text, name, dtype),
        slow_because=_slow_because(text, name, dtype),
    )


def _slow_because(text: Mapping[str, Any], name: str, dtype: str) -> str | None:
    """By dtype and sizes alone: whether the family is one that has layers in C, the stage will say."""
    return obstacle(dtype, "cpu", {"head_dim": _head_size(text, name)})


def _shape_from_tensors(config: Mapping[str, Any], name: str, dtype: str, sizes: Mapping[str, int]) -> ModelShape:
    text = _text_config(config)
    count = _number(text, name, "num_hidden_layers", "n_layer", "n_layers", "num_layers")
    layers, embedding, head = [0] * count, 0, 0
    for key, size in sizes.items():
        match = _LAYER_KEY.search(key)
        if match and int(match[1]) < count:
            layers[int(match[1])] += size
        elif _EMBEDDING_KEY.search(key):
            embedding += size
        else:
            head += size
    if not all(layers):
        raise UnknownShape(f"{name}: the safetensors hold no tensor of layer {layers.index(0)} of {count}")
    if _tied(text):
        head += embedding
    dense, active = _layer_parameters(text, name)
    return _shape(text, name, dtype, _Parameters(tuple(layers), tuple(n * active // dense for n in layers), embedding, head))


def _tensor_sizes(path: Path) -> Iterator[tuple[str, int]]:
    """Names and element counts out of a safetensors header: 8 bytes of length, then JSON."""
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(min(length, 100_000_000)))
        for name, tensor in header.items():
            if name != "__metadata__":
                yield name, math.prod(tensor["shape"])
    except (OSError, ValueError, KeyError, TypeError, struct.error) as error:
        raise UnknownShape(f"{path}: no readable safetensors header ({error})") from error


def _layer_parameters(text: Mapping[str, Any], name: str) -> tuple[int, int]:
    """Parameters of one decoder layer, and how many of them one token meets (fewer with experts)."""
    hidden = _number(text, name, "hidden_size", "n_embd", "d_model")
    heads = _number(text, name, "num_attention_heads", "n_head", "n_heads")
    norms = 2 * hidden
    attention = hidden * _head_size(text, name) * (2 * heads + 2 * _kv_heads(text, name)) + norms
    matrices = 2 if text.get("model_type") in _UNGATED else 3
    experts = _first(text, "num_local_experts", "num_experts", "n_routed_experts")
    if not experts:
        inner = _first(text, "intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size") or 4 * hidden
        return (attention + matrices * hidden * inner,) * 2
    inner = _first(text, "moe_intermediate_size") or _number(text, name, "intermediate_size")
    shared = _first(text, "n_shared_experts") or 0
    chosen = _first(text, "num_experts_per_tok", "num_experts_per_token") or experts
    router = hidden * experts
    expert = matrices * hidden * inner
    return attention + router + (experts + shared) * expert, attention + router + (chosen + shared) * expert


def _kv_heads(text: Mapping[str, Any], name: str) -> int:
    if text.get("multi_query") and not text.get("new_decoder_architecture"):  # Falcon
        return 1
    found = _first(text, "num_key_value_heads", "num_kv_heads")
    return found or _number(text, name, "num_attention_heads", "n_head", "n_heads")


def _head_size(text: Mapping[str, Any], name: str) -> int:
    hidden = _number(text, name, "hidden_size", "n_embd", "d_model")
    return _first(text, "head_dim") or hidden // _number(text, name, "num_attention_heads", "n_head", "n_heads")


def _cached_head_size(text: Mapping[str, Any], name: str, dtype: str) -> int:
    """As the memory of the group that runs the layers on a CPU has it."""
    head_size = _head_size(text, name)
    if _slow_because(text, name, dtype) is not None:
        return head_size
    try:
        LlamaConfig.from_dict(text)
    except UnsupportedConfig:
        return head_size
    return padded_head(head_size)


def _tied(text: Mapping[str, Any]) -> bool:
    return bool(text.get("tie_word_embeddings", text.get("model_type") in _TIED))


def _text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Models that also see or hear keep the decoder's numbers one level down."""
    nested = config.get("text_config")
    return nested if isinstance(nested, dict) else config


def _first(text: Mapping[str, Any], *keys: str) -> int | None:
    for key in keys:
        value = text.get(key)
        if isinstance(value, int) and value > 0:
            return value
    return None


def _number(text: Mapping[str, Any], name: str, *keys: str) -> int:
    found = _first(text, *keys)
    if found is None:
        raise UnknownShape(f"{name}: config.json has no positive integer {' or '.join(keys)}")
    return found
