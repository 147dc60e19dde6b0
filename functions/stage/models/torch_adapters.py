"""Adapters in torch: what they add to the outputs of linear modules, row by row of a pass."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from functions.stage.models.adapters import LowRank
from functions.stage.models.layer_group import Segment


@dataclass(frozen=True, slots=True)
class TorchLowRank:
    """What an adapter adds to the output of a module: scale * B A x."""

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
        """x: [..., inputs] of any float dtype. Returns [..., outputs] of that dtype."""
        low = torch.nn.functional.linear(x.to(self.a.dtype), self.a)
        return torch.nn.functional.linear(low, self.b).mul_(self.scale).to(x.dtype)


Share = Mapping[str, TorchLowRank]
"""An adapter's share of one layer, by names of matrices."""


class PassAdapters:
    """The rows of a pass that have adapters. Rows of one adapter that follow each other are computed together."""

    def __init__(self, segments: Sequence[Segment], shares: Mapping[int, Sequence[Share]]) -> None:
        """shares: of each layer of the group, by the adapters' numbers."""
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
        """Adds to y [n, outputs], the product of x [n, inputs] with the matrix `name` of the group's layer `slot`."""
        for first, end, share in self._spans:
            if (low := share[slot].get(name)) is not None:
                y[first:end] += low(x[first:end])
