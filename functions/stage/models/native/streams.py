"""Models with several streams of hidden states (`Streams` of the description): makes the streams and joins them."""

import numpy as np

from functions.stage.models.floats import Float32
from functions.stage.models.native.weights import NativeWeights
from functions.stage.native.layers import NativeLinear, NativeThreads
from functions.stage.native.library import library
from storage.checkpoints.decoder import Decoder


class StreamMatrices:
    """Splits embeddings into streams before the first layer, and joins the streams after the last layer.

    First call `place` for the matrices.
    """

    def __init__(self, model: Decoder, *, is_first: bool, is_last: bool) -> None:
        """is_first, is_last: whether the group has the first layer of the model (and splits), or the last one (and joins)."""
        assert model.streams is not None
        names = model.names
        self._split, self._join = (
            [name.format(stream=stream) for stream in range(model.streams.count - 1)] for name in (names.split, names.join)
        )
        self._needed = [*(self._split if is_first else ()), *(self._join if is_last else ())]
        self._matrices: dict[str, NativeLinear] = {}

    @property
    def missing(self) -> list[str]:
        """Names of needed tensors that `place` has not got yet."""
        return [f"{name}.weight" for name in self._needed if name not in self._matrices]

    def place(self, weights: NativeWeights, threads: NativeThreads) -> None:
        """Removes the needed matrices from `weights`. threads: C threads that compute the products."""
        for name in self._needed:
            if f"{name}.weight" in weights:
                self._matrices[name] = NativeLinear(library(), threads, weights.matrix(name))

    def split(self, hidden: Float32, threads: int) -> Float32:
        """Splits embeddings [n, hidden_size] into streams, float32 [n, streams * hidden_size]."""
        return np.concatenate(self._scaled(self._split, [hidden] * (len(self._split) + 1), threads), axis=1)

    def join(self, streams: Float32, threads: int) -> Float32:
        """Joins streams [n, streams * hidden_size] into hidden states, float32 [n, hidden_size]: their mean."""
        parts = [np.ascontiguousarray(part) for part in np.split(streams, len(self._join) + 1, axis=1)]
        joined: Float32 = np.mean(self._scaled(self._join, parts, threads), axis=0)
        return joined

    def _scaled(self, names: list[str], parts: list[Float32], threads: int) -> list[Float32]:
        """Multiplies each part but the first by its matrix, and scales the product to the root mean square of the first part.

        Returns the first part, which is unchanged, and the scaled products.
        """
        size = np.sqrt(np.square(parts[0]).mean(axis=-1, keepdims=True))
        found = [parts[0]]
        for name, part in zip(names, parts[1:], strict=True):
            product = self._matrices[name](part, threads)
            squares = np.square(product).mean(axis=-1, keepdims=True)
            found.append(product * size / np.sqrt(np.maximum(squares, np.float32(1e-5))))
        return found
