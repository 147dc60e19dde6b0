"""Matrices in blocks: each level in C against the same arithmetic in numpy, to the bit if activations are integers."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Final

import numpy as np
import pytest

from functions.stage.native.layers import MatrixArrays
from functions.stage.native.library import NativeError, library
from functions.stage.native.records import Array, Dtype
from storage.checkpoints.checkpoint import Blocks
from storage.models.blocks import FORMATS, floats_of, pack
from tests.functions.stage.native.test_matrices import bf16, product, random
from tests.functions.stage.native.test_matrices import floats as floats_of_bf16
from tests.support.storage.random_blocks import random_blocks

WIDTH: Final = 512
OUTS: Final = 37
FLOAT8: Final = [name for name, form in FORMATS.items() if form.floats]


@pytest.fixture(params=library().levels, autouse=True)
def _level(request: pytest.FixtureRequest) -> Iterator[None]:
    before = library().level
    library().use_level(request.param)
    yield
    library().use_level(before)


def matrix_of(*parts: tuple[str, int]) -> MatrixArrays:
    """A matrix of random blocks, with parts (format, outputs)."""
    weights = [pack(FORMATS[name], random_blocks(name, outs, WIDTH)).reshape(-1) for name, outs in parts]
    outs = sum(count for _, count in parts)
    dtype = Dtype.FLOAT_BLOCKS if FORMATS[parts[0][0]].floats else Dtype.BLOCKS
    return MatrixArrays(dtype, np.concatenate(weights), packed_shape=(outs, WIDTH), parts=parts)


def blocks_of(name: str) -> Blocks:
    return random_blocks(name, OUTS, WIDTH)


def eight_bits(x: Array) -> tuple[Array, Array]:
    """Integers [rows, blocks, 32] and scales [rows, blocks]: 127 steps to either side of zero."""
    blocks = x.reshape(len(x), -1, 32)
    largest = np.abs(blocks).max(2).clip(np.float32(1e-30))
    return np.rint(blocks * (np.float32(127) / largest)[..., None]), largest / np.float32(127)


def fused(a: Array, b: Array, c: Array) -> Array:
    """a * b + c, rounded once."""
    wide = a.astype(np.longdouble) * b.astype(np.longdouble) + c.astype(np.longdouble)
    return wide.astype(np.float32)


def reference(name: str, x: Array) -> Array:
    """x Wᵀ: exact sums of integers for each block or half of it, scaled and added up from the first to the last."""
    form, blocks = FORMATS[name], blocks_of(name)
    numbers, scales = eight_bits(x)
    halves = max(1, form.factors)
    values = blocks.codes.astype(np.int64) - (128 if name.startswith("INT8") else form.offset)
    if form.table is not None:
        values = np.array(form.table)[blocks.codes]
    of_weights = np.repeat(floats(blocks.scales), form.blocks, 1)
    minima = None if blocks.minima is None else np.repeat(floats(blocks.minima), form.blocks, 1)
    if blocks.zeros is not None:
        minima = of_weights * np.repeat((128 if form.low == 8 else 0) - blocks.zeros.astype(np.float32), form.blocks, 1)
    total = np.zeros((len(x), OUTS), np.float32)
    multiply_add = (lambda a, b, c: a * b + c) if library().level == "portable" else fused
    for block in range(WIDTH // 32):
        for half in range(halves):
            span = slice(half * 32 // halves, (half + 1) * 32 // halves)
            row = numbers[:, block, span]
            products = (row @ values.reshape(OUTS, -1, 32)[:, block, span].T).astype(np.float32)
            scale = of_weights[:, block] * (1 if blocks.factors is None else blocks.factors[:, block, half].astype(np.float32))
            total = multiply_add(products * scales[:, block, None], scale[None], total)
            if minima is not None:
                factors = blocks.minimum_factors
                minimum = minima[:, block] * (1 if factors is None else factors[:, block, half].astype(np.float32))
                row_sum = scales[:, block] * row.sum(1).astype(np.float32)
                total = multiply_add(row_sum[:, None], minimum[None], total)
    return total


def floats(numbers: Array) -> Array:
    if numbers.dtype == np.uint8:
        return np.ldexp(np.float32(1), numbers.astype(int) - 128)
    return numbers.astype(np.float32)


@pytest.mark.parametrize("rows", [1, 2, 5, 150])
@pytest.mark.parametrize("name", [name for name, form in FORMATS.items() if not form.floats])
def test_a_product_has_the_bits_of_the_same_arithmetic_in_numpy(name: str, rows: int) -> None:
    x = random(rows, WIDTH, seed=2) * np.logspace(-10, 10, rows, dtype=np.float32)[:, None]
    assert np.array_equal(product(matrix_of((name, OUTS)), x), reference(name, x))


@pytest.mark.parametrize("name", FORMATS)
def test_a_product_is_near_that_of_the_weights(name: str) -> None:
    """Activations are rounded to at most half a step of 1/127 of the largest number of their block, or to bf16."""
    x, weights = random(9, WIDTH, seed=2), floats_of(FORMATS[name], blocks_of(name)).astype(np.float64)
    steps = np.repeat(eight_bits(x)[1], 32, 1)
    bound = (0.5001 * steps + np.abs(x) * 2.0**-18) @ np.abs(weights).T + 1e-30
    error = np.abs(product(matrix_of((name, OUTS)), x) - x @ weights.T)
    assert (error <= bound).all()
    assert error.max() > bound.max() / 100, "the bound means something"


@pytest.mark.parametrize("rows", [1, 2, 5, 150])
@pytest.mark.parametrize("name", FLOAT8)
def test_float8_multiplies_rows_in_bfloat16_and_rounds_nothing_else(name: str, rows: int) -> None:
    x, weights = random(rows, WIDTH, seed=2), floats_of(FORMATS[name], blocks_of(name)).astype(np.float64)
    rounded = floats_of_bf16(bf16(x)).astype(np.float64)
    bound = np.abs(rounded) @ np.abs(weights).T * 2.0**-20
    assert (np.abs(product(matrix_of((name, OUTS)), x) - rounded @ weights.T) <= bound).all()


@pytest.mark.parametrize("name", FLOAT8)
def test_every_float8_is_exact(name: str) -> None:
    found = product(matrix_of((name, OUTS)), np.eye(WIDTH, dtype=np.float32))
    assert np.array_equal(found.T, floats_of(FORMATS[name], blocks_of(name)))
    assert len(np.unique(blocks_of(name).codes)) == 254, "all bytes that are numbers"


@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("name", ["INT4_64", "E4M3_128"])
def test_columns_may_be_stored_in_another_order(name: str, rows: int) -> None:
    matrix, x = matrix_of((name, OUTS)), random(rows, WIDTH, seed=4)
    order = np.random.default_rng(5).permutation(WIDTH).astype(np.int32)
    ordered = np.ascontiguousarray(x[:, order])
    assert np.array_equal(product(replace(matrix, order=order), x), product(matrix, ordered))
    order[7], ordered[:, 7] = WIDTH, 0
    assert np.array_equal(product(replace(matrix, order=order), x), product(matrix, ordered)), "beyond x there are zeros"


def test_parts_of_a_matrix_have_formats_of_their_own() -> None:
    x = random(7, WIDTH, seed=3)
    parts = (("Q4_K", 48), ("INT8_128", 16), ("Q8_0", 21))
    each = [product(matrix_of(part), x) for part in parts]
    assert np.array_equal(product(matrix_of(*parts), x), np.concatenate(each, axis=1))


@pytest.mark.parametrize(
    ("parts", "width"), [((("Q4_0", 20), ("Q8_0", 16)), WIDTH), ((("Q6_K", 32),), 32), ((("Q8_0", 32),), 40)]
)
def test_incomplete_groups_and_blocks_are_refused(parts: tuple[tuple[str, int], ...], width: int) -> None:
    weights, outs = np.zeros(10**6, np.uint8), sum(count for _, count in parts)
    with pytest.raises(NativeError, match="a number is out of range"):
        product(MatrixArrays(Dtype.BLOCKS, weights, packed_shape=(outs, width), parts=parts), random(1, width))
