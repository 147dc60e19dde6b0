"""Makes config.json from a GGUF file's metadata. A key that changes a model's results is translated, or the file is refused."""

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from statistics import NormalDist
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from storage.checkpoints.gguf_architectures import (
    ATTENTION,
    DEEPSEEK3,
    FALCON_GROUPED,
    GRANITE_SHARED,
    MISTRAL,
    MIXTRAL,
    OLMO3,
    SIGMOID,
    SOFTMAX,
    Architecture,
)
from storage.checkpoints.gguf_format import GgufHeader, GgufTensor
from storage.checkpoints.gguf_recurrent import BAMBA, FALCON_MAMBA, GRANITE_DENSE, RECURRENT
from storage.checkpoints.gguf_tokenizer import BOS, EOS
from storage.errors import ArchitectureUnsupported, CheckpointInvalid

ARCHITECTURES: Final[Mapping[str, Architecture]] = {**ATTENTION, **RECURRENT}
"""The rows of the table, by the architecture's name in the file."""
_RMS_NORM: Final = "attention.layer_norm_rms_epsilon"
_LAYER_NORM: Final = "attention.layer_norm_epsilon"
_FURTHER: Final = "nextn_predict_layers"
_YARN_LOG: Final = "rope.scaling.yarn_log_multiplier"
_WINDOW: Final = "attention.sliding_window"
_WINDOW_PATTERN: Final = "attention.sliding_window_pattern"
# Keys that change nothing if they have one of these values.
_NEUTRAL: Final[Mapping[str, tuple[Any, ...]]] = {
    "rope.scaling.type": ("none",),
    "rope.scaling.factor": (0, 1),
    "rope.scale_linear": (0, 1),
    "rope.scaling.attn_factor": (0, 1),
    "rope.scaling.finetuned": (False, True),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "attention.causal": (True,),
    "attention.scale": (0,),
    "logit_scale": (0, 1),
    "use_parallel_residual": (False,),
    "tensor_data_layout": ("reference",),
    "pooling_type": (0,),
}
# Keys of a scaled rotation → parameters of transformers; the rest must be neutral.
_ROPE_SCALING: Final[Mapping[str, Mapping[str, str]]] = {
    "linear": {"rope.scaling.factor": "factor"},
    "yarn": {
        "rope.scaling.factor": "factor",
        "rope.scaling.original_context_length": "original_max_position_embeddings",
        "rope.scaling.yarn_attn_factor": "attention_factor",
        "rope.scaling.yarn_beta_fast": "beta_fast",
        "rope.scaling.yarn_beta_slow": "beta_slow",
    },
}
_ROPE_NEEDED: Final = {"rope.scaling.factor", "rope.scaling.original_context_length"}
_RECURRENT_LAYERS: Final = "attention.recurrent_layers"
# Keys that files of some models lack → keys with the same value.
_SAME_AS: Final = {
    "attention.head_count_kv": "attention.head_count",
    "feed_forward_length": "expert_feed_forward_length",
}
_LARGEST_GEMMA_LAYERS: Final = {"gemma2": 46, "gemma3": 62}  # these scale attention by the width of a head's share
_LARGEST_SIZE: Final = 2**31
_NO_ROTATION: Final = 1e29  # frequencies divided by this or more do not rotate


def _slides(fields: Mapping[str, Any], _: Collection[str]) -> bool:
    window, context = fields.get(f"llama.{_WINDOW}"), fields.get("llama.context_length")
    return isinstance(window, int) and isinstance(context, int) and 0 < window < context


def _is_sigmoid(fields: Mapping[str, Any], tensors: Collection[str]) -> bool:
    unsaid = SIGMOID if any(each.endswith("exp_probs_b.bias") for each in tensors) else SOFTMAX
    return bool(fields.get("deepseek2.expert_gating_func", unsaid) == SIGMOID)


VARIANTS: Final[Mapping[str, tuple[tuple[Architecture, Callable[[Mapping[str, Any], Collection[str]], bool]], ...]]] = {
    "llama": ((MIXTRAL, lambda _, tensors: "blk.0.ffn_gate_exps.weight" in tensors), (MISTRAL, _slides)),
    "mistral3": ((MISTRAL, lambda fields, _: "mistral3.attention.temperature_scale" not in fields),),
    "olmo2": ((OLMO3, lambda fields, _: bool(fields.get(f"olmo2.{_WINDOW_PATTERN}"))),),
    "granitemoe": ((GRANITE_SHARED, lambda _, tensors: "blk.0.ffn_up_shexp.weight" in tensors),),
    "deepseek2": ((DEEPSEEK3, _is_sigmoid),),
    "falcon": ((FALCON_GROUPED, lambda _, tensors: "blk.0.attn_norm_2.weight" in tensors),),
    "granitehybrid": (
        (BAMBA, lambda fields, _: fields.get("granitehybrid.rope.scaling.finetuned") is not False),
        (GRANITE_DENSE, lambda _, tensors: "blk.0.ffn_gate_exps.weight" not in tensors),
    ),
    "mamba": ((FALCON_MAMBA, lambda fields, _: fields.get("mamba.ssm.dt_b_c_rms") is True),),
}
"""Further rows for an architecture, by its name in the file.

Each has a function that takes a file's metadata and names of tensors, and says whether the row describes the file.
"""


def architecture_of(path: Path, header: GgufHeader) -> Architecture:
    """The row of the table that describes a GGUF file. Raises ArchitectureUnsupported if there is none."""
    name = str(header.fields.get("general.architecture"))
    if name not in ARCHITECTURES:
        raise ArchitectureUnsupported(
            f"{path} holds a {name[:64]!r}; known are {', '.join(ARCHITECTURES)}; publish others from safetensors"
        )
    tensors = {tensor.name for tensor in header.tensors}
    return next((row for row, is_it in VARIANTS.get(name, ()) if is_it(header.fields, tensors)), ARCHITECTURES[name])


def model_config(path: Path, header: GgufHeader) -> dict[str, Any]:
    """Makes the parsed config.json of a GGUF file.

    Every key of the architecture must be known. llama.cpp adds a key if a model deviates from its architecture, and ignoring it
    would publish another model. Raises ArchitectureUnsupported for a model that is not in the table, CheckpointInvalid if keys
    are missing.
    """
    architecture = architecture_of(path, header)
    name = str(header.fields["general.architecture"])
    metadata = _Metadata(path, header, f"{name}.")
    keys, tensors = metadata.keys, metadata.tensors
    # Layers that predict further tokens come last; they are not published.
    metadata.used.add(_FURTHER)
    further = keys.get(_FURTHER, 0)
    if type(further) is not int or not 0 <= further < metadata.size("block_count"):
        raise metadata.wrong(_FURTHER, "is no number of layers")
    layers = metadata.size("block_count") - further
    metadata.defaults |= {key: keys.get(other) for key, other in _SAME_AS.items()}
    kinds = _layer_types(metadata, architecture, layers)
    config: dict[str, Any] = {config_key: metadata.size(key) for key, config_key in architecture.sizes.items()}
    config["num_hidden_layers"] = layers
    config |= _listed_types(architecture, kinds)
    is_rms = architecture.norm == "rms_norm_eps" or _LAYER_NORM not in keys
    config[architecture.norm] = metadata.number(_RMS_NORM if is_rms else _LAYER_NORM)
    if "token_embd.weight" not in tensors:
        raise CheckpointInvalid(f"{path} lacks token_embd.weight; make the GGUF file again")
    config["vocab_size"] = tensors["token_embd.weight"].shape[0]
    has_attention = "num_attention_heads" in config
    if has_attention:
        metadata.defaults["attention.key_length"] = config["hidden_size"] // config["num_attention_heads"]
        config["head_dim"] = metadata.size("attention.key_length")
    if name == "deepseek2":
        config |= _latent_attention(metadata, config)
    config |= {config_key: keys[key] for key, config_key in architecture.keys.items() if key in keys}
    config |= {config_key: metadata.quotient(*both) for config_key, both in architecture.quotients.items()}
    in_layers = {tensor.split(".", 2)[2] for tensor in tensors if tensor.startswith("blk.") and tensor.count(".") > 1}
    config |= {config_key: tensor in in_layers for config_key, tensor in architecture.flags.items()}
    if has_attention and "rope.freq_base" not in architecture.ignored:
        config |= _rope(metadata, architecture, config)
    config |= architecture.config
    if architecture.sliding:
        config |= _windows(metadata, config["num_hidden_layers"])
    if name == "falcon":
        # Models with one KV head are of the first kind; the others have one or two norms before attention and feed-forward.
        config["new_decoder_architecture"] = config["num_key_value_heads"] > 1
        config["num_kv_heads"] = config["num_key_value_heads"]
        config["num_ln_in_parallel_attn"] = 2 if architecture is FALCON_GROUPED else 1
    if name == "gemma3n":
        config |= _gemma_3n(metadata, layers)
    if name == "gemma4":
        config |= _gemma_4(metadata, config)
    if name in _LARGEST_GEMMA_LAYERS:
        is_largest = config["num_hidden_layers"] == _LARGEST_GEMMA_LAYERS[name]
        share = config["hidden_size"] // config["num_attention_heads"]
        config["query_pre_attn_scalar"] = share if is_largest else config["head_dim"]
    _check_others(metadata, architecture, config, kinds)
    if name == "falcon":
        del config["head_dim"]  # which its class computes
    config |= {own: config[config_key] for config_key, own in architecture.own_names.items()}
    return config | {
        "architectures": [architecture.class_name],
        "model_type": architecture.model_type,
        "tie_word_embeddings": "output.weight" not in tensors,
        "bos_token_id": header.fields.get(BOS),
        "eos_token_id": header.fields.get(EOS),
        # Not the default of the class, which may lie beyond the vocabulary.
        "pad_token_id": header.fields.get("tokenizer.ggml.padding_token_id"),
    }


class _Metadata:
    """The metadata of a file's architecture and the file's tensors. Keys lack the architecture's name in front."""

    def __init__(self, path: Path, header: GgufHeader, prefix: str) -> None:
        self.path = path
        self.prefix = prefix
        self.keys = {key.removeprefix(prefix): value for key, value in header.fields.items() if key.startswith(prefix)}
        self.tensors = {tensor.name: tensor for tensor in header.tensors}
        self.defaults: dict[str, Any] = {"rope.freq_base": 10_000.0}
        self.used: set[str] = set()  # keys that were asked for

    def size(self, key: str) -> int:
        """Reads a size that all layers have in common; layers without it have 0. Raises CheckpointInvalid."""
        value = self.value(key)
        if isinstance(value, list) and len(different := set(value) - {0}) == 1:
            value = different.pop()
        if type(value) is not int or not 0 < value < _LARGEST_SIZE:
            raise self.wrong(key, "is no size")
        return value

    def sizes(self, key: str, layers: int) -> list[int]:
        """Reads a size for each layer. Raises CheckpointInvalid."""
        value = self.value(key)
        found = value if isinstance(value, list) else [value] * layers
        if len(found) != layers or not all(type(each) is int and 0 < each < _LARGEST_SIZE for each in found):
            raise self.wrong(key, f"is no size of each of {layers} layers")
        return found

    def quotient(self, dividend: str, divisor: str) -> int:
        """Divides one size by another. Raises CheckpointInvalid if the quotient is no whole number."""
        found, rest = divmod(self.size(dividend), self.size(divisor))
        if rest:
            raise self.wrong(dividend, f"is no multiple of {self.prefix}{divisor}")
        return found

    def number(self, key: str) -> float:
        value = self.value(key)
        if not isinstance(value, float) or not 0 < value < float("inf"):
            raise self.wrong(key, "is no number above 0")
        return value

    def value(self, key: str) -> Any:
        self.used.add(key)
        if key not in self.keys and key not in self.defaults:
            raise CheckpointInvalid(f"{self.path} lacks {self.prefix}{key}; make the GGUF file again")
        return self.keys.get(key, self.defaults.get(key))

    def wrong(self, key: str, what: str) -> CheckpointInvalid:
        seen = str(self.keys.get(key))[:64]
        return CheckpointInvalid(f"{self.path} has {self.prefix}{key} = {seen}, which {what}; make the GGUF file again")


def _layer_types(metadata: _Metadata, architecture: Architecture, layers: int) -> list[str]:
    """The type of each layer, recognized by a tensor that only layers of this type have.

    Empty if the architecture has one type of layer. Raises CheckpointInvalid for a layer of unknown type.
    """
    if not architecture.layer_types:
        return []
    found = []
    for layer in range(layers):
        kinds = [kind for tensor, kind in architecture.layer_types.items() if f"blk.{layer}.{tensor}" in metadata.tensors]
        if len(kinds) != 1:
            raise CheckpointInvalid(
                f"{metadata.path} has no layer {layer} of one of the types {', '.join(architecture.layer_types.values())}; "
                "make the GGUF file again"
            )
        found += kinds
    return found


def _listed_types(architecture: Architecture, kinds: list[str]) -> dict[str, Any]:
    """The entry of config.json that lists the types of layers."""
    if architecture.layer_types_key == "attn_layer_indices":
        return {"attn_layer_indices": [layer for layer, kind in enumerate(kinds) if kind == "full_attention"]}
    return {architecture.layer_types_key: kinds} if kinds else {}


def _latent_attention(metadata: _Metadata, config: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of config.json for latent attention (MLA).

    Newer files have the widths of heads in keys that end with `_mla`.
    """
    rotated, rank = metadata.size("rope.dimension_count"), metadata.size("attention.kv_lora_rank")
    metadata.used |= {"attention.q_lora_rank", "attention.key_length", "attention.value_length"}
    key, value = (
        metadata.size(f"attention.{part}_length{'_mla' if f'attention.{part}_length_mla' in metadata.keys else ''}")
        for part in ("key", "value")
    )
    if key <= rotated:
        raise metadata.wrong("rope.dimension_count", f"is not less than the {key} of a head")
    groups = metadata.keys.get("expert_group_count", 1)
    return {
        "num_key_value_heads": config["num_attention_heads"],
        "head_dim": rotated,
        "qk_rope_head_dim": rotated,
        "qk_nope_head_dim": key - rotated,
        "v_head_dim": value,
        "kv_lora_rank": rank,
        "q_lora_rank": metadata.keys.get("attention.q_lora_rank"),
        "topk_method": "group_limited_greedy" if groups != 1 else "greedy",
    }


def _gemma_3n(metadata: _Metadata, layers: int) -> dict[str, Any]:
    """The entries of config.json that only Gemma 3n has.

    They are the sizes and the sparsity of feed-forwards, and sizes that are read from shapes of tensors.
    """
    cutoffs = metadata.value("activation_sparsity_scale")
    if (
        not isinstance(cutoffs, list)
        or len(cutoffs) != layers
        or not all(isinstance(each, float) and each < float("inf") for each in cutoffs)
    ):
        raise metadata.wrong("activation_sparsity_scale", f"is no list of {layers} numbers")
    found: dict[str, Any] = {
        "intermediate_size": metadata.sizes("feed_forward_length", layers),
        "activation_sparsity_pattern": [round(NormalDist().cdf(each), 6) for each in cutoffs],  # -infinity: 0
    }
    for config_key, tensor in (
        ("laurel_rank", "blk.0.laurel_l.weight"),
        ("vocab_size_per_layer_input", "per_layer_token_embd.weight"),
    ):
        if tensor not in metadata.tensors:
            raise CheckpointInvalid(f"{metadata.path} lacks {tensor}; make the GGUF file again")
        found[config_key] = metadata.tensors[tensor].shape[0]
    return found


def _gemma_4(metadata: _Metadata, config: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of config.json that only Gemma 4 has.

    Layers without a window have heads of another size, and may use keys as values. Layers that share KV may be wider.
    """
    layers = config["num_hidden_layers"]
    inner, kv_heads = (metadata.sizes(key, layers) for key in ("feed_forward_length", "attention.head_count_kv"))
    metadata.value(_WINDOW_PATTERN)
    full = [layer for layer, kind in enumerate(config["layer_types"]) if kind == "full_attention"]
    windowed = [heads for layer, heads in enumerate(kv_heads) if layer not in full]
    return {
        "intermediate_size": min(inner),
        "use_double_wide_mlp": min(inner) < max(inner),
        "num_key_value_heads": (windowed or kv_heads)[0],
        "num_global_key_value_heads": kv_heads[full[0]] if full else None,
        "head_dim": metadata.size("attention.key_length_swa"),
        "global_head_dim": config["head_dim"],
        "attention_k_eq_v": bool(full) and f"blk.{full[0]}.attn_v.weight" not in metadata.tensors,
        "vocab_size_per_layer_input": config["vocab_size"],
    }


def _rope(metadata: _Metadata, architecture: Architecture, config: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of config.json that describe the rotation of queries and keys."""
    theta, head_dim = metadata.number("rope.freq_base"), config["head_dim"]
    kind = str(metadata.keys.get("rope.scaling.type", "none"))
    parameters: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    if kind in _ROPE_SCALING:
        parameters["rope_type"] = kind
        metadata.used.add("rope.scaling.type")
        for key, name in _ROPE_SCALING[kind].items():
            if key in _ROPE_NEEDED or key in metadata.keys:
                parameters[name] = metadata.value(key)
    if kind == "yarn":
        parameters |= _yarn_scales(metadata, architecture)
    if architecture.partial_rotation and "rope.dimension_count" in metadata.keys:
        rotated = metadata.size("rope.dimension_count")
        if rotated > head_dim:
            raise metadata.wrong("rope.dimension_count", f"is more than the {head_dim} of a head")
        parameters["partial_rotary_factor"] = rotated / head_dim
    factors = {kind: metadata.tensors.get(f"rope_factors_{kind}.weight") for kind in ("short", "long")}
    if architecture.model_type == "gemma4_text":
        parameters |= {"rope_type": "proportional", "partial_rotary_factor": _rotated_share(metadata)}
    elif "rope_freqs.weight" in metadata.tensors:
        parameters |= _scaled_by_frequency(metadata.tensors["rope_freqs.weight"], theta, head_dim)
    elif factors["short"] and factors["long"]:
        metadata.used |= {"rope.scaling.type", "rope.scaling.attn_factor"}
        lists = {f"{kind}_factor": _floats(tensor).tolist() for kind, tensor in factors.items() if tensor}
        original = metadata.size("rope.scaling.original_context_length")
        parameters |= {"rope_type": "longrope", "original_max_position_embeddings": original, **lists}
    if architecture.model_type in ("gemma3_text", "gemma3n_text", "gemma4_text"):
        metadata.defaults["rope.freq_base_swa"] = 10_000.0
        local = {"rope_type": "default", "rope_theta": metadata.number("rope.freq_base_swa")}
        return {"rope_parameters": {"full_attention": parameters, "sliding_attention": local}}
    if architecture.model_type == "olmo3" and metadata.keys.get("rope.freq_base_swa") == theta:
        metadata.used.add("rope.freq_base_swa")
    return {"rope_parameters": parameters}


def _rotated_share(metadata: _Metadata) -> float:
    """The share of a head that Gemma 4 rotates. `rope_freqs.weight` divides the frequencies of the rest by 1e30."""
    if "rope_freqs.weight" not in metadata.tensors:
        raise CheckpointInvalid(f"{metadata.path} lacks rope_freqs.weight; make the GGUF file again")
    factors = _floats(metadata.tensors["rope_freqs.weight"])
    rotated = int((factors == 1).sum())
    if not (factors[:rotated] == 1).all() or not (factors[rotated:] >= _NO_ROTATION).all():
        raise ArchitectureUnsupported(
            f"{metadata.path} has rope_freqs.weight with factors other than 1 and 1e30; publish it from safetensors"
        )
    return rotated / len(factors)


def _yarn_scales(metadata: _Metadata, architecture: Architecture) -> dict[str, Any]:
    """The parameters of YaRN that only some families have."""
    if architecture.model_type == "gpt_oss":
        return {"truncate": False}
    if architecture.model_type not in ("deepseek_v2", "deepseek_v3", "ministral3"):
        return {}
    # The converter multiplies DeepSeek's by 0.1. Files have one number, since all models have both equal.
    scale = 1.0 if architecture.model_type == "ministral3" else 10.0
    metadata.defaults[_YARN_LOG] = 0.0
    mscale = round(metadata.value(_YARN_LOG) * scale, 6)
    scales = {"mscale": mscale, "mscale_all_dim": mscale}
    if architecture.model_type == "ministral3":
        scales["llama_4_scaling_beta"] = metadata.number("attention.temperature_scale")
    return scales


def _scaled_by_frequency(tensor: GgufTensor, theta: float, head_dim: int) -> dict[str, Any]:
    """The parameters of a rotation whose frequencies are divided by the factors in `rope_freqs.weight`.

    The file lacks the parameters of Llama 3's rule. If the rule gives these factors, its parameters are found and returned. If
    not, the factors themselves are returned, as parameters of longrope.
    """
    factors = _floats(tensor).astype(np.float64)
    wavelengths = 2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    low, high, factor = 1.0, 4.0, float(factors.max())
    if factors.shape == wavelengths.shape and factor > 1:
        smooth = (1 / factors - 1 / factor) / (1 - 1 / factor)
        between = (smooth > 1e-4) & (smooth < 1 - 1e-4)
        for original in np.unique(np.rint(wavelengths[between] * (smooth[between] * (high - low) + low))):
            expected = np.clip((original / wavelengths - low) / (high - low), 0, 1)
            if np.allclose(1 / ((1 - expected) / factor + expected), factors, rtol=1e-4):
                names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
                return {"rope_type": "llama3", **dict(zip(names, (factor, low, high, int(original)), strict=True))}
    same = factors.tolist()
    return {"rope_type": "longrope", "short_factor": same, "long_factor": same, "factor": 1.0, "attention_factor": 1.0}


def _floats(tensor: GgufTensor) -> NDArray[np.float32]:
    """Reads a list of float32 numbers above 0. Raises CheckpointInvalid if the tensor is anything else."""
    if tensor.kind != 0 or len(tensor.shape) != 1:
        raise CheckpointInvalid(f"{tensor.path} has {tensor.name!r} in type {tensor.kind}, which is no list of float32")
    with tensor.path.open("rb") as file:
        values = np.fromfile(file, "<f4", tensor.shape[0], offset=tensor.start)
    if len(values) != tensor.shape[0] or not (np.isfinite(values) & (values > 0)).all():
        raise CheckpointInvalid(f"{tensor.path} has {tensor.name!r} with values that are no factors; fetch it again")
    return values


def _windows(metadata: _Metadata, num_layers: int) -> dict[str, Any]:
    """The entries of config.json for the sliding window.

    They list the types of layers if the file says which layers have the window.
    """
    metadata.used |= {_WINDOW, _WINDOW_PATTERN}
    window = metadata.keys.get(_WINDOW) or None
    if window is not None and type(window) is not int:
        raise metadata.wrong(_WINDOW, "is no size")
    pattern = metadata.keys.get(_WINDOW_PATTERN)
    if isinstance(pattern, int) and pattern > 0:
        pattern = [(layer + 1) % pattern != 0 for layer in range(num_layers)]
    if pattern is None:
        return {"sliding_window": window}
    if not isinstance(pattern, list) or len(pattern) != num_layers:
        raise metadata.wrong(_WINDOW_PATTERN, f"is no list of {num_layers} layers")
    return {
        "sliding_window": window,
        "layer_types": ["sliding_attention" if slides else "full_attention" for slides in pattern],
    }


def _check_others(metadata: _Metadata, architecture: Architecture, config: Mapping[str, Any], kinds: list[str]) -> None:
    """Raises ArchitectureUnsupported if a key that was not translated is unknown or may change results.

    kinds: the type of each layer.
    """
    heads, windowed_heads = (config.get("global_head_dim", config.get("head_dim")),), (config.get("head_dim"),)
    recurrent = [kind == "linear_attention" for kind in kinds]
    # A window as long as the context hides nothing.
    window = metadata.keys.get(_WINDOW)
    wide = (window,) if isinstance(window, int) and (window == 0 or window >= config["max_position_embeddings"]) else (0,)
    allowed = {
        **_NEUTRAL,
        "attention.key_length": heads,
        "attention.value_length": heads,
        "rope.dimension_count": heads,
        "attention.value_length_swa": windowed_heads,
        "rope.dimension_count_swa": windowed_heads,
        "vocab_size": (config["vocab_size"],),
        _WINDOW: wide,
        _RECURRENT_LAYERS: (recurrent, [*recurrent, False]),
    }
    if architecture.norm != "rms_norm_eps":
        allowed[_RMS_NORM] = (config[architecture.norm],)
    allowed |= architecture.implied
    keys, prefix = metadata.keys, metadata.prefix
    for key in sorted(keys.keys() - metadata.used - architecture.keys.keys() - {*architecture.ignored}):
        if key not in allowed:
            raise ArchitectureUnsupported(
                f"{metadata.path} has {prefix}{key} = {str(keys[key])[:64]}, whose meaning is not known here; "
                "publish it from safetensors"
            )
        if keys[key] not in allowed[key]:
            wanted = " or ".join(map(str, allowed[key]))
            raise ArchitectureUnsupported(
                f"{metadata.path} has {prefix}{key} = {str(keys[key])[:64]}, which is read from GGUF only as {wanted}; "
                "publish it from safetensors"
            )
