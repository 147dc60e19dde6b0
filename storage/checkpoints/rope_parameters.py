"""What a config.json says of rotary position embeddings, in either spelling, and whether the lean layers rotate that way."""

import math
from collections.abc import Mapping
from typing import Any, Final

_COMMON: Final = frozenset({"rope_type", "type", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings"})
_OPTIONAL: Final[dict[str, frozenset[str]]] = {
    "default": frozenset({"factor"}),  # transformers reads no factor either
    "yarn": frozenset({"attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"}),
}
_NEEDED: Final[dict[str, tuple[str, ...]]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
}


def rope_parameters(config: Mapping[str, Any], default_theta: float) -> dict[str, Any]:
    """`rope_parameters` of transformers 5, or `rope_theta` with `rope_scaling` of older configs, as one flat dict."""
    given = config.get("rope_scaling") or config.get("rope_parameters") or {}
    given = given if isinstance(given, Mapping) else {"rope_type": repr(given)}
    parameters = {key: value for key, value in given.items() if value is not None}
    parameters.setdefault("rope_type", parameters.get("type", "default"))
    parameters.setdefault("rope_theta", config.get("rope_theta") or default_theta)
    original = config.get("original_max_position_embeddings")
    if original is not None:
        parameters["original_max_position_embeddings"] = original
    parameters.setdefault("original_max_position_embeddings", config.get("max_position_embeddings"))
    parameters.setdefault("partial_rotary_factor", config.get("partial_rotary_factor") or 1.0)
    return parameters


def rope_supported(parameters: Mapping[str, Any]) -> bool:
    """Whether `Rope` (functions/stage/models/llama/rope.py) reads all of it: what it does not know may change the numbers."""
    rope_type = parameters["rope_type"]
    needed = _NEEDED.get(rope_type) if isinstance(rope_type, str) else None
    if needed is None:
        return False
    known = _COMMON.union(needed, _OPTIONAL.get(rope_type, ()))
    numbers = set(needed).union(set(parameters) - {"rope_type", "type", "truncate"})
    return (
        known.issuperset(parameters)
        and all(_is_number(parameters.get(name)) for name in numbers)
        and parameters["partial_rotary_factor"] == 1.0
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
