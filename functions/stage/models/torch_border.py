"""Converts between torch tensors and the numpy arrays that layer groups read and return.

Shares memory instead of copying if possible. Dtypes have the names of the wire (`floats`).
"""

from typing import Final

import numpy as np
import torch

from functions.stage.models.floats import Array
from storage.loading.weight_loader import RawTensor

DTYPES: Final = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "I8": torch.int8}


def input_tensor(inputs: Array, dtype: str) -> torch.Tensor:
    """Returns the input of a group as a tensor: int64 token ids, or hidden states of `dtype`.

    The tensor shares memory with the array, except with a read-only array of hidden states, which torch does not accept.
    """
    if inputs.dtype == np.int64:
        return torch.from_numpy(inputs)
    tensor = torch.from_numpy(inputs if inputs.flags.writeable else inputs.copy())
    return tensor.view(torch.bfloat16) if dtype == "BF16" else tensor


def output_array(tensor: torch.Tensor) -> Array:
    """Returns a CPU tensor as an array, in the same memory if it is contiguous. bf16 numbers become bits in uint16."""
    contiguous = tensor.detach().contiguous()
    array: Array = (contiguous.view(torch.uint16) if contiguous.dtype == torch.bfloat16 else contiguous).numpy()
    return array


def weight_tensor(raw: RawTensor) -> torch.Tensor:
    """Returns a published tensor as a torch tensor in the same memory."""
    return torch.frombuffer(raw.data, dtype=DTYPES[raw.dtype]).view(raw.shape)


def use_threads(count: int) -> None:
    """Sets the number of threads of torch's operators in the whole process."""
    if count != torch.get_num_threads():
        torch.set_num_threads(count)
