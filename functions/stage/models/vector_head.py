"""Turns the final hidden states of a text into a vector or a score, in float32 with numpy."""

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
    """Computes a vector after the last layer: pools hidden states, then applies the dense layers of an embedder.

    The matrix of a classifier comes last. A model that generates tokens has no such layers; its hidden states are only pooled.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        """Reads from a config.json which layers the head has. Their weights come later, with `place`."""
        self.embedder = embedder_in(config)
        self._tensors: dict[str, Float32] = {}

    def place(self, tensors: MutableMapping[str, RawTensor]) -> None:
        """Removes the tensors of the dense layers from `tensors`, and keeps copies. `tensors` may be any part of the model."""
        for name in self.embedder.tensors & tensors.keys() if self.embedder else ():
            raw = tensors.pop(name)
            # A copy, so that the memory of the whole object can be freed.
            self._tensors[name] = np.array(read_floats(raw.data, raw.dtype)).reshape(raw.shape)

    def finish(self) -> None:
        """Checks that all matrices are here. Raises MissingTensors, which names those that `place` never got."""
        needed = self.embedder.tensors if self.embedder else frozenset()
        if missing := sorted(name for name in needed - self._tensors.keys() if name.endswith(".weight")):
            raise MissingTensors(f"not placed: {', '.join(missing)}")

    def __call__(self, hidden: Array, dtype: HiddenDtype, pooling: Pooling) -> Float32:
        """Returns the vector of a text with hidden states [tokens, hidden_size]. dtype: of `hidden`."""
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
