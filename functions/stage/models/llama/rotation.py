"""Rotary position embeddings by torch: one multiplication per layer.

Pairs of a head's dimensions are complex numbers, turned by multiplying with exp(i · angle) in place. In-place complex
multiplication took 6.6 µs for 16 rows of 12 heads where rotate-half took 78 (Xeon with AMX, one thread).
"""

from collections.abc import Mapping
from typing import Any

import torch

from functions.stage.models.llama.rope import rope_frequencies


class Rope:
    """The rotations of a model. `rotations` once per pass, `rotate` once per layer."""

    def __init__(self, parameters: Mapping[str, Any], head_dim: int, device: torch.device) -> None:
        frequencies, scaling = rope_frequencies(parameters, head_dim)
        self._frequencies = torch.from_numpy(frequencies).to(device)
        self._scaling = torch.tensor(scaling, dtype=torch.float32, device=device)

    def rotations(self, positions: torch.Tensor) -> torch.Tensor:
        """int64 positions [n] → complex64 [n, 1, head_dim / 2]."""
        angles = positions.float().unsqueeze(1) * self._frequencies
        return torch.polar(self._scaling.expand_as(angles), angles).unsqueeze(1)


def rotate(heads: torch.Tensor, rotations: torch.Tensor) -> None:
    """Turns heads [n, heads, head_dim], with pairs side by side, in place."""
    pairs = heads.view(*heads.shape[:2], -1, 2)
    if heads.dtype == torch.float32:
        torch.view_as_complex(pairs).mul_(rotations)
    else:
        pairs.copy_(torch.view_as_real(torch.view_as_complex(pairs.float()).mul_(rotations)))
