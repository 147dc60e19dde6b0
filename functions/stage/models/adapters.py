"""Reads the part of an adapter that changes a group's layers into numpy arrays, from which layer groups prepare it."""

from collections.abc import Mapping
from dataclasses import dataclass

from functions.stage.models.floats import Float32, HiddenDtype, narrowed, widened
from storage.floats import read_floats
from storage.loading.weight_loader import RawTensor


class WrongAdapter(Exception):
    """An adapter does not fit the layers, or changes what their implementation cannot change.

    Publish the adapter for this model.
    """


@dataclass(frozen=True, slots=True)
class LowRank:
    """The term that an adapter adds to the output of a module with input x: scale * B A x."""

    a: Float32  # [rank, inputs]
    b: Float32  # [outputs, rank]
    scale: float


def low_ranks(tensors: Mapping[str, RawTensor], dtype: HiddenDtype) -> dict[str, LowRank]:
    """Returns the low-rank matrices of each adapted module, rounded to `dtype`. Keys are module names in the checkpoint.

    tensors: from the objects of an `AdapterManifest`. Raises WrongAdapter if a module does not have exactly three tensors.
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
