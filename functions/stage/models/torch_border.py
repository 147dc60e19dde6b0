"""Converts between numpy arrays, which layer groups read and return, and torch tensors. Shares memory instead of copying if
possible.

Dtypes have the names of the wire (`floats`).
"""

from typing import Final

import numpy as np
import torch

from functions.stage.models.floats import Array
from storage.loading.weight_loader import RawTensor

DTYPES: Final = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "I8": torch.int8}


def input_tensor(inputs: Array, dtype: str) -> torch.Tensor:
    """The tensor of a group's input: int64 token ids, or hidden states of `dtype`.

    Shares memory with the array, unless that is read-only, which torch does not accept.
    """
    if inputs.dtype == np.int64:
        return torch.from_numpy(inputs)
    tensor = torch.from_numpy(inputs if inputs.flags.writeable else inputs.copy())
    return tensor.view(torch.bfloat16) if dtype == "BF16" else tensor


def output_array(tensor: torch.Tensor) -> Array:
    """The numpy array of a CPU tensor, in the same memory if that is contiguous. bf16 becomes its bits in uint16."""
    contiguous = tensor.detach().contiguous()
    array: Array = (contiguous.view(torch.uint16) if contiguous.dtype == torch.bfloat16 else contiguous).numpy()
    return array


def weight_tensor(raw: RawTensor) -> torch.Tensor:
    """The torch tensor of a published one, in the same memory."""
    return torch.frombuffer(raw.data, dtype=DTYPES[raw.dtype]).view(raw.shape)


def use_threads(count: int) -> None:
    """Sets the threads of torch's operators in the whole process."""
    if count != torch.get_num_threads():
        torch.set_num_threads(count)
