"""Checkpoints in int8 as a publication has them, and what their matrices stand for."""

from collections.abc import Collection, Mapping
from typing import Final

import torch

MATRICES: Final = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head")


def quantized(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scale = weight.abs().amax(1) / 127
    return (weight / scale.unsqueeze(1)).round().to(torch.int8), scale


def int8_checkpoint(tensors: Mapping[str, torch.Tensor], keep_wide: Collection[str] = ()) -> dict[str, torch.Tensor]:
    """keep_wide: matrices that stay in bfloat16, by the last part of their names."""
    stored = {}
    for name, tensor in tensors.items():
        matrix = name.split(".")[-2]
        if name.endswith(".weight") and matrix in MATRICES and matrix not in keep_wide:
            stored[name], stored[f"{name}_scale"] = quantized(tensor)
        else:
            stored[name] = tensor.bfloat16()
    return stored


def dequantized(stored: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same numbers in float32."""
    plain = {}
    for name, tensor in stored.items():
        if not name.endswith("_scale"):
            scale = stored.get(f"{name}_scale")
            plain[name] = tensor.float() if scale is None else tensor.float() * scale.unsqueeze(1)
    return plain
