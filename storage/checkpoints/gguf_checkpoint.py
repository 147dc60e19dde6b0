"""GGUF files of the Llama-shaped architectures, seen as the Hugging Face checkpoint they were made from.

Tensors are dequantized to float32 as they are read, a few rows at a time. The metadata become config.json and, in
`gguf_tokenizer`, the tokenizer's files. This is the only importer of gguf.
"""

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Final

import gguf
import msgspec
import numpy as np
from numpy.typing import NDArray

from storage.checkpoints.checkpoint import Checkpoint, SourceTensor
from storage.checkpoints.gguf_tokenizer import tokenizer_files
from storage.errors import ArchitectureUnsupported, CheckpointInvalid

_ARCHITECTURES: Final[Mapping[str, str]] = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
_CONFIG_KEYS: Final[Mapping[str, str]] = {
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "context_length": "max_position_embeddings",
    "rope.freq_base": "rope_theta",
}
_MODULES: Final[Mapping[str, str]] = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_TENSOR_NAME: Final = re.compile(r"(?:blk\.(?P<layer>\d+)\.)?(?P<module>\w+)\.(?P<kind>weight|bias)")


def open_gguf(path: Path) -> Checkpoint:
    """Raises CheckpointInvalid for a file that is no whole GGUF, ArchitectureUnsupported for what is not Llama-shaped."""
    try:
        reader = gguf.GGUFReader(path)
    except (ValueError, IndexError, KeyError, OverflowError) as error:
        raise CheckpointInvalid(f"{path} is no GGUF file, or only its beginning ({error}); fetch it again") from error
    fields = {name: field.contents() for name, field in reader.fields.items()}
    architecture = str(fields.get("general.architecture"))
    if architecture not in _ARCHITECTURES:
        raise ArchitectureUnsupported(
            f"{path} holds a {architecture!r}; known are {', '.join(_ARCHITECTURES)}; publish others from safetensors"
        )
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    config = _config(path, architecture, fields, tensors)
    _check_types(path, tensors)
    files = tokenizer_files(path, fields) | {"config.json": msgspec.json.format(msgspec.json.encode(config), indent=2)}
    return Checkpoint(
        config,
        files,
        {_hugging_face_name(path, name): _source(tensor, architecture, config) for name, tensor in tensors.items()},
    )


def _config(path: Path, architecture: str, fields: Mapping[str, Any], tensors: Mapping[str, Any]) -> dict[str, Any]:
    if fields.get(f"{architecture}.rope.scaling.type", "none") != "none" or "rope_freqs.weight" in tensors:
        raise ArchitectureUnsupported(
            f"{path} scales its rotary positions, which is not read from GGUF; publish it from safetensors"
        )
    try:
        config = {name: fields[f"{architecture}.{key}"] for key, name in _CONFIG_KEYS.items()}
        vocab_size = int(tensors["token_embd.weight"].shape[1])
    except KeyError as error:
        raise CheckpointInvalid(f"{path} lacks {error.args[0]}; make the GGUF file again") from error
    heads = config["num_attention_heads"]
    return config | {
        "architectures": [_ARCHITECTURES[architecture]],
        "model_type": architecture,
        "head_dim": fields.get(f"{architecture}.attention.key_length", config["hidden_size"] // heads),
        "vocab_size": vocab_size,
        "hidden_act": "silu",
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "tie_word_embeddings": "output.weight" not in tensors,
        "bos_token_id": fields.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": fields.get("tokenizer.ggml.eos_token_id"),
    }


def _hugging_face_name(path: Path, name: str) -> str:
    found = _TENSOR_NAME.fullmatch(name)
    if not found or found["module"] not in _MODULES:
        raise ArchitectureUnsupported(
            f"{path} has a tensor {name!r} that no Llama-shaped model has; publish it from safetensors"
        )
    prefix = f"model.layers.{found['layer']}." if found["layer"] else ""
    return f"{prefix}{_MODULES[found['module']]}.{found['kind']}"


def _check_types(path: Path, tensors: Mapping[str, Any]) -> None:
    """Tries one row of every quantization in the file, before anything is written."""
    for kind, tensor in {tensor.tensor_type: tensor for tensor in tensors.values()}.items():
        try:
            gguf.quants.dequantize(tensor.data[:1], kind)
        except NotImplementedError as error:
            raise CheckpointInvalid(
                f"{path} is quantized as {kind.name}, which cannot be read; use another quantization"
            ) from error


def _source(tensor: Any, architecture: str, config: Mapping[str, Any]) -> SourceTensor:
    shape = tuple(int(size) for size in reversed(tensor.shape))
    heads = None
    if architecture == "llama" and ".attn_q." in tensor.name:
        heads = config["num_attention_heads"]
    if architecture == "llama" and ".attn_k." in tensor.name:
        heads = config["num_key_value_heads"]
    return SourceTensor("F32", shape, partial(_read_rows, tensor, _row_order(shape[0], heads)))


def _row_order(rows: int, heads: int | None) -> NDArray[np.intp]:
    """Where in the file each row lies. llama.cpp interleaves the two halves of every rotary head, Hugging Face does not."""
    order = np.arange(rows)
    return order if heads is None else order.reshape(heads, -1, 2).swapaxes(1, 2).reshape(rows)


def _read_rows(tensor: Any, order: NDArray[np.intp], first: int, last: int) -> memoryview:
    rows = gguf.quants.dequantize(tensor.data[order[first:last]], tensor.tensor_type)
    contiguous: Any = np.ascontiguousarray(rows, dtype=np.float32)
    return memoryview(contiguous).cast("B")
