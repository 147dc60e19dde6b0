"""Computes the inputs of layers besides hidden states (`LayerInput` of the model's description), from token ids alone.

Every stage computes the inputs of its own layers, so that only hidden states and token ids pass between stages.
"""

import numpy as np

from functions.stage.models.floats import Array, Float32
from functions.stage.models.native.layer_weights import take_norm
from functions.stage.models.native.weights import NativeWeights, rows_of, with_rows
from functions.stage.native.layers import MatrixArrays, NativeLinear, NativeThreads, NormArrays
from functions.stage.native.library import library
from storage.checkpoints.decoder import Decoder


class LayerInputs:
    """Computes the inputs of layers [first_layer, last_layer) besides hidden states. First call `place` for the weights."""

    def __init__(self, model: Decoder, first_layer: int, last_layer: int) -> None:
        assert model.layer_input is not None
        self._names, self._hidden_size, self._input = model.names, model.hidden_size, model.layer_input
        self._columns = slice(first_layer * self._input.size, last_layer * self._input.size)
        self._num_layers = last_layer - first_layer
        self._embedding: MatrixArrays | None = None
        self._projection: NativeLinear | None = None
        self._norm: NormArrays | None = None

    @property
    def is_placed(self) -> bool:
        return self._embedding is not None and self._projection is not None and self._norm is not None

    def place(self, weights: NativeWeights, threads: NativeThreads) -> None:
        """Removes the weights that the inputs need from `weights`. May be called for parts of the model, in any order.

        threads: C threads that compute the products.
        """
        names = self._names
        if f"{names.layer_embedding}.weight" in weights:
            self._embedding = weights.matrix(names.layer_embedding)
        if f"{names.layer_projection}.weight" in weights:
            rows = np.arange(self._columns.start, self._columns.stop)
            projection = with_rows(weights.matrix(names.layer_projection), rows)
            self._projection = NativeLinear(library(), threads, projection)
        if f"{names.layer_projection_norm}.weight" in weights:
            self._norm = take_norm(names.layer_projection_norm, self._input.norm, weights)

    def __call__(self, token_ids: Array, embedded: Float32, threads: int) -> Float32:
        """Returns the inputs of each layer, float32 [layers, tokens, size]. embedded: scaled embeddings of the tokens."""
        assert self._embedding is not None, "see is_placed"
        assert self._projection is not None
        assert self._norm is not None
        shape = len(token_ids), self._num_layers, self._input.size
        projected = self._projection(embedded, threads) * np.float32(self._hidden_size**-0.5)
        inputs: Float32 = self._norm(projected.reshape(shape), self._input.norm.eps)
        known = np.where(token_ids < self._embedding.shape[0], token_ids, 0)
        inputs += rows_of(self._embedding, known)[:, self._columns].reshape(shape) * np.float32(self._input.size**0.5)
        inputs *= np.float32(2**-0.5)
        return np.ascontiguousarray(inputs.transpose(1, 0, 2))
