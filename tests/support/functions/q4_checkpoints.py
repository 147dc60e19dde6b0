"""Checkpoints in four bits as a publication has them."""

from collections.abc import Collection, Mapping

import torch

from storage.models import q4
from storage.models.blocks import BLOCK, GROUP
from storage.models.q4 import quantize
from tests.support.functions.int8_checkpoints import MATRICES, quantized


def q4_checkpoint(tensors: Mapping[str, torch.Tensor], keep_wide: Collection[str] = ()) -> dict[str, torch.Tensor]:
    """keep_wide: matrices that stay in bfloat16, by the last part of their names. Layers' matrices are uint8."""
    stored = {}
    for name, tensor in tensors.items():
        matrix = name.split(".")[-2]
        if matrix in keep_wide:
            stored[name] = tensor.bfloat16()
        elif matrix in ("embed_tokens", "lm_head"):
            stored[name], stored[f"{name}_scale"] = quantized(tensor)
        elif name.endswith(".weight") and matrix in MATRICES:
            stored[name] = torch.from_numpy(q4.pack(*quantize(tensor.numpy())))
        else:
            stored[name] = tensor
    return stored


def plain(packed: torch.Tensor) -> torch.Tensor:
    """The weights of a matrix whose sizes are whole groups and blocks."""
    groups, blocks, _ = packed.shape
    return torch.from_numpy(q4.dequantize(packed.numpy(), groups * GROUP, blocks * BLOCK))
