"""Matrices of quantized checkpoints: codes with scales for groups of columns, read as float32 a few rows at a time.

A weight is (code - zero) * scale in float32. A library that multiplies in float16 or bfloat16 gets the same bits as this
product rounded to that type: codes have few bits, so both round the exact product once.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from storage.checkpoints.checkpoint import Blocks, FourBits, SourceTensor
from storage.floats import FLOATS, as_bytes, read_floats

Array = NDArray[Any]
Rows = Callable[[int, int], Array]  # rows [first, last) of something

_FOUR_BITS_BLOCK: Final = 32  # columns that share a scale in FourBits
_BYTES: Final = np.arange(256)
# Weights that share a scale in the formats of storage/models/blocks.py, by what their names begin with.
_SHARING: Final = {"INT4": (128, 64, 32), "INT8": (128, 32), "E4M3": (128, 32)}


def _e4m3() -> Array:
    """The values of all 256 bytes as float8_e4m3fn, which has no infinity (arXiv 2209.05433, table 1).

    A byte has a sign, 4 bits of exponent with bias 7, and 3 bits of mantissa.
    """
    exponent, mantissa = _BYTES >> 3 & 15, _BYTES & 7
    magnitude = np.where(exponent, np.ldexp(1 + mantissa / 8, exponent - 7), np.ldexp(mantissa / 8, -6))
    magnitude[exponent * 8 + mantissa == 127] = np.nan
    values: Array = np.copysign(magnitude, 127.5 - _BYTES).astype(np.float32)
    return values


E4M3: Final = _e4m3()
"""The float8 value of each byte, float32 [256]."""
# The same by a type's name in safetensors.
_FLOAT8: Final[Mapping[str, Array]] = {
    "F8_E4M3": E4M3,
    "F8_E5M2": (_BYTES.astype(np.uint16) << 8).view(np.float16).astype(np.float32),
    "F8_E8M0": np.append(np.ldexp(np.float32(1), _BYTES[:255] - 127), np.float32(np.nan)),
}
# float4_e2m1fn (OCP Microscaling Formats 1.0, table 5): a sign, 2 bits of exponent, 1 of mantissa.
E2M1: Final = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
_INTEGERS: Final[Mapping[str, str]] = {"I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1", "U8": "u1", "U32": "<u4"}


def read_array(tensor: SourceTensor, first: int = 0, last: int | None = None) -> Array:
    """Reads rows [first, last) of a tensor, all rows by default. Floats become float32, integers keep their type.

    Raises KeyError for any other type.
    """
    last = tensor.rows if last is None else last
    data, shape = tensor.read_rows(first, last), (last - first, *tensor.shape[1:])
    if tensor.dtype in _FLOAT8:
        return _FLOAT8[tensor.dtype].take(np.frombuffer(data, np.uint8), mode="wrap").reshape(shape)
    if tensor.dtype in FLOATS:
        return read_floats(data, tensor.dtype).reshape(shape)
    return np.frombuffer(data, _INTEGERS[tensor.dtype]).reshape(shape)


def powers_of_two(stored: Array) -> Array:
    """2 ^ (e - 127) for each stored exponent e, uint8: E8M0 of OCP Microscaling Formats 1.0 (5.4.1). 255 becomes NaN."""
    powers: Array = _FLOAT8["F8_E8M0"].take(stored, mode="wrap")
    return powers


def unpack(words: Array, bits: int, count: int) -> NDArray[np.uint8]:
    """Reads the first `count` integers of `bits` bits (1 to 8) from each row of `words`, beginning at the lowest bit.

    words: [rows, words], integers of any width. An integer may begin in one word and end in the next.
    """
    data = np.ascontiguousarray(words).view(np.uint8)
    if bits == 4:
        return np.stack([data & 15, data >> 4], axis=-1).reshape(len(data), -1)[:, :count]
    if bits == 8:
        return data[:, :count]
    single = np.unpackbits(data, axis=1, bitorder="little", count=count * bits).reshape(len(data), count, bits)
    integers: NDArray[np.uint8] = single @ (1 << np.arange(bits, dtype=np.uint8))
    return integers


def values_of_halves(data: Array, table: Array, upper_first: bool = False) -> Array:
    """Looks up the two halves of each byte in a table of 16 values.

    data: uint8 [rows, bytes]. Returns float32 [rows, 2 * bytes]. The lower half comes first, or the upper if `upper_first` is
    set.
    """
    halves = [table[_BYTES & 15], table[_BYTES >> 4]]
    pairs = np.stack(halves[::-1] if upper_first else halves, axis=-1, dtype=np.float32)
    # Pairs are looked up as one number of 64 bits each: 20 times as fast as one value at a time.
    values: Array = pairs.view(np.uint64).reshape(-1).take(data, mode="wrap").view(np.float32)
    return values


def float_source(shape: tuple[int, ...], read: Rows, stored_as: str) -> SourceTensor:
    """Makes a float32 tensor whose rows `read` computes. stored_as: the name of the tensor's format in the checkpoint."""

    def read_rows(first: int, last: int) -> memoryview:
        with np.errstate(all="ignore"):  # a checkpoint may have scales that are 0 or infinite
            rows = read(first, last)
        return as_bytes(np.asarray(rows, np.float32))

    return SourceTensor("F32", shape, read_rows, stored_as=stored_as)


@dataclass(frozen=True, slots=True)
class PackedMatrix:
    """A matrix [rows, columns] whose weights have few bits. `source` returns the same matrix as floats.

    codes: reads rows, as numbers [n, columns]. scales, zeros: read float32 [n, groups] for the same rows. If `zeros` is None,
    all zeros are 0. group_of: the group of each column. stored_as: INT4, INT8 or E4M3 if codes plus `offset` are bytes of that
    kind and zeros are integers; otherwise a name for people. e4m3: reads rows of E4M3 bytes. is_q4: whether all codes are
    integers 0 … 15 and every scale is a float16.
    """

    shape: tuple[int, int]
    codes: Rows
    scales: Rows
    group_of: NDArray[np.intp]
    stored_as: str
    zeros: Rows | None = None
    offset: int = 0
    e4m3: Rows | None = None
    is_q4: bool = False

    def source(self, read: Rows | None = None) -> SourceTensor:
        """The matrix as a tensor of floats. It can also be read in blocks or four bits if its groups allow it.

        read: computes rows as the library does. If it is None, weights are (code - zero) * scale.
        """
        tensor = float_source(self.shape, read or self._weights, self.stored_as)
        order = np.argsort(self.group_of, kind="stable")
        in_order, columns = self.group_of[order], self.shape[1]
        for size in _SHARING.get(self.stored_as, ()):
            if columns % size == 0 and (in_order.reshape(-1, size) == in_order[::size, None]).all():
                moved = None if (order == np.arange(columns)).all() else order
                tensor = replace(
                    tensor,
                    stored_as=f"{self.stored_as}_{size}",
                    read_blocks=partial(self._blocks, moved, in_order[::size]),
                    order=None if moved is None else moved.astype(np.int32),
                )
                break
        in_blocks = self.group_of[::_FOUR_BITS_BLOCK].repeat(_FOUR_BITS_BLOCK)[: self.shape[1]]
        if not self.is_q4 or self.zeros is None or (in_blocks != self.group_of).any():
            return tensor
        return replace(tensor, read_four_bits=self._four_bits)

    def _weights(self, first: int, last: int) -> Array:
        weights = np.ascontiguousarray(self.codes(first, last)).astype(np.float32, copy=False)
        scales = self.scales(first, last)
        columns, groups = self.shape[1], scales.shape[1]
        in_groups: Array = weights
        of_group: Any = (slice(None), self.group_of)
        if columns % groups == 0 and (self.group_of == np.arange(columns) // (columns // groups)).all():
            # Broadcasting is 100 times as fast as an index for each column.
            in_groups, of_group = weights.reshape(last - first, groups, -1), (..., None)
        if self.zeros is not None:
            in_groups -= self.zeros(first, last)[of_group]
        in_groups *= scales[of_group]
        return weights

    def _blocks(self, order: NDArray[np.intp] | None, groups: NDArray[np.intp], first: int, last: int) -> Blocks:
        """Reads rows as the stored codes and scales.

        order: numbers of the columns in the order of the result; None if it is the same. groups: the group of each super.
        """
        scales = np.ascontiguousarray(self.scales(first, last)[:, groups], np.float32)
        zeros = None
        if self.e4m3 is not None:
            codes = self.e4m3(first, last)
        else:
            codes = self.codes(first, last).astype(np.uint8) + np.uint8(self.offset)
            zeros = np.full(scales.shape, self.offset, np.uint8)
            if self.zeros is not None:
                zeros = (self.zeros(first, last)[:, groups] + self.offset).astype(np.uint8)
        return Blocks(np.ascontiguousarray(codes if order is None else codes[:, order]), scales, zeros=zeros)

    def _four_bits(self, first: int, last: int) -> FourBits:
        """Reads rows as the stored integers and scales. Their minima, -zero * scale, are rounded to float16."""
        assert self.zeros is not None
        groups = self.group_of[::_FOUR_BITS_BLOCK]
        with np.errstate(all="ignore"):  # the publisher refuses infinite values
            scales = self.scales(first, last)[:, groups]
            minima = (self.zeros(first, last)[:, groups] * -scales).astype(np.float16)
        return FourBits(self.codes(first, last).astype(np.uint8), scales.astype(np.float16), minima)
