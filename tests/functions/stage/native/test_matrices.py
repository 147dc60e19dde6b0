"""One matrix in C against numpy, in every dtype, size and level: exact results are equal, others near."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Final

import numpy as np
import pytest

from functions.stage.native.layers import MatrixArrays, NativeLinear, NativeThreads
from functions.stage.native.library import library
from functions.stage.native.records import Array, Dtype
from storage.models import q4
from storage.models.blocks import FORMATS, pack
from tests.support.storage.random_blocks import random_blocks

LEVELS: Final = library().levels
SIZES: Final = ((32, 4), (64, 7), (100, 1), (1, 3), (33, 66), (576, 130))
"""Width and outputs: whole steps and tiles, and incomplete ones."""
ROWS: Final = (1, 2, 3, 4, 5, 70, 200)


@pytest.fixture(params=LEVELS, autouse=True)
def _level(request: pytest.FixtureRequest) -> Iterator[None]:
    before = library().level
    library().use_level(request.param)
    yield
    library().use_level(before)


def random(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def bf16(numbers: Array) -> Array:
    """To the nearest, ties to even, as bits."""
    bits = numbers.view(np.int32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.int16)


def floats(bits: Array) -> Array:
    return (bits.astype(np.int32) << 16).view(np.float32)


def product(matrix: MatrixArrays, x: Array, threads: int = 2) -> Array:
    return NativeLinear(library(), NativeThreads(library()), matrix)(x, threads)


@pytest.mark.parametrize(("width", "outs"), SIZES)
def test_float32(width: int, outs: int) -> None:
    for rows in ROWS:
        weights, biases, x = random(outs, width), random(outs, seed=1), random(rows, width, seed=2)
        found = product(MatrixArrays(Dtype.F32, weights, biases=biases), x)
        exact = x.astype(np.float64) @ weights.astype(np.float64).T + biases
        bound = (np.abs(x) @ np.abs(weights).T + np.abs(biases)) * 2.0**-21
        assert (np.abs(found - exact) <= bound).all()


@pytest.mark.parametrize(("width", "outs"), SIZES)
def test_bfloat16_rounds_its_rows_and_nothing_else(width: int, outs: int) -> None:
    for rows in ROWS:
        weights, x = bf16(random(outs, width)), random(rows, width, seed=2)
        found = product(MatrixArrays(Dtype.BF16, weights), x)
        rounded, of_weights = floats(bf16(x)).astype(np.float64), floats(weights).astype(np.float64)
        bound = np.abs(rounded) @ np.abs(of_weights).T * 2.0**-20
        assert (np.abs(found - rounded @ of_weights.T) <= bound).all()


@pytest.mark.parametrize(("width", "outs"), SIZES)
def test_int8_is_the_exact_sum_of_whole_numbers_times_two_scales(width: int, outs: int) -> None:
    for rows in ROWS:
        weights = np.random.default_rng(0).integers(-127, 128, (outs, width)).astype(np.int8)
        scales, biases = np.abs(random(outs, seed=1)) + 0.1, random(outs, seed=3)
        x = random(rows, width, seed=2) * np.logspace(-20, 20, rows, dtype=np.float32)[:, None]
        found = product(MatrixArrays(Dtype.INT8, weights, scales, biases), x)
        largest = np.abs(x).max(1, keepdims=True)
        steps = np.rint(x * (np.float32(32767) / largest)).astype(np.float64)
        exact = steps @ weights.astype(np.float64).T * (largest / 32767) * scales + biases
        # Sums of single lanes are rounded to float32 before they are added up.
        bound = (np.abs(steps) @ np.abs(weights.astype(np.float64)).T * (largest / 32767) * scales + np.abs(biases)) * 2.0**-20
        assert (np.abs(found - exact) <= bound).all()


@pytest.mark.parametrize(("width", "outs"), SIZES)
def test_q4_is_its_weights_times_rows_of_twelve_bits(width: int, outs: int) -> None:
    for rows in ROWS:
        matrix, weights = q4_matrix(outs, width)
        x = random(rows, width, seed=2) * np.logspace(-20, 20, rows, dtype=np.float32)[:, None]
        biases = random(outs, seed=3)
        found = product(replace(matrix, biases=biases), x)
        rounded = in_twelve_bits(x).astype(np.float64)
        exact = rounded @ weights.T + biases
        bound = (np.abs(rounded) @ (np.abs(weights) + 2).T + np.abs(biases)) * 2.0**-20
        assert (np.abs(found - exact) <= bound).all()


def test_q4_has_the_same_bits_on_every_level_that_fuses_products_and_sums() -> None:
    matrix, _ = q4_matrix(130, 576)
    x = random(70, 576, seed=2)
    found = product(matrix, x)
    if library().level != "portable":
        library().use_level("avx2")
        assert np.array_equal(product(matrix, x), found)


def in_twelve_bits(x: Array) -> Array:
    """Blocks of 32 numbers, each of 2047 steps to either side of zero."""
    blocks = np.pad(x, ((0, 0), (0, -x.shape[1] % 32))).reshape(len(x), -1, 32)
    largest = np.abs(blocks).max(2, keepdims=True).clip(np.float32(1e-30))
    steps = np.rint(blocks * (np.float32(2047) / largest)) * (largest / np.float32(2047))
    return steps.reshape(len(x), -1)[:, : x.shape[1]]


def q4_matrix(outs: int, width: int) -> tuple[MatrixArrays, Array]:
    """A matrix in four bits, and its weights in float64. Scales and minima are of every size that float16 has."""
    draw = np.random.default_rng(0)
    quants = draw.integers(0, 16, (outs, width)).astype(np.uint8)
    scales, minima = (draw.standard_normal((outs, -(-width // 32))) * 2.0 ** draw.integers(-22, 1) for _ in range(2))
    scales[0], minima[-1] = 6e-8, -6e-5  # not normal
    packed = q4.pack(quants, scales, minima)
    return MatrixArrays(Dtype.Q4, packed, packed_shape=(outs, width)), q4.dequantize(packed, outs, width).astype(np.float64)


def matrix_of(dtype: Dtype, outs: int, width: int) -> MatrixArrays:
    if dtype is Dtype.Q4:
        return q4_matrix(outs, width)[0]
    if dtype in (Dtype.BLOCKS, Dtype.FLOAT_BLOCKS):
        name = "Q5_1" if dtype is Dtype.BLOCKS else "E4M3_32"
        weights = pack(FORMATS[name], random_blocks(name, outs, width))
        return MatrixArrays(dtype, weights, packed_shape=(outs, width), parts=[(name, outs)])
    numbers = random(outs, width)
    weights = {Dtype.F32: numbers, Dtype.BF16: bf16(numbers), Dtype.INT8: (numbers * 40).astype(np.int8)}[dtype]
    return MatrixArrays(dtype, weights, np.abs(random(outs, seed=1)) if dtype is Dtype.INT8 else None)


@pytest.mark.parametrize("dtype", Dtype)
def test_a_rows_bits_do_not_depend_on_other_rows_or_threads(dtype: Dtype) -> None:
    matrix = matrix_of(dtype, 70, 96)
    x = random(200, 96, seed=2)
    alone = np.concatenate([product(matrix, x[row : row + 1], 1) for row in range(200)])
    for threads in (1, 2, 5):
        assert np.array_equal(product(matrix, x, threads), alone)
        assert np.array_equal(product(matrix, x[3:69].copy(), threads), alone[3:69])


@pytest.mark.parametrize("dtype", Dtype)
def test_numbers_that_are_not_finite_stay_in_their_row_and_zeros_give_zeros(dtype: Dtype) -> None:
    matrix = matrix_of(dtype, 9, 64)
    x = random(6, 64, seed=2)
    good = product(matrix, x)
    x[1, 5], x[2, 63], x[4] = np.inf, np.nan, 0
    x[5] = np.full(64, -1, np.int32).view(np.float32)  # a NaN with all bits set
    found = product(matrix, x)
    assert np.array_equal(found[[0, 3]], good[[0, 3]])
    assert not np.isfinite(found[[1, 2, 5]]).any()
    assert (found[4] == 0).all()


def test_zero_rows_give_an_empty_result() -> None:
    assert product(MatrixArrays(Dtype.F32, random(3, 32)), random(0, 32)).shape == (0, 3)
