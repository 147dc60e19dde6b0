"""What travels in a Batch ↔ torch tensors on the CPU."""

from typing import Final

import numpy as np
import torch

from eventing.wire.events import Tensor

DTYPES: Final[dict[str, torch.dtype]] = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
NAMES: Final[dict[torch.dtype, str]] = {dtype: name for name, dtype in DTYPES.items()}


def token_tensor(token_ids: memoryview) -> torch.Tensor:
    """int64 [tokens]: a copy, because embeddings want another width than the wire has."""
    return torch.from_numpy(np.array(token_ids, dtype=np.int64))


def hidden_tensor(hidden: Tensor) -> torch.Tensor:
    """The tensor over the very bytes of the body; over a copy where those are read-only, which torch does not take."""
    data = bytearray(hidden.data) if hidden.data.readonly else hidden.data
    return torch.frombuffer(data, dtype=DTYPES[hidden.dtype]).view(hidden.shape)


def wire_tensor(hidden: torch.Tensor) -> Tensor:
    """The tensor's own memory as bytes, without a copy; [n, hidden_size] with n > 0."""
    contiguous = hidden.detach().contiguous()
    data = contiguous.view(torch.uint8).numpy().data.cast("B")
    return Tensor(NAMES[hidden.dtype], tuple(hidden.shape), data)
