"""What a Llama-shaped model looks like, read from its config.json in either spelling (transformers 4 and 5).

Families and sizes are `llama_shaped`'s. What deviates in other ways (another activation, a partial rotation, a quantized
checkpoint) is declined: stages then run it by transformers, and not in a dtype that only the lean layers have.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from storage.checkpoints.llama_shaped import LLAMA_FAMILIES, LlamaSizes
from storage.checkpoints.rope_parameters import rope_parameters, rope_supported
from storage.errors import ArchitectureUnsupported


class UnsupportedConfig(Exception):
    """The lean layers do not run this config. transformers may, in a float dtype."""


@dataclass(frozen=True, kw_only=True)
class LlamaConfig(LlamaSizes):
    """A whole model. `windows` and `rotary` have one entry per layer."""

    rms_norm_eps: float
    windows: tuple[int | None, ...]
    """How many tokens, its own included, a token attends to; None: all."""
    rotary: tuple[bool, ...]
    """Whether the layer rotates queries and keys (SmolLM3 leaves it out in some)."""
    rope: Mapping[str, Any]

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "LlamaConfig":
        """Raises UnsupportedConfig, which says what is in the way."""
        try:
            sizes = LlamaSizes.from_config(config)
        except ArchitectureUnsupported as error:
            raise UnsupportedConfig(str(error)) from error
        defaults = LLAMA_FAMILIES[config["model_type"]].defaults
        values = {**defaults, **config, "max_position_embeddings": sizes.max_positions}
        model = cls(
            **vars(sizes),
            rms_norm_eps=values.get("rms_norm_eps", 1e-6),
            windows=_windows(values),
            rotary=_rotary(values),
            rope=rope_parameters(values, 10_000.0),
        )
        return _checked(model, values)


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
        raise UnsupportedConfig("the lean layers do not run " + "; ".join(found))
    return model


def _is_causal(architectures: Any) -> bool:
    return not architectures or any(str(name).endswith("ForCausalLM") for name in architectures)
