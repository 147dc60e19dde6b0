"""Turns the final hidden states of a text into a vector or a score, as its model's publication says. In float32, by numpy."""

from collections.abc import Mapping, MutableMapping
from typing import Any

import numpy as np

from eventing.wire.events import Pooling
from functions.stage.models.floats import Array, Float32, HiddenDtype, widened
from functions.stage.models.layer_group import MissingTensors
from storage.floats import read_floats
from storage.loading.weight_loader import RawTensor
from storage.models.embedder import CLASSIFIER, embedder_in


class VectorHead:
    """What follows the last layer if a row wants a vector: pooling, then the dense layers of an embedder or a classifier.

    A model that generates tokens has none of these layers, and its hidden states are pooled alone.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        """config: a config.json."""
        self.embedder = embedder_in(config)
        self._tensors: dict[str, Float32] = {}

    def place(self, tensors: MutableMapping[str, RawTensor]) -> None:
        """Removes the layers' tensors from `tensors`, which may be any part of the model, and keeps them."""
        for name in self.embedder.tensors & tensors.keys() if self.embedder else ():
            raw = tensors.pop(name)
            # A copy, so that the memory of the whole object can be freed.
            self._tensors[name] = np.array(read_floats(raw.data, raw.dtype)).reshape(raw.shape)

    def finish(self) -> None:
        """Raises MissingTensors, naming the matrices that `place` never got."""
        needed = self.embedder.tensors if self.embedder else frozenset()
        if missing := sorted(name for name in needed - self._tensors.keys() if name.endswith(".weight")):
            raise MissingTensors(f"not placed: {', '.join(missing)}")

    def __call__(self, hidden: Array, dtype: HiddenDtype, pooling: Pooling) -> Float32:
        """The vector of hidden states [tokens, hidden_size]. dtype: of `hidden`."""
        if pooling is Pooling.LAST:
            vector = widened(hidden[-1], dtype)
        else:
            vector = widened(hidden, dtype).mean(axis=0, dtype=np.float64).astype(np.float32)
        if self.embedder is None:
            return vector
        for layer in self.embedder.dense:
            vector = self._tensors[f"{layer.name}.linear.weight"] @ vector
            if (biases := self._tensors.get(f"{layer.name}.linear.bias")) is not None:
                vector += biases
            if layer.activation == "tanh":
                vector = np.tanh(vector)
        return self._tensors[CLASSIFIER] @ vector if self.embedder.classifies else vector
