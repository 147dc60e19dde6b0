"""A checkpoint as the publisher sees it, whatever its format: configuration, small files, and tensors that are read by rows."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from storage.checkpoints.safetensors_format import tensor_bytes

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

BLOCK_BYTES: Final = 8 * 2**20  # about what is read, converted and sent at a time, so that no tensor need fit into memory


@dataclass(frozen=True, slots=True)
class FourBits:
    """Rows of a matrix whose weights have four bits: weight = scale * q + minimum.

    Each block of 32 weights of a row has one scale and one minimum.
    """

    quants: "NDArray[np.uint8]"  # [rows, width], 0 … 15
    scales: "NDArray[np.float16]"  # [rows, blocks]
    minima: "NDArray[np.float16]"  # [rows, blocks]


@dataclass(frozen=True, slots=True)
class Blocks:
    """Rows of a matrix in blocks (`storage/models/blocks.py`), as plain arrays.

    In the shapes, `supers` is the number of groups of weights in a row. Each group has one scale.
    """

    codes: "NDArray[Any]"  # uint8 [rows, width]
    scales: "NDArray[Any]"  # float16 or float32 [rows, supers]; uint8 if they are powers of two: 2^(scale - 128)
    minima: "NDArray[Any] | None" = None  # float16 [rows, supers]
    factors: "NDArray[Any] | None" = None  # int8 [rows, blocks, 1 or 2]: what scales are multiplied by
    minimum_factors: "NDArray[Any] | None" = None  # int8, as many
    zeros: "NDArray[Any] | None" = None  # uint8 [rows, supers]: what is subtracted from codes


@dataclass(frozen=True, slots=True)
class SourceTensor:
    """A tensor of a checkpoint. Its rows are the slices of the first dimension; a scalar has one row."""

    dtype: str  # a safetensors name
    shape: tuple[int, ...]
    read_rows: Callable[[int, int], memoryview]  # rows [first, last): writable bytes, C order, little endian
    quantized: bool = False  # `run` may round it to int8, because the file has it in eight bits or fewer
    read_four_bits: Callable[[int, int], FourBits] | None = None  # the same rows, not dequantized; None: not in four bits
    stored_as: str | None = None  # the name of its format in the file, if that is not dtype
    # The same rows in that format, if it is one of storage/models/blocks.py; bytes are as a GGUF file has them. If rows are
    # experts, the rows of their matrices [outs, width], one expert after another.
    read_blocks: "Callable[[int, int], Blocks | NDArray[np.uint8]] | None" = None
    order: "NDArray[np.int32] | None" = None  # the numbers of the columns in `read_blocks`; None: as in the matrix

    @property
    def rows(self) -> int:
        return self.shape[0] if self.shape else 1

    def blocks(self) -> Iterator[memoryview]:
        """Yields all rows in order, as bytes, in blocks of whole rows with about BLOCK_BYTES each."""
        for first, last in self.row_ranges():
            yield self.read_rows(first, last)

    def row_ranges(self, multiple: int = 1) -> Iterator[tuple[int, int]]:
        """Yields row ranges [first, last) that cover all rows, each of about BLOCK_BYTES.

        The number of rows in a range is divisible by `multiple`, except in the last range.
        """
        row_bytes = tensor_bytes(self.dtype, self.shape[1:])
        step = max(1, BLOCK_BYTES // max(1, row_bytes) // multiple) * multiple
        for first in range(0, self.rows, step):
            yield first, min(first + step, self.rows)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """An opened model that can be published. It looks like a Hugging Face checkpoint, whatever its source format.

    Only config and small files are in memory. A tensor is read from the source when it is used.
    """

    config: Mapping[str, Any]  # config.json as Hugging Face has it
    files: Mapping[str, bytes]  # small files to publish beside the tensors, config.json included
    tensors: Mapping[str, SourceTensor]  # by their Hugging Face names
    quantization: str | None = None  # the method, for people, if the source is quantized and its tensors are read as floats
    left_out: tuple[str, ...] = ()  # for people: what the source has or was made from, and a publication has not
