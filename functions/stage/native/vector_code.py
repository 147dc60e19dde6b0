"""What numba cannot say about vectors: dot products by the CPU's own instructions. Everything here is inlined.

A tile multiplies a few rows of weights with a few rows of activations and keeps every partial sum in a register; the
weights that come next are fetched meanwhile, without which one core reads memory at two fifths of its speed (Zen 4). The order
of a sum depends on its length alone, never on how many rows are multiplied together.

int8 weights meet int16 activations (VNNI's vpdpwssd where there is AVX-512), bf16 meets bf16 (vdpbf16ps where there is
AVX512-BF16). Elsewhere the same sums are written in portable vector code.
"""

from typing import Any, Final

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from functions.stage.native import target
from functions.stage.native.emit import F32, FLOATS, I8, I16, I32, INTS, BFloat, broadcast, call, load, number, store
from functions.stage.native.shapes import COLUMNS, LANES, OUTS, ROWS, STEP

_AHEAD_BYTES: Final = 4096
"""How far ahead of the weights in use those that follow are fetched."""


def _even_and_odd(builder: Any, first: Any, second: Any) -> tuple[Any, Any]:
    """Of two vectors one behind the other, the elements with even and with odd numbers."""
    lanes = first.type.count
    picks = ir.VectorType(I32, lanes)
    even = builder.shuffle_vector(first, second, ir.Constant(picks, list(range(0, 2 * lanes, 2))))
    return even, builder.shuffle_vector(first, second, ir.Constant(picks, list(range(1, 2 * lanes, 2))))


class Int8:
    """int8 weights, int16 activations, exact sums in int32. How large an activation may be, `layers` says."""

    weight_bytes: Final = 1
    loaded_weights: Final = ir.VectorType(I8, STEP)
    loaded_rows: Final = ir.VectorType(I16, STEP)
    zero: Final = ir.Constant(INTS, [0] * LANES)

    @staticmethod
    def widen(builder: Any, weights: Any) -> Any:
        return builder.sext(weights, ir.VectorType(I16, STEP))

    @staticmethod
    def multiply_add(builder: Any, total: Any, weights: Any, row: Any) -> Any:
        if target.has_avx512():
            return builder.add(total, call(builder, "llvm.x86.avx512.pmaddw.d.512", INTS, weights, row))
        if target.has_avx2():
            return builder.add(total, _pmadd_of_halves(builder, weights, row))
        wide = ir.VectorType(I32, STEP)
        products = builder.mul(builder.sext(weights, wide), builder.sext(row, wide))
        even, odd = _halves_interleaved(builder, products)
        return builder.add(total, builder.add(even, odd))

    @staticmethod
    def floats(builder: Any, total: Any) -> Any:
        return builder.sitofp(total, FLOATS)


def _pmadd_of_halves(builder: Any, weights: Any, row: Any) -> Any:
    halves = []
    for first in (0, LANES):
        picks = ir.Constant(INTS, list(range(first, first + LANES)))
        parts = [builder.shuffle_vector(whole, ir.Constant(whole.type, ir.Undefined), picks) for whole in (weights, row)]
        halves.append(call(builder, "llvm.x86.avx2.pmadd.wd", ir.VectorType(I32, LANES // 2), *parts))
    return builder.shuffle_vector(*halves, ir.Constant(INTS, list(range(LANES))))


def _halves_interleaved(builder: Any, products: Any) -> tuple[Any, Any]:
    picks = ir.VectorType(I32, LANES)
    undefined = ir.Constant(products.type, ir.Undefined)
    even = builder.shuffle_vector(products, undefined, ir.Constant(picks, list(range(0, STEP, 2))))
    return even, builder.shuffle_vector(products, undefined, ir.Constant(picks, list(range(1, STEP, 2))))


class BFloat16:
    """bf16 weights and activations, sums in float32."""

    weight_bytes: Final = 2
    zero: Final = ir.Constant(FLOATS, [0.0] * LANES)
    loaded_weights: Final = ir.VectorType(I16, STEP)
    loaded_rows: Final = ir.VectorType(I16, STEP)

    @staticmethod
    def widen(builder: Any, weights: Any) -> Any:
        return weights

    @staticmethod
    def multiply_add(builder: Any, total: Any, weights: Any, row: Any) -> Any:
        if target.has_avx512_bf16():
            kind = ir.VectorType(BFloat(), STEP)
            pairs = builder.bitcast(weights, kind), builder.bitcast(row, kind)
            return call(builder, "llvm.x86.avx512bf16.dpbf16ps.512", FLOATS, total, *pairs)
        for a, b in zip(_pairs_of_floats(builder, weights), _pairs_of_floats(builder, row), strict=True):
            total = call(builder, "llvm.fmuladd.v16f32", FLOATS, a, b, total)
        return total

    @staticmethod
    def floats(builder: Any, total: Any) -> Any:
        return total


def _pairs_of_floats(builder: Any, numbers: Any) -> tuple[Any, Any]:
    """The even and the odd ones of 32 bf16 numbers: the upper half of a float's bits is a bf16."""
    bits = builder.bitcast(numbers, INTS)
    even = builder.shl(bits, ir.Constant(INTS, [16] * LANES))
    odd = builder.and_(bits, ir.Constant(INTS, [0xFFFF0000] * LANES))
    return builder.bitcast(even, FLOATS), builder.bitcast(odd, FLOATS)


def tile_of(kind: Any, outs: int, rows: int, fetch: bool) -> Any:
    """(weights, bytes per row of them, activations, bytes per row of them, products, out): out[row * outs + weight row]."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        weights, weights_stride, x, x_stride, products, out = arguments
        totals = [[cgutils.alloca_once_value(builder, kind.zero) for _ in range(rows)] for _ in range(outs)]
        for total in (total for row in totals for total in row):
            builder.store(kind.zero, total)
        weight_rows = [builder.add(weights, builder.mul(weights_stride, number(out_row))) for out_row in range(outs)]
        x_rows = [builder.add(x, builder.mul(x_stride, number(row))) for row in range(rows)]
        with cgutils.for_range_slice(builder, number(0), products, number(STEP)) as (product, _):
            place = builder.mul(product, number(kind.weight_bytes))
            if fetch:
                _fetch(builder, weights, builder.mul(place, number(outs)), outs * STEP * kind.weight_bytes)
            x_place = builder.mul(product, number(2))
            x_values = [load(builder, row, x_place, kind.loaded_rows) for row in x_rows]
            for weight_row, row_totals in zip(weight_rows, totals, strict=True):
                values = kind.widen(builder, load(builder, weight_row, place, kind.loaded_weights))
                for total, x_value in zip(row_totals, x_values, strict=True):
                    builder.store(kind.multiply_add(builder, builder.load(total), values, x_value), total)
        sums = [kind.floats(builder, builder.load(totals[o][r])) for r in range(rows) for o in range(outs)]
        _store_sums(builder, sums, out)
        return context.get_dummy_value()

    @intrinsic
    def tile(typing_context, weights, weights_stride, x, x_stride, products, out):  # type: ignore[no-untyped-def]
        return types.void(*[types.int64] * 6), codegen

    return tile


def _fetch(builder: Any, weights: Any, place: Any, size: int) -> None:
    """The rows of a tile lie one behind the other, so what comes next does too; read once a pass, it need not stay cached."""
    ahead = builder.add(builder.add(weights, number(_AHEAD_BYTES)), place)
    for line in range(0, size, 64):
        address = builder.inttoptr(builder.add(ahead, number(line)), I8.as_pointer())
        read, once, data = (ir.Constant(I32, value) for value in (0, 0, 1))
        call(builder, "llvm.prefetch.p0", ir.VoidType(), address, read, once, data)


def _store_sums(builder: Any, sums: list[Any], out: Any) -> None:
    """Each vector's elements summed up. Neighbours are added pairwise until one vector holds all sums of 16."""
    count = len(sums)
    while len(sums) < LANES:
        sums.append(ir.Constant(FLOATS, [0.0] * LANES))
    while len(sums) > 1:
        sums = [
            builder.fadd(*_even_and_odd(builder, first, second)) for first, second in zip(sums[::2], sums[1::2], strict=True)
        ]
    if count == LANES:
        store(builder, sums[0], out)
        return
    for index in range(count):
        store(builder, builder.extract_element(sums[0], ir.Constant(I32, index)), builder.add(out, number(4 * index)))


def pairs_tile_of(rows: int) -> Any:
    """(columns, bytes per pair, x bf16, bytes per row, pairs, out, bytes per row of it): products of rows with COLUMNS columns.

    columns bf16 [pairs, …, 2] of which COLUMNS are taken, x [rows, 2 * pairs], out float32. A vector holds one pair of every
    column, so that no sum goes across a vector.
    """
    parts = COLUMNS // LANES

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        columns, pair_stride, x, x_stride, pairs, out, out_stride = arguments
        totals = [[cgutils.alloca_once_value(builder, BFloat16.zero) for _ in range(parts)] for _ in range(rows)]
        for total in (total for row in totals for total in row):
            builder.store(BFloat16.zero, total)
        row_at = [builder.add(x, builder.mul(x_stride, number(row))) for row in range(rows)]
        with cgutils.for_range_slice(builder, number(0), pairs, number(1)) as (pair, _):
            place = builder.mul(pair, pair_stride)
            vectors = [
                load(builder, columns, builder.add(place, number(64 * part)), BFloat16.loaded_weights) for part in range(parts)
            ]
            for row, row_totals in zip(row_at, totals, strict=True):
                bits = load(builder, row, builder.mul(pair, number(4)), I32)
                values = builder.bitcast(broadcast(builder, bits, INTS), BFloat16.loaded_rows)
                for vector, total in zip(vectors, row_totals, strict=True):
                    builder.store(BFloat16.multiply_add(builder, builder.load(total), vector, values), total)
        for row, row_totals in enumerate(totals):
            for part, total in enumerate(row_totals):
                address = builder.add(out, builder.add(builder.mul(out_stride, number(row)), number(64 * part)))
                store(builder, builder.load(total), address)
        return context.get_dummy_value()

    @intrinsic
    def pairs_tile(typing_context, columns, pair_stride, x, x_stride, pairs, out, out_stride):  # type: ignore[no-untyped-def]
        return types.void(*[types.int64] * 7), codegen

    return pairs_tile


def weighted_sum_of(heads: int) -> Any:
    """(weights float32 [heads, ...], bytes per head, values bf16 [tokens, ...], bytes per token, tokens, out, bytes per head).

    Sixteen columns of the values: out[head] = Σ over tokens of weight * value.
    """

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        weights, weights_stride, values, values_stride, tokens, out, out_stride = arguments
        zero = ir.Constant(FLOATS, [0.0] * LANES)
        totals = [cgutils.alloca_once_value(builder, zero) for _ in range(heads)]
        for total in totals:
            builder.store(zero, total)
        rows = [builder.add(weights, builder.mul(weights_stride, number(head))) for head in range(heads)]
        with cgutils.for_range_slice(builder, number(0), tokens, number(1)) as (token, _):
            bits = load(builder, values, builder.mul(token, values_stride), ir.VectorType(I16, LANES))
            wide = builder.shl(builder.zext(bits, INTS), ir.Constant(INTS, [16] * LANES))
            value = builder.bitcast(wide, FLOATS)
            for row, total in zip(rows, totals, strict=True):
                weight = load(builder, row, builder.mul(token, number(4)), F32)
                every = broadcast(builder, weight, FLOATS)
                builder.store(call(builder, "llvm.fmuladd.v16f32", FLOATS, value, every, builder.load(total)), total)
        for head, total in enumerate(totals):
            address = builder.add(out, builder.mul(out_stride, number(head)))
            store(builder, builder.load(total), address)
        return context.get_dummy_value()

    @intrinsic
    def weighted_sum(  # type: ignore[no-untyped-def]
        typing_context, weights, weights_stride, values, values_stride, tokens, out, out_stride
    ):
        return types.void(*[types.int64] * 7), codegen

    return weighted_sum


@intrinsic
def scale_tile(typing_context, sums, row_scales, scales, biases):  # type: ignore[no-untyped-def]
    """A tile's sums, in place: times the scales of row (given for each output) and output, plus the output's bias."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        tile_at, row_scales_at, scales_at, biases_at = arguments
        outs = ir.VectorType(F32, OUTS)
        every_row = ir.Constant(INTS, [lane % OUTS for lane in range(LANES)])

        def of_outputs(address: Any) -> Any:
            values = load(builder, address, number(0), outs)
            return builder.shuffle_vector(values, ir.Constant(outs, ir.Undefined), every_row)

        values = builder.fmul(load(builder, tile_at, number(0), FLOATS), load(builder, row_scales_at, number(0), FLOATS))
        values = call(builder, "llvm.fmuladd.v16f32", FLOATS, values, of_outputs(scales_at), of_outputs(biases_at))
        store(builder, values, tile_at)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), codegen


@intrinsic
def store_tile(typing_context, sums, out, stride, rows, add):  # type: ignore[no-untyped-def]
    """The first `rows` rows of a tile to `out`, rows `stride` bytes apart, where `add` on top of what is there."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        tile_at, out_at, stride, rows, add = arguments
        outs = ir.VectorType(F32, OUTS)
        zero = ir.Constant(outs, [0.0] * OUTS)
        for row in range(ROWS):
            with builder.if_then(builder.icmp_signed("<", number(row), rows), likely=True):
                address = builder.add(out_at, builder.mul(stride, number(row)))
                values = load(builder, tile_at, number(4 * OUTS * row), outs)
                held = cgutils.alloca_once_value(builder, zero)
                builder.store(zero, held)
                with builder.if_then(builder.icmp_signed("!=", add, number(0))):
                    builder.store(load(builder, address, number(0), outs), held)
                total = builder.fadd(values, builder.load(held))
                store(builder, total, address)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5), codegen
