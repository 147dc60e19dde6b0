"""Matrices in blocks, without loss: the layout that published models of dtype `kept` have and kernels read.

A row is cut into blocks of 32 weights, and weight = scale * value + minimum. A value is a code minus the format's offset or a
zero point, the code's entry in a table, or the code itself as float8. Scale, minimum and zero point belong to a super, which is
1 to 8 blocks. In GGUF's supers of 8 blocks, scale and minimum are multiplied by an integer for each block or half of it.
`FORMATS` says which format has what.

A matrix [outs, width] is stored as `X.weight`, U8 [groups, supers, bytes], and `X.weight_format`, U8 [...], which is JSON: the
name of the format, and [outs, width]. If columns that share a scale are not neighbours, they are stored in another order, and
`X.weight_order`, I32 [width], has the number of each. A group is 16 rows of outputs, one for each 32-bit lane of a vector. The
bytes of a super:

    for each block  [low, 16, 4]    lower bits of the codes, in planes
                    [high, 16, 4]   upper bits of the codes, in planes
                    [factors, 16]   integers for the scales, then for the minima, int8; both in one byte if they have four bits
    [16]            scales, float16 or float32; if they are powers of two, one byte with the exponent
    [16]            minima, float16, or zero points, one byte

A block has 8 parts of 4 neighbouring weights. Byte [plane, row, i] has bits of weight i of as many parts as fit, those of the
first part lowest. Padding rows are zero bits. functions/stage/native/c/blocks.inc.h and float_blocks.inc.h read this layout.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from storage.checkpoints.checkpoint import Blocks
from storage.checkpoints.packed_matrix import E4M3
from storage.floats import Floats

BLOCK: Final = 32  # weights of a row
GROUP: Final = 16  # rows that are stored together
_PARTS: Final = 8  # of a block
_SCALES: Final = {1: np.uint8, 2: np.float16, 4: np.float32}  # by their bytes

Array = NDArray[Any]


@dataclass(frozen=True, slots=True)
class BlockFormat:
    """Says how blocks of one kind store weights: bits of a code, scales and minima, and the layout of the file's blocks."""

    name: str
    low: int  # bits of a code in the lower planes: 2, 4 or 8
    high: int = 0  # bits of a code in the upper planes: 0, 1 or 2
    offset: int = 0
    table: tuple[int, ...] | None = None
    minimum: bool = False
    zero: bool = False  # codes have zero points
    floats: bool = False  # codes are float8 (E4M3)
    factors: int = 0  # integers for the scales of a block: 0, 1, or 2 for halves of 16 weights
    blocks: int = 1  # of a super
    scale_bytes: int = 2

    # If GGUF files have the format (ggml-common.h and ggml-quants.c of llama.cpp): bytes of a block or super there, and what
    # splits some of them, uint8 [n, file_bytes], each taken as a row.
    file_bytes: int = 0
    split: Callable[[Array], Blocks] | None = None

    @property
    def planes(self) -> list[tuple[int, int]]:
        """The planes into which the bits of a code are split: (lowest bit, number of bits) of each."""
        return [(0, self.low), (self.low, self.high)] if self.high else [(0, self.low)]

    @property
    def lanes(self) -> list[tuple[int, int]]:
        """The vectors that make up a super, in order: (bytes of each of the 16 lanes, number of successive such vectors)."""
        integers = 2 if self.factors and self.minimum else self.factors
        parts = [(4, self.low + self.high), (1, integers)] * self.blocks
        parts += [(self.scale_bytes, 1), (2, int(self.minimum)), (1, int(self.zero))]
        return [(size, count) for size, count in parts if count]

    @property
    def super_bytes(self) -> int:
        """Bytes that one super takes for all 16 rows of a group."""
        return sum(GROUP * size * count for size, count in self.lanes)


@dataclass(frozen=True, slots=True)
class Packing:
    """The content of a matrix's `X.weight_format`: the name of its format, and its shape before packing."""

    format: str
    shape: tuple[int, int]  # [outs, width]


def packed_shape(form: BlockFormat, outs: int, width: int) -> tuple[int, int, int]:
    """The shape [groups, supers, bytes] of a packed matrix [outs, width]. A row must have whole supers."""
    return -(-outs // GROUP), width // (BLOCK * form.blocks), form.super_bytes


def read_blocks(form: BlockFormat, rows: Array) -> Blocks:
    """Splits rows as a GGUF file has them, uint8 [rows, bytes of a row]. The format must be one that GGUF files have."""
    assert form.split is not None
    count = len(rows)
    found = form.split(rows.reshape(-1, form.file_bytes))

    def in_rows(numbers: Array | None, *shape: int) -> Any:
        return None if numbers is None else numbers.reshape(count, *shape)

    return Blocks(
        in_rows(found.codes, -1),
        in_rows(found.scales, -1),
        in_rows(found.minima, -1),
        in_rows(found.factors, -1, form.factors),
        in_rows(found.minimum_factors, -1, form.factors),
    )


def pack(form: BlockFormat, blocks: Blocks) -> Array:
    """Packs rows into the bytes that are published, U8 of `packed_shape`.

    Pieces of a matrix may be packed separately and concatenated, if all but the last have whole groups.
    """
    outs, width = blocks.codes.shape
    groups, supers, super_bytes = packed_shape(form, outs, width)
    packed = np.empty((groups, supers, super_bytes), np.uint8)
    ends_at = super_bytes - GROUP * (form.scale_bytes + 2 * form.minimum + form.zero)
    of_blocks = packed[..., :ends_at].reshape(groups, supers, form.blocks, -1)  # a view

    def lanes(numbers: Array, *shape: int) -> Array:
        """Numbers [outs, supers, *shape] as bytes [groups, supers, *shape[:-1], shape[-1] * 16 * bytes of a number]."""
        if outs % GROUP:
            numbers = np.concatenate([numbers.reshape(outs, -1), np.zeros((-outs % GROUP, numbers[0].size), numbers.dtype)])
        turned = np.moveaxis(numbers.reshape(groups, GROUP, supers, *shape), 1, -1)
        return np.ascontiguousarray(turned).view(np.uint8).reshape(groups, supers, *shape[:-1], -1)

    # Planes are made before rows are turned to lanes, since they have fewer bytes than codes.
    parts, start = np.ascontiguousarray(blocks.codes).view(np.uint32), 0  # of four codes
    for shift, bits in form.planes:
        numbers = parts if form.high == 0 else parts >> np.uint32(shift) & _mask(bits)
        places = numbers.reshape(outs, -1, 8 // bits)
        planes = places[..., 0].copy()
        for place in range(1, 8 // bits):
            planes |= places[..., place] << np.uint32(place * bits)
        end = start + 4 * GROUP * bits
        of_blocks[..., start:end] = lanes(planes, form.blocks, bits)
        start = end
    if blocks.factors is not None:
        factors = blocks.factors
        if blocks.minimum_factors is not None:
            minima = blocks.minimum_factors
            factors = factors | minima << 4 if form.factors == 2 else np.concatenate([factors, minima], axis=-1)
        of_blocks[..., start:] = lanes(factors, form.blocks, factors.shape[-1])
    for numbers in (blocks.scales, blocks.minima, blocks.zeros):
        if numbers is not None:
            end = ends_at + GROUP * numbers.itemsize
            packed[..., ends_at:end] = lanes(numbers, 1)
            ends_at = end
    return packed


def unpack(form: BlockFormat, packed: Array, outs: int, lanes: int = GROUP) -> Blocks:
    """Unpacks a matrix: the inverse of `pack`. outs: rows of the matrix; the last group may have fewer than 16.

    lanes: rows of a group; 1 for what `single_rows` returns.
    """
    groups, supers, _ = packed.shape
    shape = (groups, supers, form.blocks)

    def rows(numbers: Array, *shape: int) -> Array:
        """Numbers [groups, supers, ..., lanes] as [outs, *shape]."""
        return np.moveaxis(numbers, -1, 1).reshape(groups * lanes, *shape)[:outs]

    ends_at = form.super_bytes // GROUP * lanes - lanes * (form.scale_bytes + 2 * form.minimum + form.zero)
    of_blocks = packed[..., :ends_at].reshape(*shape, -1)
    codes = np.zeros((*shape, _PARTS, lanes), np.uint32)
    start = 0
    for shift, bits in form.planes:
        end = start + 4 * lanes * bits
        planes = np.ascontiguousarray(of_blocks[..., start:end]).view(np.uint32).reshape(*shape, bits, 1, lanes)
        steps = (np.arange(8 // bits, dtype=np.uint32) * np.uint32(bits))[:, None]  # shifts of the parts in one plane
        codes |= (planes >> steps & _mask(bits)).reshape(codes.shape) << shift
        start = end
    factors = minimum_factors = None
    if form.factors:
        integers = of_blocks[..., start:].reshape(*shape, -1, lanes).view(np.int8)
        both = (integers & 15, integers >> 4 & 15) if form.factors == 2 else (integers[..., :1, :], integers[..., 1:, :])
        factors = rows(both[0] if form.minimum else integers, supers * form.blocks, form.factors)
        minimum_factors = rows(both[1], supers * form.blocks, form.factors) if form.minimum else None
    ends = np.ascontiguousarray(packed[..., ends_at:])
    scales = ends[..., : lanes * form.scale_bytes].view(_SCALES[form.scale_bytes])
    others = ends[..., lanes * form.scale_bytes :]
    return Blocks(
        np.ascontiguousarray(rows(codes, supers * form.blocks * _PARTS)).view(np.uint8),
        rows(scales, supers),
        rows(others.view(np.float16), supers) if form.minimum else None,
        factors,
        minimum_factors,
        rows(others, supers) if form.zero else None,
    )


def _mask(bits: int) -> Any:
    """A mask for the lowest `bits` bits of each of the four bytes of a uint32."""
    return np.uint32(0x01010101 * ((1 << bits) - 1))


def single_rows(form: BlockFormat, packed: Array, rows: Array) -> Array:
    """Selects rows of a packed matrix as groups of one row each, for `unpack`. Reads nothing of other rows."""
    group, lane = np.divmod(rows, GROUP)
    return packed[group[:, None, None], np.arange(packed.shape[1])[:, None], _bytes_of_lanes(form.name)[lane][:, None]]


@cache
def _bytes_of_lanes(name: str) -> Array:
    """For each of the 16 rows of a group, the positions of its bytes in a super: [16, bytes]."""
    positions, start = [], 0
    for size, count in FORMATS[name].lanes:
        end = start + GROUP * size * count
        positions.append(np.moveaxis(np.arange(start, end).reshape(count, GROUP, size), 1, 0).reshape(GROUP, -1))
        start = end
    return np.concatenate(positions, axis=1)


def floats_of(form: BlockFormat, blocks: Blocks) -> Floats:
    """The weights, float32 [rows, width]. They equal, bit by bit, those that the format's own library computes."""
    rows = len(blocks.codes)

    def wide(numbers: Array, factors: Array | None) -> Floats:
        """Expands scales or minima to one for each block or half of a block: [rows, n, 1]."""
        every: Floats = powers_of_two(numbers) if numbers.dtype == np.uint8 else numbers.astype(np.float32)
        if factors is not None:
            every = every[:, :, None] * factors.reshape(rows, every.shape[1], -1).astype(np.float32)
        return every.reshape(rows, -1, 1)

    scales = wide(blocks.scales, blocks.factors)
    if form.floats:
        values = E4M3[blocks.codes]
    elif blocks.zeros is not None:
        values = (blocks.codes.reshape(*blocks.zeros.shape, -1) - blocks.zeros[..., None].astype(np.int16)).astype(np.float32)
    elif form.table is None:
        values = blocks.codes.astype(np.float32) - np.float32(form.offset)
    else:
        values = np.array(form.table, np.float32)[blocks.codes]
    weights: Floats = scales * values.reshape(rows, scales.shape[1], -1)
    if blocks.minima is not None:
        weights += wide(blocks.minima, blocks.minimum_factors)
    return np.ascontiguousarray(weights.reshape(rows, -1))


def powers_of_two(exponents: Array) -> Floats:
    """2^(exponent - 128) of each exponent 0 … 255, float32: half of what the same byte means as e8m0."""
    return np.ldexp(np.float32(1), exponents.astype(np.int32) - 128)


def packed_rows(form: BlockFormat, packed: Array, rows: Array) -> Array:
    """Selects rows of a packed matrix, and returns them packed.

    rows: numbers of the rows, in the order of the result. Each 16 of them form a group. If the last group has fewer, its other
    rows are zero bits.
    """
    supers = packed.shape[1]
    chosen = np.zeros(-(-len(rows) // GROUP) * GROUP, np.int64)
    chosen[: len(rows)] = rows
    group, lane = (index.reshape(-1, GROUP) for index in np.divmod(chosen, GROUP))
    if len(rows) < len(packed):
        needed, group = np.unique(group, return_inverse=True)
        group, packed = group.reshape(-1, GROUP), packed[needed]
    taken = np.empty((len(group), supers, form.super_bytes), np.uint8)
    start = 0
    for size, count in form.lanes:
        end = start + GROUP * size * count
        lanes = np.ascontiguousarray(packed[..., start:end]).view(f"u{size}").reshape(-1, supers, count, GROUP)
        # Advanced indices on both sides of a slice come first: [groups, lanes, supers, count].
        found = lanes[group, :, :, lane].transpose(0, 2, 3, 1)
        found.reshape(-1, supers, count, GROUP)[len(rows) // GROUP :, ..., len(rows) % GROUP or GROUP :] = 0
        taken[..., start:end] = np.ascontiguousarray(found).view(np.uint8).reshape(-1, supers, end - start)
        start = end
    return taken


def _halves(pairs: Array) -> Array:
    """Splits bytes [n, ..., bytes] into 4-bit codes: the lower halves of all bytes, then the upper ones."""
    return _bits(pairs, 4, 2).reshape(*pairs.shape[:-1], -1)


def _bits(planes: Array, bits: int, places: int) -> Array:
    """Splits each byte into codes of `bits` bits: [n, ..., places, bytes]. The number of bytes must be divisible by 4.

    Place i of byte j has the byte's bits from number i * bits on.
    """
    words: Array = np.ascontiguousarray(planes).view(np.uint64 if planes.shape[-1] % 8 == 0 else np.uint32)
    mask = np.frombuffer(bytes([(1 << bits) - 1] * words.itemsize), words.dtype)[0]
    codes = np.empty((*words.shape[:-1], places, words.shape[-1]), words.dtype)
    for place in range(places):
        codes[..., place, :] = np.right_shift(words, words.dtype.type(place * bits)) & mask
    return codes.view(np.uint8)


def _float16(numbers: Array) -> Array:
    return np.ascontiguousarray(numbers).view("<f2")


def _q4(ends: int) -> Callable[[Array], Blocks]:
    def split(blocks: Array) -> Blocks:
        numbers = _float16(blocks[:, : 2 * ends])
        return Blocks(_halves(blocks[:, 2 * ends :]), numbers[:, :1], numbers[:, 1:] if ends > 1 else None)

    return split


def _q5(ends: int) -> Callable[[Array], Blocks]:
    def split(blocks: Array) -> Blocks:
        numbers, rest = _float16(blocks[:, : 2 * ends]), blocks[:, 2 * ends :]
        fifth = np.unpackbits(rest[:, :4], axis=1, bitorder="little")
        return Blocks(_halves(rest[:, 4:]) | fifth << 4, numbers[:, :1], numbers[:, 1:] if ends > 1 else None)

    return split


def _q8_0(blocks: Array) -> Blocks:
    return Blocks(blocks[:, 2:] ^ 128, _float16(blocks[:, :2]))


def _mxfp4(blocks: Array) -> Blocks:
    return Blocks(_halves(blocks[:, 1:]), blocks[:, :1])


def _q2_k(supers: Array) -> Blocks:
    codes = _bits(supers[:, 16:80].reshape(-1, 2, 32), 2, 4)
    ends = _float16(supers[:, 80:])
    integers = supers[:, :16].view(np.int8)
    return Blocks(codes, ends[:, :1], -ends[:, 1:], integers & 15, integers >> 4 & 15)


def _q3_k(supers: Array) -> Blocks:
    third = _bits(supers[:, :32], 1, 8)
    codes = _bits(supers[:, 32:96].reshape(-1, 2, 32), 2, 4).reshape(third.shape) | third << 2
    lower, upper = _halves(supers[:, 96:104]), _bits(supers[:, 104:108], 2, 4).reshape(-1, 16)
    return Blocks(codes, _float16(supers[:, 108:]), factors=(lower | upper << 4).view(np.int8) - 32)


def _k_factors(packed: Array) -> tuple[Array, Array]:
    """Unpacks the 6-bit integers of Q4_K and Q5_K. Returns those for scales and those for minima, int8 [n, 8] each."""
    words = np.ascontiguousarray(packed).view(np.uint32)
    six, four, upper = (np.uint32(0x01010101 * mask) for mask in (63, 15, 48))
    two, shift = np.uint32(2), np.uint32(4)
    factors = np.empty((2, len(words), 2), np.uint32)
    for found, low, both in zip(factors, (words[:, 0], words[:, 1]), (words[:, 2], words[:, 2] >> shift), strict=True):
        found[:, 0], found[:, 1] = low & six, both & four | low >> two & upper
    scales, minima = factors.view(np.int8)
    return scales, minima


def _q4_k(supers: Array) -> Blocks:
    ends = _float16(supers[:, :4])
    codes = _halves(supers[:, 16:].reshape(-1, 4, 32))
    return Blocks(codes, ends[:, :1], -ends[:, 1:], *_k_factors(supers[:, 4:16]))


def _q5_k(supers: Array) -> Blocks:
    ends = _float16(supers[:, :4])
    codes = _halves(supers[:, 48:].reshape(-1, 4, 32)).reshape(-1, 8, 32) | _bits(supers[:, 16:48], 1, 8) << 4
    return Blocks(codes, ends[:, :1], -ends[:, 1:], *_k_factors(supers[:, 4:16]))


def _q6_k(supers: Array) -> Blocks:
    upper = _bits(supers[:, 128:192].reshape(-1, 2, 32), 2, 4)
    codes = _halves(supers[:, :128].reshape(-1, 2, 64)).reshape(upper.shape) | upper << 4
    return Blocks(codes, _float16(supers[:, 208:]), factors=supers[:, 192:208].view(np.int8))


def _iq4_xs(supers: Array) -> Blocks:
    lower = np.stack([supers[:, 4:8] & 15, supers[:, 4:8] >> 4], axis=-1).reshape(-1, 8)
    upper = np.ascontiguousarray(supers[:, 2:4]).view("<u2") >> np.arange(8, dtype=np.uint16) * 2 & 3
    factors = (lower | upper.astype(np.uint8) << 4).view(np.int8) - 32
    return Blocks(_halves(supers[:, 8:].reshape(-1, 8, 16)), _float16(supers[:, :2]), factors=factors)


_IQ4: Final = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
_MXFP4: Final = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)  # twice the values of FP4

FORMATS: Final[Mapping[str, BlockFormat]] = {
    form.name: form
    for form in (
        BlockFormat("Q4_0", 4, offset=8, split=_q4(1), file_bytes=18),
        BlockFormat("Q4_1", 4, minimum=True, split=_q4(2), file_bytes=20),
        BlockFormat("Q5_0", 4, 1, offset=16, split=_q5(1), file_bytes=22),
        BlockFormat("Q5_1", 4, 1, minimum=True, split=_q5(2), file_bytes=24),
        BlockFormat("Q8_0", 8, offset=128, split=_q8_0, file_bytes=34),
        BlockFormat("Q2_K", 2, minimum=True, factors=2, blocks=8, split=_q2_k, file_bytes=84),
        BlockFormat("Q3_K", 2, 1, offset=4, factors=2, blocks=8, split=_q3_k, file_bytes=110),
        BlockFormat("Q4_K", 4, minimum=True, factors=1, blocks=8, split=_q4_k, file_bytes=144),
        BlockFormat("Q5_K", 4, 1, minimum=True, factors=1, blocks=8, split=_q5_k, file_bytes=176),
        BlockFormat("Q6_K", 4, 2, offset=32, factors=2, blocks=8, split=_q6_k, file_bytes=210),
        BlockFormat("IQ4_NL", 4, table=_IQ4, split=_q4(1), file_bytes=18),
        BlockFormat("IQ4_XS", 4, table=_IQ4, factors=1, blocks=8, split=_iq4_xs, file_bytes=136),
        BlockFormat("MXFP4", 4, table=_MXFP4, scale_bytes=1, split=_mxfp4, file_bytes=17),
        *(BlockFormat(f"INT4_{32 * blocks}", 4, zero=True, scale_bytes=4, blocks=blocks) for blocks in (1, 2, 4)),
        *(BlockFormat(f"INT8_{32 * blocks}", 8, zero=True, scale_bytes=4, blocks=blocks) for blocks in (1, 4)),
        *(BlockFormat(f"E4M3_{32 * blocks}", 8, floats=True, scale_bytes=4, blocks=blocks) for blocks in (1, 4)),
    )
}
"""The formats by name, in the order of their numbers in functions/stage/native/c/native.h.

A number after `_` in names such as INT4_32 says how many weights share a scale. These scales are float32.
"""


def packing_of(data: Array | memoryview) -> Packing:
    """Parses the bytes of an `X.weight_format`. Raises ValueError for an unknown format."""
    packing = msgspec.json.decode(bytes(data), type=Packing)
    if packing.format not in FORMATS:
        raise ValueError(f"a matrix is in the unknown block format {packing.format!r}; publish it again with this version")
    return packing
