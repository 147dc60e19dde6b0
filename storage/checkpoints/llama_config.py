"""The configuration with which stages run a Llama-shaped model, read from a config.json of transformers 4 or 5.

`llama_shaped` has families and sizes. A model that deviates otherwise (another activation, a partial rotation, a quantized
checkpoint) is refused here; transformers then runs it, in a float dtype.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from storage.checkpoints.llama_shaped import LLAMA_FAMILIES, LlamaSizes
from storage.errors import ArchitectureUnsupported

_ROPE_COMMON: Final = frozenset(
    {"rope_type", "type", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings"}
)
_ROPE_OPTIONAL: Final[dict[str, frozenset[str]]] = {
    "default": frozenset({"factor"}),  # transformers reads no factor either
    "yarn": frozenset({"attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"}),
}
_ROPE_NEEDED: Final[dict[str, tuple[str, ...]]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
}


class UnsupportedConfig(Exception):
    """Lamina's own layers cannot run a model with this config.json. transformers may, in a float dtype."""


@dataclass(frozen=True, kw_only=True)
class LlamaConfig(LlamaSizes):
    """The configuration of a whole model. `windows` and `rotary` have one entry per layer."""

    rms_norm_eps: float
    windows: tuple[int | None, ...]  # how many tokens, its own included, a token attends to; None: all
    rotary: tuple[bool, ...]  # whether the layer rotates queries and keys (SmolLM3 leaves it out in some)
    rope: Mapping[str, Any]  # parameters of the rotation, such as rope_type and rope_theta

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "LlamaConfig":
        """Reads a parsed config.json. Raises UnsupportedConfig, which names everything that the layers do not run."""
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
            rope=_rope_parameters(values),
        )
        return _checked(model, values)


def _windows(values: Mapping[str, Any]) -> tuple[int | None, ...]:
    """The attention window of each layer in tokens; None: no window. As each family's class in transformers reads its config.

    Raises UnsupportedConfig if layers slide and the config has no window for them.
    """
    model_type: str = values["model_type"]
    num_layers: int = values["num_hidden_layers"]
    window: int | None = values.get("sliding_window")
    if model_type in {"llama", "seed_oss"}:
        return (None,) * num_layers
    if model_type == "mistral":
        return (window,) * num_layers
    if model_type in {"qwen2", "qwen3"} and not values.get("use_sliding_window"):
        window = None
    if (layer_types := values.get("layer_types")) is not None:
        slides = [layer_type == "sliding_attention" for layer_type in layer_types]
    elif window is None:
        slides = [False] * num_layers
    elif model_type == "ministral":
        slides = [True] * num_layers
    elif model_type == "smollm3":
        slides = [bool(values.get("use_sliding_window")) and not rotary for rotary in _rotary(values)]
    else:
        slides = [layer >= values.get("max_window_layers", 28) for layer in range(num_layers)]
    if any(slides) and window is None:
        raise UnsupportedConfig("layer_types has layers with sliding attention, and the config gives them no window")
    return tuple(window if slide else None for slide in slides)


def _rotary(values: Mapping[str, Any]) -> tuple[bool, ...]:
    num_layers: int = values["num_hidden_layers"]
    if values["model_type"] != "smollm3":
        return (True,) * num_layers
    given = values.get("no_rope_layers")
    if given is not None:
        return tuple(map(bool, given))
    interval = values.get("no_rope_layer_interval", 4)
    return tuple((layer + 1) % interval != 0 for layer in range(num_layers))


def _rope_parameters(config: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of the rotation as one flat dict, from `rope_parameters` (transformers 5) or `rope_theta` and
    `rope_scaling`."""
    given = config.get("rope_scaling") or config.get("rope_parameters") or {}
    given = given if isinstance(given, Mapping) else {"rope_type": repr(given)}
    parameters = {key: value for key, value in given.items() if value is not None}
    parameters.setdefault("rope_type", parameters.get("type", "default"))
    parameters.setdefault("rope_theta", config.get("rope_theta") or 10_000.0)
    original = config.get("original_max_position_embeddings")
    if original is not None:
        parameters["original_max_position_embeddings"] = original
    parameters.setdefault("original_max_position_embeddings", config.get("max_position_embeddings"))
    parameters.setdefault("partial_rotary_factor", config.get("partial_rotary_factor") or 1.0)
    return parameters


def _rope_supported(parameters: Mapping[str, Any]) -> bool:
    """Whether `Rope` (functions/stage/models/llama/rope.py) reads all of the parameters: one that it ignored might change
    results."""
    rope_type = parameters["rope_type"]
    needed = _ROPE_NEEDED.get(rope_type) if isinstance(rope_type, str) else None
    if needed is None:
        return False
    known = _ROPE_COMMON.union(needed, _ROPE_OPTIONAL.get(rope_type, ()))
    numbers = [parameters.get(name) for name in {*needed, *parameters} - {"rope_type", "type", "truncate"}]
    return (
        known.issuperset(parameters)
        and all(isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) for value in numbers)
        and parameters["partial_rotary_factor"] == 1.0
    )


def _checked(model: LlamaConfig, values: Mapping[str, Any]) -> LlamaConfig:
    architectures: Any = values.get("architectures")
    obstacles = {
        f"activation {values.get('hidden_act')!r}": values.get("hidden_act", "silu") != "silu",
        "a quantized checkpoint": values.get("quantization_config") is not None,
        f"rotation {dict(model.rope)!r}": not _rope_supported(model.rope),
        f"head_dim {model.head_dim}": model.head_dim % 2 != 0,
        f"{model.num_heads} heads on {model.num_kv_heads}": model.num_heads % model.num_kv_heads != 0,
        "layer lists of another length than the model": {len(model.windows), len(model.rotary)} != {model.num_layers},
        "an architecture without a language model head": bool(architectures)
        and not any(str(name).endswith("ForCausalLM") for name in architectures),
    }
    found = [obstacle for obstacle, present in obstacles.items() if present]
    if found:
        raise UnsupportedConfig("the lean layers do not run " + "; ".join(found))
    return model
