"""What travels in a Batch ↔ numpy's arrays, as the border of a layer group has them."""

import numpy as np

from eventing.wire.events import Tensor
from functions.stage.models.floats import DTYPES, Array


def token_array(token_ids: memoryview) -> Array:
    """int64 [tokens]: a copy, because embeddings want another width than the wire has."""
    return np.array(token_ids, dtype=np.int64)


def hidden_array(hidden: Tensor) -> Array:
    """The array over the very bytes of the body."""
    return np.frombuffer(hidden.data, DTYPES[hidden.dtype]).reshape(hidden.shape)


def wire_tensor(hidden: Array, dtype: str) -> Tensor:
    """The array's own memory as bytes, without a copy where it is contiguous; [n, hidden_size] with n > 0."""
    return Tensor(dtype, hidden.shape, np.ascontiguousarray(hidden).data.cast("B"))
