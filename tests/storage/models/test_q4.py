"""The layout of four bits: packing is reversible, a lane is a row, and GGUF's numbers are stored unchanged."""

import numpy as np
import pytest
from gguf import quants
from gguf.constants import GGMLQuantizationType

from storage.models.blocks import FORMATS, unpack
from storage.models.q4 import Array, dequantize, pack, packed_rows, packed_shape

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
