"""The gated MLP of a layer: hidden + W_down (silu(W_gate x) * W_up x)."""

from typing import Protocol

import torch
from torch.nn import functional

from functions.stage.models.llama.linear import Linear, Matrix, linear


class GatedMlp(Protocol):
    def add_to(self, residual: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """residual [n, hidden_size] plus what the MLP makes of x."""


class SplitMlp:
    """Gate and up apart: kernels that take SiLU and the product along need no operator between the matrices."""

    def __init__(self, gate: Linear, up: Linear, down: Linear) -> None:
        self._gate = gate
        self._up = up
        self._down = down

    def add_to(self, residual: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return self._down.add_to(residual, self._up.times(x, self._gate.silu(x)))


class FusedMlp:
    """Gate and up as one matrix: x is quantized once for both."""

    def __init__(self, gate_and_up: Linear, down: Linear) -> None:
        self._gate_and_up = gate_and_up
        self._down = down

    def add_to(self, residual: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        gate, up = self._gate_and_up(x).chunk(2, 1)
        return self._down.add_to(residual, functional.silu(gate).mul_(up))


def gated_mlp(gate: Matrix, up: Matrix, down: Matrix, dtype: torch.dtype) -> GatedMlp:
    """The faster way for the kinds of these matrices, for activations of `dtype`."""
    if gate.weight.dtype == up.weight.dtype == torch.int8:
        return FusedMlp(linear([gate, up], dtype), linear([down], dtype))
    return SplitMlp(*(linear([matrix], dtype) for matrix in (gate, up, down)))
