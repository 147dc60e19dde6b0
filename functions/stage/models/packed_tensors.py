"""Reads packed matrices of a published model, and converts tensors for implementations that are not in C.

These implementations need matrices in blocks as floats, and transformers needs the experts of a layer in one tensor.
"""

from collections.abc import Mapping, MutableMapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from functions.stage.models.floats import Array, HiddenDtype, narrowed
from functions.stage.models.layer_group import MissingTensors
from storage.checkpoints.decoder import Shapes
from storage.checkpoints.safetensors_format import ITEM_BYTES
from storage.floats import as_bytes
from storage.loading.weight_loader import RawTensor
from storage.models.blocks import FORMATS, Packing, floats_of, packed_shape, packing_of, unpack
from storage.models.expert_tensors import merged_experts

_FORMAT = "_format"  # ends the name of the tensor that describes a matrix in blocks
_ORDER = "_order"  # ends the name of the tensor that has the order of the matrix's columns


class WrongShape(MissingTensors):
    """The shape of a published tensor is not that of the config. Publish the model again from a sound checkpoint."""


def packing(tensors: Mapping[str, RawTensor], name: str) -> Packing | None:
    """Returns how the matrix `name` is packed in blocks, or None if it is not packed.

    Raises WrongShape if the packed bytes do not fit the shape of the matrix.
    """
    if (described := tensors.get(name + _FORMAT)) is None or name not in tensors:
        return None
    try:
        found = packing_of(described.data)
    except ValueError as error:
        raise WrongShape(f"{name}{_FORMAT}: {error}") from error
    form, (outs, width) = FORMATS[found.format], found.shape
    if width % (32 * form.blocks) or tensors[name].shape != packed_shape(form, outs, width):
        raise WrongShape(f"{name} is {list(tensors[name].shape)}, which is no {found.format} of {list(found.shape)}")
    return found


def column_order(tensors: Mapping[str, RawTensor], name: str, width: int) -> Array | None:
    """Returns the order in which the matrix `name` stores its columns: their numbers, int32 [width].

    None if the columns are in their natural order. Raises WrongShape.
    """
    if (stored := tensors.get(name + _ORDER)) is None:
        return None
    order = np.frombuffer(stored.data, np.int32) if stored.dtype == "I32" else np.zeros(0, np.int32)
    if not np.array_equal(np.sort(order), np.arange(width)):
        raise WrongShape(f"{name}{_ORDER} does not have the numbers of {width} columns; publish the model again")
    return order


def shapes_of(tensors: Mapping[str, RawTensor]) -> Shapes:
    """Returns the shapes of tensors by name. A matrix in blocks has its unpacked shape. Raises WrongShape."""
    packed = {name: packing(tensors, name) for name in tensors}
    return {
        name: tensor.shape if (found := packed[name]) is None else found.shape
        for name, tensor in tensors.items()
        if not any(name.endswith(end) and name.removesuffix(end) in tensors for end in (_FORMAT, _ORDER))
    }


def widen(tensors: MutableMapping[str, RawTensor], dtype: HiddenDtype) -> None:
    """Replaces matrices in blocks with floats of `dtype`, for implementations that are not in C. Raises WrongShape."""
    for name in [name for name in tensors if name + _FORMAT in tensors]:
        if found := packing(tensors, name):
            form = FORMATS[found.format]
            packed = np.frombuffer(tensors[name].data, np.uint8).reshape(tensors[name].shape)
            weights = np.empty(found.shape, np.float32)
            order = column_order(tensors, name, found.shape[1])
            columns = slice(None) if order is None else order
            for first in range(0, len(packed), 64):
                rows = weights[16 * first : 16 * (first + 64)]
                rows[:, columns] = floats_of(form, unpack(form, packed[first : first + 64], len(rows)))
            tensors.pop(name + _ORDER, None)
            tensors[name] = RawTensor(dtype, found.shape, as_bytes(narrowed(weights, dtype)))
            del tensors[name + _FORMAT]


def join_experts(model_type: str, tensors: MutableMapping[str, RawTensor]) -> None:
    """Joins the matrices of single experts into the tensors that transformers reads, which hold all experts of a layer.

    Changes `tensors` in place. Does nothing for families whose experts transformers reads one by one.
    """
    for suffix, (parts, kind, transposed) in merged_experts(model_type):
        first = f".{parts[0].format(expert=0)}.{kind}"
        for prefix in [name.removesuffix(first[1:]) for name in tensors if name.endswith(first)]:
            experts: list[NDArray[Any]] = []
            while f"{prefix}{parts[0].format(expert=len(experts))}.{kind}" in tensors:
                raws = [tensors.pop(f"{prefix}{part.format(expert=len(experts))}.{kind}") for part in parts]
                arrays = [np.frombuffer(raw.data, f"u{ITEM_BYTES[raw.dtype]}").reshape(raw.shape) for raw in raws]
                if transposed:
                    experts.append(np.stack(arrays, axis=1).reshape(-1, *arrays[0].shape[1:]).T)
                else:
                    experts.append(np.concatenate(arrays))
                dtype = raws[0].dtype
            whole = np.stack(experts)
            tensors[f"{prefix}{suffix}"] = RawTensor(dtype, whole.shape, as_bytes(whole))
