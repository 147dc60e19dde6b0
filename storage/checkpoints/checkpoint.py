"""A checkpoint as the publisher sees it, whatever its format on disk: configuration, small files, and tensors read in rows."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from storage.checkpoints.safetensors_format import tensor_bytes

BLOCK_BYTES: Final = 8 * 2**20
"""Tensors are read, converted and sent in blocks of about this size, so that no tensor need fit into memory."""


@dataclass(frozen=True, slots=True)
class SourceTensor:
    """A tensor of a checkpoint. Its rows are the slices of the first dimension; a scalar has one row."""

    dtype: str
    """A safetensors name."""
    shape: tuple[int, ...]
    read_rows: Callable[[int, int], memoryview]
    """Rows [first, last): writable bytes, C order, little endian."""

    @property
    def rows(self) -> int:
        return self.shape[0] if self.shape else 1

    def blocks(self) -> Iterator[memoryview]:
        """All rows in order, in blocks of whole rows of about BLOCK_BYTES."""
        row_bytes = tensor_bytes(self.dtype, self.shape[1:])
        step = max(1, BLOCK_BYTES // max(1, row_bytes))
        for first in range(0, self.rows, step):
            yield self.read_rows(first, min(first + step, self.rows))


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What a publication is made from."""

    config: Mapping[str, Any]
    """config.json as Hugging Face has it."""
    files: Mapping[str, bytes]
    """Small files to publish beside the tensors, config.json included."""
    tensors: Mapping[str, SourceTensor]
