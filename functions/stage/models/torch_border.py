"""numpy's arrays at the border of a layer group ↔ torch's tensors behind it, for the groups that are made of torch.

Memory is shared wherever both sides can have it. The dtypes of a border have their names on the wire (`floats`).
"""

from collections.abc import Mapping
from typing import Final

import numpy as np
import torch

from functions.stage.models.floats import Array
from storage.loading.weight_loader import RawTensor

DTYPES: Final = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "I8": torch.int8}


def input_tensor(inputs: Array, dtype: str) -> torch.Tensor:
    """Token ids as they are, hidden states as `dtype`. A copy only where the memory is read-only, which torch does not take."""
    if inputs.dtype == np.int64:
        return torch.from_numpy(inputs)
    tensor = torch.from_numpy(inputs if inputs.flags.writeable else inputs.copy())
    return tensor.view(torch.bfloat16) if dtype == "BF16" else tensor


def output_array(tensor: torch.Tensor) -> Array:
    """A tensor on the CPU; bf16 as its bits."""
    contiguous = tensor.detach().contiguous()
    array: Array = (contiguous.view(torch.uint16) if contiguous.dtype == torch.bfloat16 else contiguous).numpy()
    return array


def weight_tensor(raw: RawTensor) -> torch.Tensor:
    """Over the very memory that the bytes were read into."""
    return torch.frombuffer(raw.data, dtype=DTYPES[raw.dtype]).view(raw.shape)


def weight_tensors(raw: Mapping[str, RawTensor]) -> dict[str, torch.Tensor]:
    return {name: weight_tensor(each) for name, each in raw.items()}


def use_threads(count: int) -> None:
    """Of torch's operators, in the whole process."""
    if count != torch.get_num_threads():
        torch.set_num_threads(count)
