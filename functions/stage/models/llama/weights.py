"""A checkpoint's tensors on their way into a layer: checked, converted, and given up as they are used."""

from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import Final

import torch

from functions.stage.models.layer_group import MissingTensors
from functions.stage.models.llama.linear import Matrix
from functions.stage.models.torch_border import weight_tensor
from storage.loading.weight_loader import RawTensor


@dataclass(frozen=True, slots=True)
class Precision:
    """In which types a group computes and stores."""

    activations: torch.dtype
    matrices: torch.dtype | None
    """None: as published, int8 or wider."""
    kv: torch.dtype
    hidden: torch.dtype
    """Between stages."""


PRECISIONS: Final = {
    "float32": Precision(torch.float32, torch.float32, torch.float32, torch.float32),
    "bfloat16": Precision(torch.bfloat16, torch.bfloat16, torch.bfloat16, torch.bfloat16),
    "float16": Precision(torch.float16, torch.float16, torch.float16, torch.float16),
    # The int8 kernel gives float32, which the small operators between the matrices are fastest in. Attention and the
    # wire are about memory: bfloat16 halves both, and perplexity does not tell (docs/log.md).
    "int8": Precision(torch.float32, None, torch.bfloat16, torch.bfloat16),
}


class Weights:
    """Tensors under one prefix. What is taken is removed, so that sources are freed as fused ones appear."""

    def __init__(
        self, tensors: MutableMapping[str, RawTensor], prefix: str, precision: Precision, device: torch.device
    ) -> None:
        self._tensors = tensors
        self._prefix = prefix
        self._precision = precision
        self._device = device

    def __contains__(self, name: str) -> bool:
        return self._prefix + name in self._tensors

    def vector(self, name: str) -> torch.Tensor:
        """A norm's gain, in the dtype of activations. Raises MissingTensors."""
        return self._take(name).to(self._precision.activations)

    def matrix(self, name: str, biased: bool = False) -> Matrix:
        """`name`.weight with its scale and bias. Raises MissingTensors."""
        weight = self._take(f"{name}.weight")
        if weight.dtype == torch.int8:
            scale = self._take(f"{name}.weight_scale").float()
            return Matrix(weight, scale, self._take(f"{name}.bias").float() if biased else None)
        weight = weight.to(self._precision.matrices or weight.dtype)
        return Matrix(weight, None, self._take(f"{name}.bias").to(weight.dtype) if biased else None)

    def _take(self, name: str) -> torch.Tensor:
        try:
            return weight_tensor(self._tensors.pop(self._prefix + name)).to(self._device)
        except KeyError as missing:
            raise MissingTensors(f"{missing} is missing") from None
