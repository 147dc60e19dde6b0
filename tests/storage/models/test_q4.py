"""Four bits: packing is reversible, a lane is a row, GGUF's numbers stay, no close alternative to the rounding is better."""

import numpy as np
import pytest
from gguf import quants
from gguf.constants import GGMLQuantizationType

from storage.floats import Floats
from storage.models.blocks import FORMATS, unpack
from storage.models.q4 import Array, dequantize, pack, packed_rows, packed_shape, quantize

SHAPES = ((16, 32), (32, 96), (1, 1), (5, 40), (33, 64), (576, 1536))


def parts(outs: int, width: int, seed: int = 0) -> tuple[Array, Array, Array]:
    random = np.random.default_rng(seed)
    blocks = -(-width // 32)
    q = random.integers(0, 16, (outs, width)).astype(np.uint8)
    return q, random.random((outs, blocks)).astype(np.float16), random.standard_normal((outs, blocks)).astype(np.float16)


@pytest.mark.parametrize(("outs", "width"), SHAPES)
def test_unpacking_reverses_packing(outs: int, width: int) -> None:
    packed = pack(*parts(outs, width))
    assert packed.shape == packed_shape(outs, width)
    blocks = unpack(FORMATS["Q4_1"], packed, outs)
    for found, given in zip((blocks.codes[:, :width], blocks.scales, blocks.minima), parts(outs, width), strict=True):
        assert np.array_equal(found, given)


def test_bytes_are_where_the_layout_says() -> None:
    q, scales, minima = parts(40, 70)
    packed = pack(q, scales, minima)
    for row, weight in ((0, 0), (17, 4), (39, 69), (21, 37), (38, 31)):
        group, lane, block, place = row // 16, row % 16, weight // 32, weight % 32
        byte = packed[group, block, place // 8 * 64 + lane * 4 + place % 4]
        assert byte >> (4 if place % 8 >= 4 else 0) & 15 == q[row, weight]
        ends = packed[group, block, 256:].view(np.float16)
        assert (ends[lane], ends[16 + lane]) == (scales[row, block], minima[row, block])
    assert not packed[2, :, 256:].view(np.float16).reshape(3, 2, 16)[..., 8:].any()


def test_a_matrix_can_be_packed_in_pieces() -> None:
    q, scales, minima = parts(53, 64)
    pieces = [pack(q[a:b], scales[a:b], minima[a:b]) for a, b in ((0, 16), (16, 48), (48, 53))]
    assert np.array_equal(np.concatenate(pieces), pack(q, scales, minima))


@pytest.mark.parametrize("count", [1, 15, 16, 50])
def test_rows_of_a_packed_matrix(count: int) -> None:
    q, scales, minima = parts(50, 70)
    rows = np.random.default_rng(1).permutation(50)[:count]
    assert np.array_equal(packed_rows(pack(q, scales, minima), rows), pack(q[rows], scales[rows], minima[rows]))


def test_numbers_are_those_of_a_gguf() -> None:
    weights = np.random.default_rng(0).standard_normal((6, 64)).astype(np.float32)
    raw = quants.quantize(weights, GGMLQuantizationType.Q4_1).reshape(6, 2, 20)
    ends = np.ascontiguousarray(raw[..., :4]).view(np.float16)
    q = np.concatenate([raw[..., 4:] & 15, raw[..., 4:] >> 4], axis=-1).reshape(6, 64)
    packed = pack(q, ends[..., 0], ends[..., 1])
    assert np.array_equal(dequantize(packed, 6, 64), quants.dequantize(raw.reshape(6, 40), GGMLQuantizationType.Q4_1))


@pytest.mark.parametrize(
    ("change", "words"),
    [(("q", 16), "hold 0 to 15"), (("scales", np.inf), "scales are beyond float16"), (("minima", -7e4), "minima are beyond")],
)
def test_numbers_without_bits_are_refused(change: tuple[str, float], words: str) -> None:
    numbers = dict(zip(("q", "scales", "minima"), parts(3, 32), strict=True))
    numbers[change[0]] = numbers[change[0]].astype(np.float32 if change[0] != "q" else np.uint8)
    numbers[change[0]].flat[1] = change[1]
    with np.errstate(over="ignore"), pytest.raises(ValueError, match=words):
        pack(*numbers.values())


def test_mismatched_shapes_are_refused() -> None:
    q, scales, minima = parts(3, 64)
    with pytest.raises(ValueError, match=r"scales are \[3, 1\]; a matrix \[3, 64\] has \[3, 2\]"):
        pack(q, scales[:, :1], minima)


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
