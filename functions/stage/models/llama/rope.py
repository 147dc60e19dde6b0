"""Rotary position embeddings: frequencies, and the order of rows in query and key matrices. Needs no torch.

A rotation turns pairs of numbers of a head. In checkpoints, the two halves of a rotated pair are head_dim / 2 apart.
`interleaved_rows` reorders the rows of query and key matrices so that the halves are adjacent. Queries and keys are permuted
in the same way, so their products do not change.

Frequencies are computed in float32 like in transformers' `modeling_rope_utils`. Only the power is computed in float64 and then
rounded, which equals torch's result to the bit in nearly all cases. `storage.checkpoints.decoder_config` reads the parameters
from a config.json.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, Final

import numpy as np

from functions.stage.models.floats import Array, Float32


def _default(parameters: Mapping[str, Any], head_dim: int) -> tuple[Float32, float]:
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    powers = (float(parameters["rope_theta"]) ** exponents.astype(np.float64)).astype(np.float32)
    return np.float32(1) / powers, 1.0


def _proportional(parameters: Mapping[str, Any], head_dim: int) -> tuple[Float32, float]:
    """Proportional RoPE: only a share of the pairs of a head is rotated, with the frequencies of full rotation."""
    frequencies = _default(parameters, head_dim)[0] / np.float32(parameters.get("factor", 1.0))
    frequencies[int(parameters["partial_rotary_factor"] * head_dim // 2) :] = 0
    return frequencies, 1.0


def _linear(parameters: Mapping[str, Any], head_dim: int) -> tuple[Float32, float]:
    return _default(parameters, head_dim)[0] / parameters["factor"], 1.0


def _llama3(parameters: Mapping[str, Any], head_dim: int) -> tuple[Float32, float]:
    """Llama 3's scaling: divides low frequencies by `factor`, keeps high ones, and interpolates in between."""
    frequencies, _ = _default(parameters, head_dim)
    low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
    turns = parameters["original_max_position_embeddings"] / (2 * math.pi / frequencies)
    kept = ((turns - low) / (high - low)).clip(0, 1)
    return (1 - kept) * frequencies / parameters["factor"] + kept * frequencies, 1.0


def _yarn(parameters: Mapping[str, Any], head_dim: int) -> tuple[Float32, float]:
    """YaRN (arXiv 2309.00071): keeps high frequencies, divides low ones by `factor`, and scales attention scores."""
    extrapolated, _ = _default(parameters, head_dim)
    low, high = _yarn_range(parameters, head_dim)
    ramp = (np.arange(head_dim // 2, dtype=np.float32) - low) / ((high - low) or 0.001)
    interpolated_share = ramp.clip(0, 1)
    frequencies = extrapolated / parameters["factor"] * interpolated_share + extrapolated * (1 - interpolated_share)
    return frequencies, _yarn_attention_factor(parameters)


def _yarn_range(parameters: Mapping[str, Any], head_dim: int) -> tuple[float, float]:
    """Returns the first and last dimension of the range in which YaRN interpolates. They may be fractions."""

    def dimension(rotations: float) -> float:
        wavelengths = parameters["original_max_position_embeddings"] / (rotations * 2 * math.pi)
        return head_dim * math.log(wavelengths) / (2 * math.log(parameters["rope_theta"]))

    low = dimension(parameters.get("beta_fast") or 32)
    high = dimension(parameters.get("beta_slow") or 1)
    if parameters.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    return max(low, 0), min(high, head_dim - 1)


def _yarn_attention_factor(parameters: Mapping[str, Any]) -> float:
    def tempered(mscale: float) -> float:
        factor = parameters["factor"]
        return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0

    if "attention_factor" in parameters:
        return float(parameters["attention_factor"])
    mscale, mscale_all_dim = parameters.get("mscale"), parameters.get("mscale_all_dim")
    if mscale and mscale_all_dim:
        return tempered(mscale) / tempered(mscale_all_dim)
    return tempered(1.0)


def _longrope(parameters: Mapping[str, Any], head_dim: int) -> tuple[Float32, float]:
    """LongRoPE (arXiv 2402.13753): divides each frequency by its factor in `short_factor`."""
    frequencies, _ = _default(parameters, head_dim)
    factor, original = parameters["factor"], parameters["original_max_position_embeddings"]
    scaling = parameters.get("attention_factor")
    if scaling is None:
        scaling = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    divided: Float32 = np.divide(frequencies, np.array(parameters["short_factor"]), dtype=np.float32)
    return divided, float(scaling)


_FREQUENCIES: Final[dict[str, Callable[[Mapping[str, Any], int], tuple[Float32, float]]]] = {
    "default": _default,
    "linear": _linear,
    "proportional": _proportional,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}


def rope_frequencies(parameters: Mapping[str, Any], head_dim: int) -> tuple[Float32, float]:
    """Returns the frequencies of all pairs, and a factor by which cosines and sines are multiplied.

    Frequencies are radians per position, float32 [head_dim / 2]. parameters: `Rotation.parameters` of the model's description.
    """
    return _FREQUENCIES[parameters["rope_type"]](parameters, head_dim)


def interleaved_rows(num_heads: int, head_dim: int, rotated: int | None = None) -> Array:
    """Returns the order of a query or key matrix's rows in which the halves of each rotated pair are adjacent.

    The result is row numbers [num_heads * head_dim], to index the matrix with. rotated: how many numbers at the beginning of a
    head are rotated. If None, all are.
    """
    rotated = head_dim if rotated is None else rotated
    order = np.concatenate([np.arange(rotated).reshape(2, -1).T.ravel(), np.arange(rotated, head_dim)])
    rows: Array = (np.arange(num_heads)[:, None] * head_dim + order).ravel()
    return rows
