"""What a Llama-shaped model looks like, read from its config.json in either spelling (transformers 4 and 5).

A family is a row of a table here: where its biases are, and what holds where a config says nothing. Whatever deviates in
other ways (another activation, a partial rotation, a quantized checkpoint) is declined, and the transformers group serves it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from functions.stage.models.llama.rope import rope_parameters, rope_supported


class UnsupportedConfig(Exception):
    """The lean group does not run this config. Use the transformers group."""


@dataclass(frozen=True, slots=True)
class _Family:
    """Biases are a constant of the family or named by a key of the config; `defaults` stand in for missing keys."""

    qkv_bias: bool | str = False
    out_bias: bool | str = False
    mlp_bias: bool | str = False
    qk_norm: bool = False
    defaults: Mapping[str, Any] = field(default_factory=dict)


_FAMILIES: Final[dict[str, _Family]] = {
    "llama": _Family("attention_bias", "attention_bias", "mlp_bias", defaults={"max_position_embeddings": 2048}),
    "ministral": _Family(defaults={"max_position_embeddings": 131_072, "sliding_window": 4096}),
    "mistral": _Family(defaults={"max_position_embeddings": 131_072, "sliding_window": 4096, "num_key_value_heads": 8}),
    "qwen2": _Family(qkv_bias=True, defaults={"max_position_embeddings": 32_768, "sliding_window": 4096}),
    "qwen3": _Family(
        "attention_bias",
        "attention_bias",
        qk_norm=True,
        defaults={"max_position_embeddings": 32_768, "sliding_window": 4096, "head_dim": 128},
    ),
    "seed_oss": _Family(
        "attention_bias",
        "attention_out_bias",
        "mlp_bias",
        defaults={"max_position_embeddings": 524_288, "attention_bias": True, "head_dim": 128},
    ),
    "smollm3": _Family(
        "attention_bias",
        "attention_bias",
        "mlp_bias",
        defaults={"max_position_embeddings": 32_768, "rope_theta": 2_000_000.0, "tie_word_embeddings": True},
    ),
}


@dataclass(frozen=True, slots=True)
class LlamaConfig:
    """A whole model. `windows` and `rotary` have one entry per layer."""

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    qk_norm: bool
    windows: tuple[int | None, ...]
    """How many tokens, its own included, a token attends to; None: all."""
    rotary: tuple[bool, ...]
    """Whether the layer rotates queries and keys (SmolLM3 leaves it out in some)."""
    rope: Mapping[str, Any]

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "LlamaConfig":
        """Raises UnsupportedConfig, which says what is in the way."""
        family = _FAMILIES.get(str(config.get("model_type")))
        if family is None:
            raise UnsupportedConfig(f"model_type {config.get('model_type')!r} is not one of {', '.join(_FAMILIES)}")
        values = {**family.defaults, **config}
        if values.get("max_position_embeddings") is None or values.get("head_dim") is None:
            values = {**values, **_derived(values, family)}
        return _checked(cls._from_values(values, family), values)

    @classmethod
    def _from_values(cls, values: Mapping[str, Any], family: _Family) -> "LlamaConfig":
        try:
            return cls(
                num_layers=values["num_hidden_layers"],
                hidden_size=values["hidden_size"],
                intermediate_size=values["intermediate_size"],
                num_heads=values["num_attention_heads"],
                num_kv_heads=values.get("num_key_value_heads") or values["num_attention_heads"],
                head_dim=values["head_dim"],
                vocab_size=values["vocab_size"],
                max_positions=values["max_position_embeddings"],
                rms_norm_eps=values.get("rms_norm_eps", 1e-6),
                tie_word_embeddings=values.get("tie_word_embeddings", False),
                qkv_bias=_bias(family.qkv_bias, values),
                out_bias=_bias(family.out_bias, values),
                mlp_bias=_bias(family.mlp_bias, values),
                qk_norm=family.qk_norm,
                windows=_windows(values),
                rotary=_rotary(values),
                rope=rope_parameters(values, 10_000.0),
            )
        except KeyError as missing:
            raise UnsupportedConfig(f"the config lacks {missing}") from None


def _derived(values: Mapping[str, Any], family: _Family) -> dict[str, Any]:
    head_dim = values.get("head_dim") or values["hidden_size"] // values["num_attention_heads"]
    context = values.get("max_position_embeddings") or family.defaults["max_position_embeddings"]
    return {"head_dim": head_dim, "max_position_embeddings": context}


def _bias(of_family: bool | str, values: Mapping[str, Any]) -> bool:
    return bool(values.get(of_family, False)) if isinstance(of_family, str) else of_family


def _windows(values: Mapping[str, Any]) -> tuple[int | None, ...]:
    """Mistral slides in all layers; the others where `layer_types` (in old Qwen configs `max_window_layers`) says so."""
    model_type: str = values["model_type"]
    num_layers: int = values["num_hidden_layers"]
    window: int | None = values.get("sliding_window")
    if model_type not in {"mistral", "ministral"} and not values.get("use_sliding_window"):
        window = None
    if window is None:
        return (None,) * num_layers
    layer_types = values.get("layer_types")
    if model_type == "mistral" or (model_type == "ministral" and layer_types is None):
        return (window,) * num_layers
    if layer_types is None:
        layer_types = _default_layer_types(values)
    return tuple(window if layer_type == "sliding_attention" else None for layer_type in layer_types[:num_layers])


def _default_layer_types(values: Mapping[str, Any]) -> list[str]:
    if values["model_type"] == "smollm3":
        slides = [not rotary for rotary in _rotary(values)]
    else:
        slides = [layer >= values.get("max_window_layers", 28) for layer in range(values["num_hidden_layers"])]
    return ["sliding_attention" if layer else "full_attention" for layer in slides]


def _rotary(values: Mapping[str, Any]) -> tuple[bool, ...]:
    num_layers: int = values["num_hidden_layers"]
    if values["model_type"] != "smollm3":
        return (True,) * num_layers
    given = values.get("no_rope_layers")
    if given is not None:
        return tuple(bool(rotates) for rotates in given[:num_layers])
    interval = values.get("no_rope_layer_interval", 4)
    return tuple((layer + 1) % interval != 0 for layer in range(num_layers))


def _checked(model: LlamaConfig, values: Mapping[str, Any]) -> LlamaConfig:
    obstacles = {
        f"activation {values.get('hidden_act')!r}": values.get("hidden_act", "silu") != "silu",
        "a quantized checkpoint": values.get("quantization_config") is not None,
        f"rotation {dict(model.rope)!r}": not rope_supported(model.rope),
        f"head_dim {model.head_dim}": model.head_dim % 2 != 0,
        f"{model.num_heads} heads on {model.num_kv_heads}": model.num_heads % model.num_kv_heads != 0,
        "layer lists shorter than the model": min(len(model.windows), len(model.rotary)) < model.num_layers,
        "an architecture without a language model head": not _is_causal(values.get("architectures")),
    }
    found = [obstacle for obstacle, present in obstacles.items() if present]
    if found:
        raise UnsupportedConfig("not in the lean group: " + "; ".join(found))
    return model


def _is_causal(architectures: Any) -> bool:
    return not architectures or any(str(name).endswith("ForCausalLM") for name in architectures)
