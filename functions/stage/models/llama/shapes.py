"""What shape every tensor of a Llama-shaped model has, from its config: what is loaded is held against it.

Layers in C and torch's operators take sizes from the config: a taller or wider matrix would have them read or write
memory that is none of its own.
"""

import re
from collections.abc import Collection
from typing import Final

from functions.stage.models.layer_group import MissingTensors
from storage.checkpoints import llama_shaped
from storage.checkpoints.llama_config import LlamaConfig
from storage.checkpoints.llama_shaped import Shapes
from storage.models.q4 import packed_shape

LAYER_NAME: Final = re.compile(r"model\.layers\.(\d+)\.")


class WrongShape(MissingTensors):
    """A published tensor is of another shape than the config makes it. Publish the model again from a sound checkpoint."""

    def __init__(self, name: str, seen: tuple[int, ...], expected: tuple[int, ...]) -> None:
        super().__init__(f"{name} is {list(seen)}, and the config makes it {list(expected)}")


def check_shapes(model: LlamaConfig, seen: Shapes, in_four_bits: Collection[str] = ()) -> None:
    """seen: of any tensors of the model, by their names in the checkpoint; in_four_bits: those that are packed so.

    Raises WrongShape, and MissingTensors for a tensor that the config has no place for: without it, the model would be
    another one.
    """
    of_layers, of_others = layer_shapes(model), outer_shapes(model)
    for name, shape in seen.items():
        found = LAYER_NAME.match(name)
        in_layer = found is not None and int(found[1]) < model.num_layers
        expected = of_layers.get(name[found.end() :]) if found and in_layer else of_others.get(name)
        if expected is None:
            raise MissingTensors(f"the config has no place for {name} {list(shape)}")
        if name in in_four_bits:
            expected = _packed(name, shape, expected)
        if shape != expected:
            raise WrongShape(name, shape, expected)


def _packed(name: str, seen: tuple[int, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
    if len(shape) != 2:
        raise MissingTensors(f"{name} {list(seen)} is in four bits, which matrices alone are")
    return packed_shape(*shape)


def layer_shapes(model: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Of one layer, by name without `model.layers.N.`: float or int8 matrices, the scales of int8 ones, biases, norms."""
    return _with_scales(llama_shaped.layer_shapes(model))


def outer_shapes(model: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Of what is no layer's, by whole name."""
    return _with_scales(llama_shaped.outer_shapes(model))


def _with_scales(shapes: Shapes) -> dict[str, tuple[int, ...]]:
    scales = {f"{name}_scale": shape[:1] for name, shape in shapes.items() if len(shape) == 2}
    return {**shapes, **scales}
