"""Matrices in GGUF's block formats: each level in C against the same arithmetic in numpy, to the bit."""

from collections.abc import Iterator
from typing import Final

import numpy as np
import pytest

from functions.stage.native.layers import MatrixArrays
from functions.stage.native.library import NativeError, library
from functions.stage.native.records import Array, Dtype
from storage.models.blocks import FORMATS, Blocks, floats_of, read_blocks
from tests.functions.stage.native.test_matrices import product, random
from tests.support.storage.random_blocks import packed, random_rows

WIDTH: Final = 512
OUTS: Final = 37


@pytest.fixture(params=library().levels, autouse=True)
def _level(request: pytest.FixtureRequest) -> Iterator[None]:
    before = library().level
    library().use_level(request.param)
    yield
    library().use_level(before)


def matrix_of(*parts: tuple[str, int]) -> MatrixArrays:
    """A matrix of random blocks, with parts (format, outputs)."""
    weights = [packed(name, random_rows(name, outs, WIDTH)).reshape(-1) for name, outs in parts]
    outs = sum(count for _, count in parts)
    return MatrixArrays(Dtype.BLOCKS, np.concatenate(weights), packed_shape=(outs, WIDTH), parts=parts)


def blocks_of(name: str) -> Blocks:
    return read_blocks(FORMATS[name], random_rows(name, OUTS, WIDTH))


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
    values = blocks.codes.astype(np.int64) - form.offset
    if form.table is not None:
        values = np.array(form.table)[blocks.codes]
    of_weights = np.repeat(floats(blocks.scales), form.blocks, 1)
    minima = None if blocks.minima is None else np.repeat(floats(blocks.minima), form.blocks, 1)
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
@pytest.mark.parametrize("name", FORMATS)
def test_a_product_has_the_bits_of_the_same_arithmetic_in_numpy(name: str, rows: int) -> None:
    x = random(rows, WIDTH, seed=2) * np.logspace(-10, 10, rows, dtype=np.float32)[:, None]
    assert np.array_equal(product(matrix_of((name, OUTS)), x), reference(name, x))


@pytest.mark.parametrize("name", FORMATS)
def test_a_product_is_near_that_of_the_weights(name: str) -> None:
    """Activations are rounded to at most half a step of 1/127 of the largest number of their block."""
    x, weights = random(9, WIDTH, seed=2), floats_of(FORMATS[name], blocks_of(name)).astype(np.float64)
    steps = np.repeat(eight_bits(x)[1], 32, 1)
    bound = (0.5001 * steps + np.abs(x) * 2.0**-18) @ np.abs(weights).T + 1e-30
    error = np.abs(product(matrix_of((name, OUTS)), x) - x @ weights.T)
    assert (error <= bound).all()
    assert error.max() > bound.max() / 100, "the bound means something"


def test_parts_of_a_matrix_have_formats_of_their_own() -> None:
    x = random(7, WIDTH, seed=3)
    parts = (("Q4_K", 48), ("Q6_K", 16), ("Q8_0", 21))
    each = [product(matrix_of(part), x) for part in parts]
    assert np.array_equal(product(matrix_of(*parts), x), np.concatenate(each, axis=1))


@pytest.mark.parametrize(
    ("parts", "width"), [((("Q4_0", 20), ("Q8_0", 16)), WIDTH), ((("Q6_K", 32),), 32), ((("Q8_0", 32),), 40)]
)
def test_incomplete_groups_and_blocks_are_refused(parts: tuple[tuple[str, int], ...], width: int) -> None:
    weights, outs = np.zeros(10**6, np.uint8), sum(count for _, count in parts)
    with pytest.raises(NativeError, match="a number is out of range"):
        product(MatrixArrays(Dtype.BLOCKS, weights, packed_shape=(outs, width), parts=parts), random(1, width))
