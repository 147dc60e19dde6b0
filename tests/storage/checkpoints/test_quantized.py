"""Quantized matrices are read as the floats that their own libraries compute.

`tests/data/make_quantized.py` has made the matrices and their values with those libraries.
"""

import tracemalloc
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.checkpoints.checkpoint import BLOCK_BYTES, Blocks
from storage.checkpoints.hugging_face_folder import open_folder
from storage.checkpoints.packed_matrix import read_array, unpack
from storage.checkpoints.safetensors_format import ITEM_BYTES, TensorSpan, read_header, tensor_bytes
from storage.errors import CheckpointInvalid
from storage.floats import FLOATS, as_bytes, read_floats, rounded
from storage.models.blocks import FORMATS, floats_of, pack
from storage.models.blocks import unpack as unpacked_blocks
from tests.storage.test_parsers import few, mutated
from tests.support.paths import ROOT
from tests.support.storage.raw_safetensors import Raw, save_raw

FILE = ROOT / "tests" / "data" / "quantized.safetensors"


@cache
def header() -> tuple[dict[str, TensorSpan], dict[str, str]]:
    return read_header(FILE)


CASES = [name for name in header()[1] if "/" not in name]


def stored(case: str) -> dict[str, Raw]:
    """The tensors of a case as the library has stored them, by their names."""
    data = FILE.read_bytes()
    spans = {name.removeprefix(f"{case}/"): span for name, span in header()[0].items() if name.startswith(f"{case}/")}
    return {name: (span.dtype, span.shape, data[span.start : span.end]) for name, span in spans.items()}


def save_case(folder: Path, case: str, changed: Mapping[str, Raw | None] | None = None, **settings: Any) -> Path:
    """Writes the folder of a checkpoint with one matrix. changed: other tensors; None removes one."""
    tensors = {name: part for name, part in (stored(case) | {"expected": None} | dict(changed or {})).items() if part}
    metadata = {key.removeprefix(f"{case}/"): text for key, text in header()[1].items() if key.startswith(f"{case}/")}
    config = {"model_type": "llama", "quantization_config": msgspec.json.decode(header()[1][case]) | settings}
    (folder / "config.json").write_bytes(msgspec.json.encode(config))
    save_raw(folder / "model.safetensors", tensors, metadata)
    return folder


@pytest.mark.parametrize("case", CASES)
def test_a_matrix_has_the_values_that_its_library_computes(case: str, tmp_path: Path) -> None:
    checkpoint = open_folder(save_case(tmp_path, case))
    assert checkpoint.tensors.keys() == {"m.weight"}, "parts of the packed matrix, or scales of activations, are left"
    matrix, (dtype, shape, data) = checkpoint.tensors["m.weight"], stored(case)["expected"]
    assert (matrix.dtype, matrix.shape) == ("F32", shape)
    whole = read_array(matrix)
    published = as_bytes(rounded(whole.reshape(-1), dtype))  # type: ignore[arg-type]
    assert (read_floats(published, dtype) == read_floats(memoryview(data), dtype)).all()
    pieces = [read_array(matrix, first, last) for first, last in ((0, 1), (1, 4), (4, 21), (21, shape[0]))]
    assert np.concatenate(pieces).tobytes() == whole.tobytes(), "rows depend on what is read with them"
    assert checkpoint.quantization is not None
    assert "quantization_config" not in checkpoint.config
    assert b"quantization_config" not in checkpoint.files["config.json"]


# Of each case, the format of storage/models/blocks.py that keeps it, or a name.
STORED_AS = {
    "awq": "INT4_64", "gptq-4-32": "INT4_32", "gptq-4-act-order": "INT4_64", "gptq-8-128": "INT8_128", "gptq-3-32": "INT4_32",
    "bitsandbytes-nf4-nested-64": "NF4", "bitsandbytes-nf4-256": "NF4", "bitsandbytes-fp4-64": "FP4",
    "bitsandbytes-int8": "INT8_128", "ct-float-tensor": "E4M3_128", "ct-float-channel": "E4M3_128",
    "ct-float-block": "E4M3_32", "ct-int8-channel": "INT8_128", "ct-int8-asymmetric": "INT8_128",
    "ct-pack-4-symmetric": "INT4_32", "ct-pack-4-asymmetric": "INT4_32", "ct-pack-8-symmetric": "INT8_32",
    "ct-pack-3-asymmetric": "INT4_32", "ct-pack-4-channel": "INT4_128", "ct-nvfp4": "NVFP4", "ct-mxfp4": "MXFP4",
    "ct-mxfp8": "E4M3_32", "modelopt-nvfp4": "NVFP4", "modelopt-fp8-tensor": "E4M3_128", "modelopt-fp8-channel": "E4M3_128",
    "torchao-int8": "INT8_128", "torchao-int4": "INT4_32", "torchao-float8": "E4M3_128",
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_codes_and_scales_are_kept(case: str, tmp_path: Path) -> None:
    """Their values have the same bits as those that the library computes, but for the last one of bitsandbytes' int8."""
    matrix = open_folder(save_case(tmp_path, case)).tensors["m.weight"]
    assert matrix.stored_as == STORED_AS[case]
    assert (matrix.read_blocks is not None) == (matrix.stored_as in FORMATS)
    assert (matrix.order is not None) == (case == "gptq-4-act-order")
    for first, last in ((0, matrix.rows), (3, 21)) if matrix.read_blocks else ():
        form, blocks, expected = FORMATS[STORED_AS[case]], matrix.read_blocks(first, last), read_array(matrix, first, last)
        assert isinstance(blocks, Blocks)
        found = floats_of(form, unpacked_blocks(form, pack(form, blocks), last - first))
        expected = expected if matrix.order is None else expected[:, matrix.order]
        if case == "bitsandbytes-int8":
            np.testing.assert_allclose(found, expected, rtol=2.0**-23, atol=0)
        else:
            assert np.array_equal(found, expected)


@pytest.mark.parametrize("case", ["awq", "gptq-4-32", "ct-pack-4-symmetric", "ct-pack-4-asymmetric", "ct-pack-4-channel"])
def test_four_bits_with_zeros_are_kept(case: str, tmp_path: Path) -> None:
    matrix = open_folder(save_case(tmp_path, case)).tensors["m.weight"]
    assert matrix.read_four_bits is not None
    rows = matrix.read_four_bits(3, 20)
    weights = rows.quants * rows.scales.astype(np.float32).repeat(32, 1) + rows.minima.astype(np.float32).repeat(32, 1)
    exact = read_array(matrix, 3, 20)
    # Only a minimum is rounded, to float16, and only if the zero point is no power of two.
    assert np.abs(weights - exact).max() <= 2.0**-11 * np.abs(rows.minima.astype(np.float32)).max()
    if "symmetric" in case.split("-") or case == "gptq-4-32":
        assert weights.tobytes() == exact.tobytes()


def test_four_bits_whose_groups_are_out_of_order_are_floats(tmp_path: Path) -> None:
    assert open_folder(save_case(tmp_path, "gptq-4-act-order")).tensors["m.weight"].read_four_bits is None


@pytest.mark.parametrize("bits", range(1, 9))
def test_integers_of_any_width_are_unpacked(bits: int) -> None:
    numbers = np.random.default_rng(bits).integers(0, 2**bits, (3, 70))
    streams = [sum(int(number) << (bits * place) for place, number in enumerate(row)) for row in numbers]
    words = np.frombuffer(b"".join(stream.to_bytes(32 * bits, "little") for stream in streams), "<i4").reshape(3, -1)
    assert (unpack(words, bits, 70) == numbers).all()


def test_rows_are_dequantized_in_bounded_memory(tmp_path: Path) -> None:
    """A matrix of 32 MB as float32 is read in blocks of 8 MB, with its 4 MB of packed words in memory."""
    inputs, outputs = 2048, 4096
    words = np.random.default_rng(0).integers(-(2**31), 2**31, (inputs, outputs // 8), np.int32)
    parts: dict[str, Raw | None] = {
        "m.qweight": ("I32", words.shape, words.tobytes()),
        "m.qzeros": ("I32", (inputs // 64, outputs // 8), words[: inputs // 64].tobytes()),
        "m.scales": ("F16", (inputs // 64, outputs), bytes(inputs // 64 * outputs * 2)),
    }
    matrix = open_folder(save_case(tmp_path, "awq", parts)).tensors["m.weight"]
    tracemalloc.start()
    count = sum(len(block) for block in matrix.blocks())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 4 * inputs * outputs
    assert peak < 5 * BLOCK_BYTES


UNKNOWN: dict[str, tuple[str, dict[str, Any], str]] = {
    "a method": (
        "awq",
        {"quant_method": "aqlm"},
        "quantized with aqlm; known are awq, bitsandbytes, compressed-tensors, fbgemm",
    ),
    "no method": ("awq", {"quant_method": None}, "an unnamed method; known are awq"),
    "another packing of AWQ": ("awq", {"version": "gemv"}, "AWQ's version 'gemv'; known is 'gemm'"),
    "another format of GPTQ": ("gptq-4-32", {"checkpoint_format": "marlin"}, "'marlin'; known are 'gptq' and 'gptq_v2'"),
    "a format of compressed-tensors": ("ct-pack-4-channel", {"format": "marlin-24"}, "'marlin-24'; known are dense, float-q"),
    "sparse matrices": ("ct-float-tensor", {"sparsity_config": {"format": "sparse-24-bitmask"}}, "'sparse-24-bitmask'; known"),
    "rotations": ("ct-nvfp4", {"transform_config": {"config_groups": {"R1": {}}}}, "rotates activations"),
    "an algorithm of modelopt": ("modelopt-nvfp4", {"quant_algo": "W4A8_AWQ"}, "'W4A8_AWQ'; known are FP8, .*NVFP4"),
    "a method that packs nothing": ("awq", {"quant_method": "mxfp4"}, "no tensor is packed as that does"),
    "settings that make no sense": ("ct-float-tensor", {"config_groups": 3}, "a layout that compressed-tensors does not have"),
}


@pytest.mark.parametrize("thing", UNKNOWN)
def test_unknown_things_are_refused(thing: str, tmp_path: Path) -> None:
    case, settings, words = UNKNOWN[thing]
    with pytest.raises(CheckpointInvalid, match=words):
        open_folder(save_case(tmp_path, case, **settings))


I32 = ("I32", (2, 2), bytes(16))
DAMAGED: dict[str, tuple[str, dict[str, Raw | None], str]] = {
    "AWQ without zeros": ("awq", {"m.qzeros": None}, "lacks 'm.qzeros'. Is a shard missing"),
    "AWQ with other zeros": ("awq", {"m.qzeros": I32}, r"scales \[2, 32\] and zeros \[2, 16\] .*do not fit"),
    "GPTQ with a group too many": ("gptq-4-act-order", {"m.g_idx": ("I32", (128,), b"\2\0\0\0" * 128)}, "groups up to 2"),
    "GPTQ with other inputs": ("gptq-4-32", {"m.g_idx": ("I32", (100,), bytes(400))}, "5 bits for 100 inputs"),
    "float8 as integers": ("modelopt-fp8-channel", {"m.weight": I32}, r"'m.weight' as I32 \[2, 2\]; known"),
    "float8 with other scales": ("modelopt-fp8-tensor", {"m.weight_scale": ("F32", (5,), bytes(20))}, "which do not divide it"),
    "packed rows that are cut": ("ct-pack-4-channel", {"m.weight_packed": ("I32", (31, 16), bytes(1984))}, "do not fit"),
    "NVFP4 with other scales": ("ct-nvfp4", {"m.weight_scale": ("F8_E4M3", (32, 7), bytes(224))}, "do not fit"),
    "nf4 without its state": (
        "bitsandbytes-nf4-256", {"m.weight.quant_state.bitsandbytes__nf4": None}, "no readable quant_state",
    ),
    "nf4 that is cut": ("bitsandbytes-nf4-256", {"m.weight": ("U8", (9, 1), bytes(9))}, "9 bytes for"),
    "int8 of a kind of GPU": ("bitsandbytes-int8", {"m.weight_format": ("U8", (), b"\1")}, "one kind of GPU"),
    "AWQ inside modelopt": ("modelopt-nvfp4", {"m.pre_quant_scale": ("F32", (1,), bytes(4))}, "pre_quant_scale"),
    "torchao with scaled inputs": ("torchao-int8", {"m._weight_act_pre_scale": ("F32", (1,), bytes(4))}, "act_pre_scale"),
    "AWQ with scaled activations": ("awq", {"m.act.scales": ("F16", (4,), bytes(8))}, "'m.act.scales', which belongs to no"),
    "torchao without scales": ("torchao-int8", {"m._weight_scale": None}, "lacks 'm._weight_scale'"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGED)
def test_parts_that_do_not_fit_are_refused(damage: str, tmp_path: Path) -> None:
    case, changed, words = DAMAGED[damage]
    with pytest.raises(CheckpointInvalid, match=words):
        open_folder(save_case(tmp_path, case, changed))


def test_torchao_without_its_metadata_is_refused(tmp_path: Path) -> None:
    save_case(tmp_path, "torchao-float8")
    save_raw(tmp_path / "model.safetensors", {name: part for name, part in stored("torchao-float8").items() if "_" in name})
    with pytest.raises(CheckpointInvalid, match=r"does not describe 'm\.weight' in the metadata"):
        open_folder(tmp_path)


@pytest.mark.parametrize(
    ("case", "file", "settings", "words"),
    [
        ("modelopt-nvfp4", "hf_quant_config.json", {"quantization": {"quant_algo": "NVFP4"}}, "modelopt (NVFP4)"),
        ("gptq-4-act-order", "quantize_config.json", {"bits": 4, "desc_act": True}, "gptq"),
        ("awq", "quant_config.json", {"w_bit": 4, "version": "GEMM"}, "awq"),
    ],
)
def test_settings_may_have_a_file_of_their_own(case: str, file: str, settings: object, words: str, tmp_path: Path) -> None:
    save_case(tmp_path, case)
    (tmp_path / "config.json").write_bytes(msgspec.json.encode({"model_type": "llama"}))
    (tmp_path / file).write_bytes(msgspec.json.encode(settings))
    checkpoint = open_folder(tmp_path)
    assert checkpoint.quantization == words
    assert checkpoint.tensors.keys() == {"m.weight"}


@few
@given(st.data())
def test_random_settings_and_parts_raise_declared_errors_only(tmp_path: Path, data: st.DataObject) -> None:
    """Whatever opens can be read to its last row, so that no publication fails in the middle."""
    case = data.draw(st.sampled_from(CASES))
    names = st.sampled_from(sorted(set(stored(case)) - {"expected"}))
    raw = st.tuples(st.sampled_from(sorted(ITEM_BYTES)), st.lists(st.integers(0, 130), max_size=3)).map(
        lambda drawn: (drawn[0], tuple(drawn[1]), bytes(tensor_bytes(drawn[0], drawn[1])))
    )
    changed = data.draw(st.dictionaries(names, st.none() | raw, max_size=2))
    settings = mutated(msgspec.json.decode(header()[1][case]), data.draw)
    save_case(tmp_path, case, changed)
    config = {"model_type": "llama", "quantization_config": settings}
    (tmp_path / "config.json").write_bytes(msgspec.json.encode(config))
    with suppress(CheckpointInvalid):
        for tensor in open_folder(tmp_path).tensors.values():
            if tensor.dtype in FLOATS:
                for block in tensor.blocks():
                    assert len(block) % 2 == 0
