"""An adapter's share of a group's layers as numpy arrays, as layer groups take it."""

from collections.abc import Mapping
from dataclasses import dataclass

from functions.stage.models.floats import Float32, HiddenDtype, narrowed, widened
from storage.floats import read_floats
from storage.loading.weight_loader import RawTensor


class WrongAdapter(Exception):
    """An adapter does not fit the layers, or has what their implementation does not compute. Publish it for this model."""


@dataclass(frozen=True, slots=True)
class LowRank:
    """What an adapter adds to the output of a module: scale * B A x."""

    a: Float32  # [rank, inputs]
    b: Float32  # [outputs, rank]
    scale: float


def low_ranks(tensors: Mapping[str, RawTensor], dtype: HiddenDtype) -> dict[str, LowRank]:
    """The low-rank matrices of each adapted module, by its name in the checkpoint, rounded to `dtype`.

    tensors: of objects of an `AdapterManifest`. Raises WrongAdapter for tensors that no such object has.
    """
    found: dict[str, LowRank] = {}
    for name in tensors:
        module, _, part = name.rpartition(".")
        if part != "lora_A":
            continue
        try:
            a, b, scale = (_floats(tensors[f"{module}.lora_{each}"], dtype) for each in ("A", "B", "scale"))
        except KeyError as missing:
            raise WrongAdapter(f"the adapter lacks {missing}") from None
        found[module] = LowRank(a, b, float(scale.item()))
    if 3 * len(found) != len(tensors):
        raise WrongAdapter(f"the adapter has {len(tensors)} tensors for {len(found)} modules, not three for each")
    return found


def _floats(tensor: RawTensor, dtype: HiddenDtype) -> Float32:
    wide = read_floats(tensor.data, tensor.dtype).reshape(tensor.shape)
    if dtype == "F32" or not tensor.shape:  # a scale is a number of its own
        return wide
    return widened(narrowed(wide, dtype), dtype)
