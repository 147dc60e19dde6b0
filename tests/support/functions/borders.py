"""torch's tensors, which tests have and compare, as what a layer group takes and gives."""

from collections.abc import Mapping, Sequence

import torch

from functions.stage.models.floats import DTYPES, Array, narrowed
from functions.stage.models.layer_group import LayerGroup, Segment
from functions.stage.models.torch_border import DTYPES as TORCH_DTYPES
from functions.stage.models.torch_border import input_tensor
from storage.loading.weight_loader import RawTensor

_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()} | {torch.uint8: "U8"}


def raw(tensors: Mapping[str, torch.Tensor]) -> dict[str, RawTensor]:
    """As they come out of the store; the tensors' own memory."""
    return {name: raw_tensor(tensor) for name, tensor in tensors.items()}


def raw_tensor(tensor: torch.Tensor) -> RawTensor:
    flat = tensor.contiguous().view(-1).view(torch.uint8).numpy()
    return RawTensor(_NAMES[tensor.dtype], tuple(tensor.shape), flat.data)


def forwarded(group: LayerGroup, inputs: torch.Tensor | Sequence[int], segments: Sequence[Segment]) -> torch.Tensor:
    """One pass. inputs: token ids, or hidden states of any dtype, rounded to the group's."""
    if not isinstance(inputs, torch.Tensor):
        inputs = torch.tensor(inputs)
    given = inputs.numpy() if inputs.dtype == torch.int64 else states(group, inputs)
    return tensor(group.forward(given, segments), group)


def logits_of(group: LayerGroup, hidden: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(group.logits(states(group, hidden)))


def states(group: LayerGroup, hidden: torch.Tensor) -> Array:
    return narrowed(hidden.float().contiguous().numpy(), group.hidden_dtype)


def tensor(hidden: Array, group: LayerGroup) -> torch.Tensor:
    """In the dtype that the array stands for."""
    assert hidden.dtype == DTYPES[group.hidden_dtype]
    return input_tensor(hidden, group.hidden_dtype)
