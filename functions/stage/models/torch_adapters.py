"""Adapters in torch: adds their terms to the outputs of linear modules, for the rows of a pass that have adapters."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from functions.stage.models.adapters import LowRank
from functions.stage.models.layer_group import Segment


@dataclass(frozen=True, slots=True)
class TorchLowRank:
    """The term that an adapter adds to the output of a module with input x: scale * B A x."""

    a: torch.Tensor  # [rank, inputs]
    b: torch.Tensor  # [outputs, rank]
    scale: float

    @classmethod
    def of(cls, low: LowRank, dtype: torch.dtype, device: torch.device) -> "TorchLowRank":
        return cls(torch.from_numpy(low.a).to(device, dtype), torch.from_numpy(low.b).to(device, dtype), low.scale)

    @property
    def bytes(self) -> int:
        return self.a.nbytes + self.b.nbytes

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the term for x, [..., inputs] of any float dtype, as [..., outputs] of that dtype."""
        low = torch.nn.functional.linear(x.to(self.a.dtype), self.a)
        return torch.nn.functional.linear(low, self.b).mul_(self.scale).to(x.dtype)


Share = Mapping[str, TorchLowRank]
"""The part of an adapter that changes one layer, by names of matrices."""


class PassAdapters:
    """The rows of a pass that have adapters. Neighbouring rows with the same adapter are computed together."""

    def __init__(self, segments: Sequence[Segment], shares: Mapping[int, Sequence[Share]]) -> None:
        """Finds the rows that have adapters. shares: for each adapter number, the `Share` of each layer of the group."""
        self._spans: list[tuple[int, int, Sequence[Share]]] = []
        end = 0
        for segment in segments:
            first, end = end, end + segment.length
            share = shares.get(segment.adapter)
            if share is None:
                continue
            if self._spans and self._spans[-1][1] == first and self._spans[-1][2] is share:
                first = self._spans.pop()[0]
            self._spans.append((first, end, share))

    def add(self, slot: int, name: str, x: torch.Tensor, y: torch.Tensor) -> None:
        """Adds the terms of adapters to y [n, outputs] in place.

        y is the product of x [n, inputs] with the matrix `name` of a layer. slot: number of the layer in the group.
        """
        for first, end, share in self._spans:
            if (low := share[slot].get(name)) is not None:
                y[first:end] += low(x[first:end])
