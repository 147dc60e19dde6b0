"""Rounding to four bits: no close alternative is better, and odd blocks are harmless."""

import numpy as np
import pytest

from storage.floats import Floats
from storage.models.q4 import dequantize, pack, quantize


def rounded(weights: Floats) -> Floats:
    result: Floats = dequantize(pack(*quantize(weights)), *weights.shape)
    return result


def squares(weights: Floats, others: Floats) -> float:
    return float(np.square(weights.astype(np.float64) - others).sum())


@pytest.mark.parametrize("tails", [3, 30])
def test_the_error_is_below_rounding_by_minimum_and_maximum(tails: int) -> None:
    weights = (np.random.default_rng(0).standard_t(tails, (64, 512)) * 0.02).astype(np.float32)
    blocks = weights.reshape(64, 16, 32)
    low, high = blocks.min(-1, keepdims=True), blocks.max(-1, keepdims=True)
    by_ends = np.rint((blocks - low) / (high - low) * 15) / 15 * (high - low) + low
    assert squares(weights, rounded(weights)) < 0.85 * squares(weights, by_ends.reshape(64, 512))


def test_numbers_on_sixteen_steps_are_exact() -> None:
    q = np.random.default_rng(1).integers(0, 16, (8, 64))
    q[:, [0, 32]], q[:, [1, 33]] = 0, 15
    weights = (q * 0.125 - 1.0).astype(np.float32)
    assert np.array_equal(rounded(weights), weights)


def test_close_numbers_far_from_zero_stay_distinct() -> None:
    weights = (1000 + np.random.default_rng(2).integers(0, 16, (4, 32))).astype(np.float32)
    assert np.abs(rounded(weights) - weights).max() <= 0.5, "a float16 of a thousand has steps of a half"


@pytest.mark.parametrize("value", [0.0, -0.75, 1e-12])
def test_a_block_of_equal_numbers_is_exact(value: float) -> None:
    weights = np.full((3, 64), value, np.float32)
    assert np.abs(rounded(weights) - weights).max() <= 1e-7


@pytest.mark.parametrize("width", [1, 31, 40])
def test_a_partial_last_block_is_rounded_like_a_whole_one(width: int) -> None:
    weights = np.random.default_rng(3).standard_normal((5, width)).astype(np.float32)
    spread = np.ptp(weights, axis=1, keepdims=True)
    assert (np.abs(rounded(weights) - weights) <= spread / 15 + 1e-3).all()
