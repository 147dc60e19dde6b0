"""Blocks keep every bit. For GGUF's formats, the gguf package's dequantization is the oracle."""

from dataclasses import astuple
from typing import Any, Final

import gguf
import numpy as np
import pytest

from functions.stage.native.records import BLOCK_FORMATS
from storage.checkpoints.checkpoint import Blocks
from storage.models.blocks import FORMATS, floats_of, pack, packed_rows, packed_shape, single_rows, unpack
from tests.support.storage import llama_cpp
from tests.support.storage.random_blocks import IN_FILES, packed, random_blocks, random_rows

OUTS: Final = 37
WIDTH: Final = 768


@pytest.mark.parametrize("name", IN_FILES)
def test_a_packed_matrix_has_the_weights_that_gguf_dequantizes(name: str) -> None:
    form, raw = FORMATS[name], random_rows(name, OUTS, WIDTH)
    matrix = packed(name, raw)
    assert matrix.shape == packed_shape(form, OUTS, WIDTH)
    wanted = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[name])
    found = floats_of(form, unpack(form, matrix, OUTS))
    assert found.dtype == wanted.dtype == np.float32
    assert np.array_equal(found + 0, wanted + 0), "+ 0: a zero has no sign"
    assert matrix.nbytes <= 1.1 * len(raw[0]) * matrix.shape[0] * 16


@pytest.mark.llamacpp
@pytest.mark.parametrize("name", IN_FILES)
def test_blocks_that_llama_cpp_made_have_the_weights_that_it_makes_of_them(name: str) -> None:
    form, weights = FORMATS[name], np.random.default_rng(3).standard_normal((OUTS, WIDTH), np.float32)
    raw, wanted = llama_cpp.quantized(weights, gguf.GGMLQuantizationType[name])
    found = floats_of(form, unpack(form, packed(name, raw), OUTS))
    assert np.array_equal(found + 0, wanted + 0)
    assert np.array_equal(wanted + 0, gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[name]) + 0)
    assert np.abs(found - weights).mean() < (0.3 if form.low == 2 else 0.1), "they are the weights, rounded"


@pytest.mark.parametrize("name", FORMATS)
def test_selected_rows_and_pieces_are_packed_as_the_whole_matrix_is(name: str) -> None:
    form, blocks = FORMATS[name], random_blocks(name, OUTS, WIDTH)
    whole = pack(form, blocks)
    rows = np.random.default_rng(1).permutation(OUTS)[:21]
    assert np.array_equal(packed_rows(form, whole, rows), pack(form, some(blocks, rows)))
    pieces = [pack(form, some(blocks, slice(first, first + 16))) for first in (0, 16, 32)]
    assert np.array_equal(np.concatenate(pieces), whole)
    for numbers, found in zip(astuple(blocks), astuple(unpack(form, whole, OUTS)), strict=True):
        assert (numbers is found is None) or np.array_equal(numbers, found)
    alone = unpack(form, single_rows(form, whole, rows), len(rows), lanes=1)
    assert np.array_equal(floats_of(form, alone), floats_of(form, some(blocks, rows)))


def some(blocks: Blocks, rows: Any) -> Blocks:
    """A selection of rows."""
    return Blocks(*(None if numbers is None else numbers[rows] for numbers in astuple(blocks)))


def test_c_numbers_the_formats_in_the_same_order() -> None:
    assert tuple(FORMATS) == BLOCK_FORMATS
