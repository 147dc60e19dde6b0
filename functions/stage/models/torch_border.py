"""numpy arrays at the border of a layer group ↔ torch tensors inside it. Memory is shared whenever both sides can use it.

Dtypes have the wire's names (`floats`).
"""

from typing import Final

import numpy as np
import torch

from functions.stage.models.floats import Array
from storage.loading.weight_loader import RawTensor

DTYPES: Final = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "I8": torch.int8}


def input_tensor(inputs: Array, dtype: str) -> torch.Tensor:
    """Token ids as they are, hidden states as `dtype`. Copies read-only memory, which torch does not accept."""
    if inputs.dtype == np.int64:
        return torch.from_numpy(inputs)
    tensor = torch.from_numpy(inputs if inputs.flags.writeable else inputs.copy())
    return tensor.view(torch.bfloat16) if dtype == "BF16" else tensor


def output_array(tensor: torch.Tensor) -> Array:
    """The array of a CPU tensor; bf16 as its bits."""
    contiguous = tensor.detach().contiguous()
    array: Array = (contiguous.view(torch.uint16) if contiguous.dtype == torch.bfloat16 else contiguous).numpy()
    return array


def weight_tensor(raw: RawTensor) -> torch.Tensor:
    """A tensor in the memory that the bytes were read into."""
    return torch.frombuffer(raw.data, dtype=DTYPES[raw.dtype]).view(raw.shape)


def use_threads(count: int) -> None:
    """Sets the threads of torch's operators in the whole process."""
    if count != torch.get_num_threads():
        torch.set_num_threads(count)
