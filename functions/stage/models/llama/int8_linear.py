"""Matrices with int8 weights per output channel and activations per token (row), each row as two int8 numbers a value.

A row is divided by its own largest value, so what a sequence gets never depends on the rows beside it: products are
summed exactly in int32. The kernel is oneDNN's, on weights laid out once: fast with AMX; without, its reference kernel,
hundreds of times slower. It serves where native layers cannot (see `native.choice`).

One int8 per activation costs 3 to 5 % of perplexity, because a few channels of a row are far larger than the rest. So
what truncation to int8 leaves over goes through the same kernel as a second row: 14 bits in all, and 0.6 % at most. While
decoding, a matrix takes as long for two rows as for one, because reading it is what takes long. docs/log.md
has the numbers, and compares torch's other int8 operators.
"""

from typing import Final

import torch
from torch.nn import functional

_LARGEST: Final = 127.0
_SMALLEST: Final = 1e-30
"""A row of zeros is divided by this."""


class Int8Linear:
    """Implements `Linear` for float32 activations."""

    def __init__(self, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None) -> None:
        """weight int8 [out, in], scale float32 [out], bias float32 [out]."""
        self._weight = torch.ops.onednn.qlinear_prepack.default(weight, None)
        self._scale = scale / _LARGEST
        self._zero_points = torch.zeros(len(scale), dtype=torch.int32)
        self._bias = bias
        self._largest = torch.tensor(_LARGEST)
        self._matmul = torch.ops.onednn.qlinear_pointwise.default

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        y, row_scale = self._products(x)
        return y.mul_(row_scale) if self._bias is None else torch.addcmul(self._bias, y, row_scale)

    def add_to(self, residual: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        y, row_scale = self._products(x)
        if self._bias is not None:
            residual = residual + self._bias
        return torch.addcmul(residual, y, row_scale)

    def silu(self, x: torch.Tensor) -> torch.Tensor:
        return functional.silu(self(x), inplace=True)

    def times(self, x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        return self(x).mul_(factor)

    def _products(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Float32 [n, out], to be multiplied with the scales [n, 1] of the rows."""
        row_scale = x.abs().amax(1, keepdim=True).clamp_min_(_SMALLEST)
        steps = x * (self._largest / row_scale)
        rows = torch.empty((2 * len(x), x.shape[1]), dtype=torch.int8)
        whole, rest = rows.chunk(2)
        whole.copy_(steps)
        rest.copy_(steps.frac_().mul_(_LARGEST))
        y: torch.Tensor = self._matmul(
            *(rows, 1.0, 0, self._weight, self._scale, self._zero_points),
            *(None, 1.0, 0, torch.float32, "none", [], ""),
        )
        of_whole, of_rest = y.chunk(2)
        return of_whole.add_(of_rest, alpha=1 / _LARGEST), row_scale
