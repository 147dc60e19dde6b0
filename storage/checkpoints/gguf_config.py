"""Makes config.json from a GGUF file's metadata. A key that changes a model's results is translated, or the file is refused."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from storage.checkpoints.gguf_format import GgufHeader
from storage.checkpoints.gguf_tokenizer import BOS, EOS
from storage.errors import ArchitectureUnsupported, CheckpointInvalid

_ARCHITECTURES: Final[Mapping[str, str]] = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
_SIZES: Final[Mapping[str, str]] = {
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "context_length": "max_position_embeddings",
}
_NUMBERS: Final[Mapping[str, str]] = {
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
}
# Keys that change nothing if they have one of these values.
_NEUTRAL: Final[Mapping[str, tuple[Any, ...]]] = {
    "rope.scaling.type": ("none",),
    "rope.scaling.factor": (0, 1),
    "rope.scale_linear": (0, 1),
    "rope.scaling.attn_factor": (0, 1),
    "rope.scaling.finetuned": (False,),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "attention.causal": (True,),
    "attention.scale": (0,),
    "logit_scale": (0, 1),
    "use_parallel_residual": (False,),
    "tensor_data_layout": ("reference",),
    "pooling_type": (0,),
}
_LARGEST_SIZE: Final = 2**31


def model_config(path: Path, header: GgufHeader) -> dict[str, Any]:
    """The config.json of a GGUF file, parsed.

    Every key of the architecture must be known: llama.cpp adds keys for deviations, and ignoring one would publish another
    model. Raises ArchitectureUnsupported for a model that is not plainly Llama-shaped, CheckpointInvalid if keys are missing.
    """
    architecture = str(header.fields.get("general.architecture"))
    if architecture not in _ARCHITECTURES:
        raise ArchitectureUnsupported(
            f"{path} holds a {architecture[:64]!r}; known are {', '.join(_ARCHITECTURES)}; publish others from safetensors"
        )
    prefix = f"{architecture}."
    keys = {name.removeprefix(prefix): value for name, value in header.fields.items() if name.startswith(prefix)}
    tensors = {tensor.name: tensor for tensor in header.tensors}
    if keys.get("rope.scaling.type", "none") != "none" or "rope_freqs.weight" in tensors:
        raise ArchitectureUnsupported(
            f"{path} scales its rotary positions, which is not read from GGUF; publish it from safetensors"
        )
    config: dict[str, Any] = {name: _size(path, prefix, key, keys) for key, name in _SIZES.items()}
    config |= {name: _number(path, prefix, key, keys) for key, name in _NUMBERS.items()}
    if "token_embd.weight" not in tensors:
        raise CheckpointInvalid(f"{path} lacks token_embd.weight; make the GGUF file again")
    config["vocab_size"] = tensors["token_embd.weight"].shape[0]
    plain = {"attention.key_length": config["hidden_size"] // config["num_attention_heads"]}
    config["head_dim"] = _size(path, prefix, "attention.key_length", plain | keys)
    _check_others(path, prefix, keys, config)
    return config | {
        "architectures": [_ARCHITECTURES[architecture]],
        "model_type": architecture,
        "hidden_act": "silu",
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "tie_word_embeddings": "output.weight" not in tensors,
        "bos_token_id": header.fields.get(BOS),
        "eos_token_id": header.fields.get(EOS),
    }


def _check_others(path: Path, prefix: str, keys: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    heads = (config["head_dim"],)
    # A window as long as the context hides nothing.
    window = keys.get("attention.sliding_window")
    wide = (window,) if isinstance(window, int) and (window == 0 or window >= config["max_position_embeddings"]) else (0,)
    allowed = {
        **_NEUTRAL,
        "attention.key_length": heads,
        "attention.value_length": heads,
        "rope.dimension_count": heads,
        "vocab_size": (config["vocab_size"],),
        "attention.sliding_window": wide,
    }
    for key in sorted(keys.keys() - _SIZES.keys() - _NUMBERS.keys()):
        if key not in allowed:
            raise ArchitectureUnsupported(
                f"{path} has {prefix}{key} = {str(keys[key])[:64]}, whose meaning is not known here; "
                "publish it from safetensors"
            )
        if keys[key] not in allowed[key]:
            wanted = " or ".join(map(str, allowed[key]))
            raise ArchitectureUnsupported(
                f"{path} has {prefix}{key} = {str(keys[key])[:64]}, which is read from GGUF only as {wanted}; "
                "publish it from safetensors"
            )


def _size(path: Path, prefix: str, key: str, keys: Mapping[str, Any]) -> int:
    value = _required(path, prefix, key, keys)
    if type(value) is not int or not 0 < value < _LARGEST_SIZE:
        raise CheckpointInvalid(f"{path} has {prefix}{key} = {str(value)[:64]}, which is no size; make the GGUF file again")
    return value


def _number(path: Path, prefix: str, key: str, keys: Mapping[str, Any]) -> float:
    value = _required(path, prefix, key, keys)
    if not isinstance(value, float) or not 0 < value < float("inf"):
        raise CheckpointInvalid(f"{path} has {prefix}{key} = {str(value)[:64]}, no number above 0; make the GGUF file again")
    return value


def _required(path: Path, prefix: str, key: str, keys: Mapping[str, Any]) -> Any:
    if key not in keys:
        raise CheckpointInvalid(f"{path} lacks {prefix}{key}; make the GGUF file again")
    return keys[key]
