"""The library refuses numbers out of range, shapes that do not fit and memory that is too small, before it touches any."""

import copy
import re
from collections.abc import Callable
from typing import Any, Final

import numpy as np
import pytest

from functions.stage.native import limits, records
from functions.stage.native.compiler import SOURCE
from functions.stage.native.layers import (
    ExpertsArrays,
    LayerArrays,
    MatrixArrays,
    NativeLayers,
    NativeLinear,
    NativeThreads,
    NormArrays,
    SegmentArrays,
)
from functions.stage.native.library import NativeError, library
from functions.stage.native.records import (
    BLOCK_FORMATS,
    Activation,
    Array,
    Dtype,
    MatrixRecord,
    MemoryRecord,
    NormKind,
    memory_of,
)

Segments = list[tuple[list[list[int]], int, int]]
"""Pages of each layer, tokens held, and new ones."""


def sizes() -> records.GroupRecord:
    return records.GroupRecord(
        num_layers=2,
        hidden_size=48,
        inner_size=40,
        heads=4,
        head_dim=10,
        row_numbers=80,
        eps=1e-5,
        num_pages=8,
        page_bytes=2 * 2 * 64 * 16 * 4,
        kv_dtype=Dtype.F32,
        rotations=1,
        kv_rows=2,
    )


def zeros(*shape: int) -> Array:
    return np.zeros(shape, np.float32)


def group(record: records.GroupRecord | None = None) -> NativeLayers:
    layers = NativeLayers(library(), record or sizes(), zeros(8, 2, 2, 64, 16))
    shapes = {"qkv": (80, 48), "out": (48, 40), "gate": (40, 48), "up": (40, 48), "down": (48, 40)}
    for slot in range(2):
        arrays = LayerArrays(
            {name: MatrixArrays(Dtype.F32, zeros(*shape), biases=zeros(shape[0])) for name, shape in shapes.items()},
            {
                "before_attention": NormArrays(NormKind.RMS, zeros(48)),
                "qk": NormArrays(NormKind.LAYER, zeros(6, 10), zeros(6, 10)),
                "before_mlp": NormArrays(NormKind.RMS, zeros(48)),
            },
            {"sinks": zeros(4)},
            {
                "window": 20 * slot,
                "ring": slot,
                "kv_heads": 2,
                "head_dim": 10,
                "kv_row": slot,
                "kv_pages": 1,
                "query_rotation": 1,
                "key_rotation": 1,
                "attention_scale": 1.0,
                "mlp_scale": 1.0,
                "gate_scale": 1.0,
                "output_scale": 1.0,
            },
        )
        layers.place(slot, arrays)
    return layers


def run(
    layers: NativeLayers, segments: list[tuple[list[list[int]], int, int]], threads: int = 2, rows: int | None = None
) -> Array:
    rows = sum(length for _, _, length in segments) if rows is None else rows
    hidden = np.ones((rows, 48), np.float32)
    own = [SegmentArrays(np.array(pages, np.int32), position, length) for pages, position, length in segments]
    layers.run(hidden, np.zeros((rows, 5), np.complex64), own, threads)
    return hidden


ONE: Final = [[0], [1]]
TWO: Final = [[2, 7], [3, -1]]  # the second layer keeps one page


def test_a_correct_call_runs_and_the_number_of_threads_is_capped() -> None:
    assert (run(group(), [(ONE, 0, 16), (TWO, 63, 1), ([[4], [5]], 3, 29)]) == 1).all()
    assert (run(group(), [(TWO, 84, 44)], threads=1000) == 1).all()


@pytest.mark.parametrize(
    ("segments", "call", "why"),
    [
        ([([[8], [1]], 0, 1)], {}, "segment|range"),
        ([([[0], [-1]], 0, 1)], {}, "segment|range"),
        ([([[0]], 0, 1)], {}, "memory"),
        ([([[0, 1, 2], [3, 4, 5], [6, 7, 0]], 0, 1)], {}, "segment|range"),
        ([(ONE, 64, 1)], {}, "segment|range"),
        ([(ONE, 0, 65)], {}, "segment|range"),
        ([(TWO, 83, 45)], {}, "segment|range"),  # would overwrite what its first token attends to
        ([(ONE, -1, 1)], {}, "segment|range"),
        ([(ONE, 0, 0), (TWO, 0, 3)], {}, "segment|range"),
        ([(ONE, 2**62, 1)], {}, "segment|range"),
        ([(ONE, 0, 1), (TWO, 0, 2)], {"rows": 2}, "segments do not cover all rows"),
        ([(ONE, 0, 1), (TWO, 0, 2)], {"rows": 4}, "segments do not cover all rows"),
        ([(ONE, 0, 1)], {"threads": 0}, "out of range"),
        ([(ONE, 0, 1)], {"threads": -1}, "out of range"),
    ],
)
def test_wrong_segments_and_numbers_of_threads_are_refused(segments: Segments, call: dict[str, int], why: str) -> None:
    with pytest.raises(NativeError, match=why):
        run(group(), segments, **call)


@pytest.mark.parametrize("name", ["hidden", "rotations", "segments", "workspace"])
def test_too_little_or_unaligned_memory_is_refused(name: str) -> None:
    layers = group()
    group_record = layers._group
    pages = np.array(ONE, np.int32)
    arrays = {
        "hidden": zeros(3, 48),
        "rotations": zeros(3, 10),
        "segments": np.array([[pages.ctypes.data, pages.nbytes, 0, 3, *[0] * 10]], np.int64),
        "workspace": records.new_workspace(library().bytes_for("lamina_pass_bytes", group_record, 3, 3, 1)),
    }
    memory = {key: memory_of(array) for key, array in arrays.items()}

    def run_with(**changed: MemoryRecord) -> None:
        passed = records.PassRecord(rows=3, threads=1, **(memory | changed))
        library().call("lamina_run_layers", layers.threads.pool, group_record, passed)

    run_with()
    for wrong in (
        MemoryRecord(arrays[name].ctypes.data, arrays[name].nbytes - 1),
        MemoryRecord(None, arrays[name].nbytes),
        MemoryRecord(None, 0),
    ):
        with pytest.raises(NativeError, match=r"memory is absent|segments do not cover"):
            run_with(**{name: wrong})
    shifted = MemoryRecord(arrays[name].ctypes.data + 1, arrays[name].nbytes)
    with pytest.raises(NativeError, match="not a multiple"):
        run_with(**{name: shifted})


WRONG: Final[dict[str, tuple[Callable[[Any], None], str]]] = {
    "no layers": (lambda record: setattr(record, "num_layers", 0), "range"),
    "more layers than memory": (lambda record: setattr(record, "num_layers", 3), "memory"),
    "another hidden size": (lambda record: setattr(record, "hidden_size", 47), "shape"),
    "a smaller inner size": (lambda record: setattr(record, "inner_size", 39), "range"),
    "another head size": (lambda record: setattr(record, "head_dim", 12), "shape|memory"),
    "an odd head size": (lambda record: setattr(record, "head_dim", 9), "range"),
    "a huge head size": (lambda record: setattr(record, "head_dim", 2**40), "range"),
    "rows that keys and values do not fit": (lambda record: setattr(record, "row_numbers", 79), "range"),
    "pages that keys and values do not fit": (lambda record: setattr(record, "page_bytes", 2 * 2 * 64 * 16 * 4 - 4), "range"),
    "pages whose numbers are not aligned": (
        lambda record: (setattr(record, "num_pages", 7), setattr(record, "page_bytes", 2 * 2 * 64 * 16 * 4 + 2)),
        "range",
    ),
    "inputs of layers that the pass lacks": (lambda record: setattr(record, "input_size", 8), "memory"),
    "streams that layers lack": (lambda record: setattr(record, "streams", 2), "range"),
    "a larger arena than memory": (lambda record: setattr(record, "num_pages", 9), "memory"),
    "an arena of no pages": (lambda record: setattr(record, "num_pages", 0), "range"),
    "keys in q4": (lambda record: setattr(record, "kv_dtype", Dtype.Q4), "dtype"),
    "keys in nothing known": (lambda record: setattr(record, "kv_dtype", 17), "dtype"),
    "a negative eps": (lambda record: setattr(record, "eps", -1.0), "range"),
    "an eps that is no number": (lambda record: setattr(record, "eps", float("nan")), "range"),
}


def four_bits(matrix: Any, num_bytes: int, shift: int = 0) -> None:
    matrix.dtype, matrix.weights.bytes = Dtype.Q4, num_bytes
    matrix.weights.data += shift


def in_blocks(matrix: MatrixRecord, number: int, end: int) -> None:
    matrix.dtype, matrix.formats[0] = Dtype.BLOCKS, number
    for part in range(3):
        matrix.ends[part] = end


WRONG_LAYER: Final[dict[str, tuple[Callable[[Any], None], str]]] = {
    "heads that share no key head evenly": (lambda layer: setattr(layer, "kv_heads", 3), "range"),
    "no key heads": (lambda layer: setattr(layer, "kv_heads", 0), "range"),
    "larger heads than the group's": (lambda layer: setattr(layer, "head_dim", 12), "range"),
    "pages that do not divide the heads": (lambda layer: setattr(layer, "kv_pages", 3), "range"),
    "more pages than tables have rows": (lambda layer: setattr(layer, "kv_pages", 2), "range"),
    "keys and values of its own beside another's": (lambda layer: setattr(layer, "reads_kv", 1), "shape"),
    "a gain of values that is missing": (lambda layer: setattr(layer.value, "kind", 1), "memory"),
    "a matrix of another width": (lambda layer: setattr(layer.down, "width", 39), "shape"),
    "a matrix of more outputs": (lambda layer: setattr(layer.out, "outs", 49), "shape"),
    "a matrix of no known dtype": (lambda layer: setattr(layer.qkv, "dtype", len(Dtype)), "dtype"),
    "blocks of no known format": (lambda layer: in_blocks(layer.qkv, len(BLOCK_FORMATS), 80), "dtype"),
    "float8 among integers": (lambda layer: in_blocks(layer.qkv, BLOCK_FORMATS.index("E4M3_32"), 80), "dtype"),
    "blocks that end before the last output": (lambda layer: in_blocks(layer.qkv, 0, 64), "range"),
    "blocks beyond the last output": (lambda layer: in_blocks(layer.qkv, 0, 96), "range"),
    "rows without whole blocks": (lambda layer: in_blocks(layer.qkv, 0, 80), "range"),
    "four bits of too few groups": (lambda layer: four_bits(layer.qkv, 5 * 2 * 320 - 1), "memory"),
    "four bits whose scales lie between two bytes": (lambda layer: four_bits(layer.qkv, 5 * 2 * 320, shift=1), "multiple"),
    "int8 without scales": (lambda layer: setattr(layer.qkv, "dtype", Dtype.INT8), "memory"),
    "gate and up of two dtypes": (lambda layer: setattr(layer.gate, "dtype", Dtype.BF16), "dtype"),
    "weights that are missing": (lambda layer: setattr(layer.up, "weights", MemoryRecord()), "memory"),
    "weights that are short": (lambda layer: setattr(layer.up.weights, "bytes", 40 * 64 * 4 - 4), "memory"),
    "weights between two numbers": (lambda layer: setattr(layer.up.weights, "data", layer.up.weights.data + 2), "multiple"),
    "biases that are short": (lambda layer: setattr(layer.out.biases, "bytes", 4), "memory"),
    "a gain that is missing": (lambda layer: setattr(layer.before_mlp, "gain", MemoryRecord()), "memory"),
    "gains of too few heads": (lambda layer: setattr(layer.qk.gain, "bytes", 5 * 10 * 4), "memory"),
    "biases of a norm that are short": (lambda layer: setattr(layer.qk.biases, "bytes", 5 * 10 * 4), "memory"),
    "sinks of too few heads": (lambda layer: setattr(layer.sinks, "bytes", 12), "memory"),
    "a cutoff without a scale of one": (
        lambda layer: (setattr(layer, "sparse", 1), setattr(layer, "gate_scale", 0.5)),
        "range",
    ),
    "gates without a place": (lambda layer: setattr(layer, "gates", 1), "range"),
    "a norm of no known kind": (lambda layer: setattr(layer.after_mlp, "kind", 3), "range"),
    "a norm of all heads that is none": (lambda layer: (setattr(layer.qk, "kind", 0), setattr(layer, "qk_as_one", 1)), "range"),
    "an activation that is none": (lambda layer: setattr(layer, "activation", len(Activation)), "range"),
    "a scale that is no number": (lambda layer: setattr(layer, "score_scale", float("nan")), "range"),
    "a negative window": (lambda layer: setattr(layer, "window", -1), "range"),
    "a window longer than the ring": (lambda layer: setattr(layer, "window", 65), "range"),
    "a ring without a window": (lambda layer: setattr(layer, "window", 0), "range"),
    "a ring of a negative size": (lambda layer: setattr(layer, "ring", -1), "range"),
    "a rotation that the pass lacks": (lambda layer: setattr(layer, "key_rotation", 2), "range"),
}


@pytest.mark.parametrize("case", [*WRONG, *WRONG_LAYER])
def test_an_inconsistent_group_or_layer_is_refused(case: str) -> None:
    layers = group()
    change, why = WRONG[case] if case in WRONG else WRONG_LAYER[case]
    change(layers._group if case in WRONG else layers._layers[1])
    with pytest.raises(NativeError, match=why):
        run(layers, [(ONE, 0, 2)])


def with_experts(change: Callable[[Any], None]) -> NativeLayers:
    """Layers of which the second has four experts, in two groups. change: of the record of its experts."""
    record = sizes()
    record.expert_size, record.most_experts, record.most_chosen = 24, 4, 2
    layers = group(record)
    matrices = {
        name: MatrixArrays(Dtype.F32, zeros(*shape))
        for name, shape in {"gate": (24, 48), "up": (24, 48), "down": (48, 24)}.items()
    }
    layers.place_experts(
        1,
        ExpertsArrays(
            MatrixArrays(Dtype.F32, zeros(5, 48)),
            zeros(4),
            [matrices] * 4,
            {"chosen": 2, "groups": 2, "chosen_groups": 1, "shared_gate": 1, "scale": 1.0},
            np.zeros(4, np.int64),
        ),
    )
    change(records.ExpertsRecord.from_address(layers._layers[1].experts.data))
    return layers


def first_expert(record: Any) -> Any:
    return records.ExpertRecord.from_address(record.experts.data)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda record: setattr(record, "num_experts", 5), "range"),
        (lambda record: setattr(record, "num_experts", 3), "range"),
        (lambda record: setattr(record, "chosen", 3), "range"),
        (lambda record: setattr(record, "chosen", 0), "range"),
        (lambda record: setattr(record, "chosen_groups", 3), "range"),
        (lambda record: setattr(record, "groups", 4), "range"),
        (lambda record: setattr(record, "scores", 4), "range"),
        (lambda record: setattr(record, "scale", float("nan")), "range"),
        (lambda record: setattr(record, "shared_gate", 0), "shape"),
        (lambda record: setattr(record.router, "dtype", Dtype.BF16), "dtype"),
        (lambda record: setattr(record.used, "bytes", 24), "memory"),
        (lambda record: setattr(record.correction, "bytes", 12), "memory"),
        (lambda record: setattr(record.experts, "bytes", record.experts.bytes - 1), "memory"),
        (lambda record: setattr(first_expert(record).gate, "outs", 23), "shape"),
        (lambda record: setattr(first_expert(record).down, "width", 25), "shape"),
        (lambda record: setattr(first_expert(record).up.weights, "bytes", 8), "memory"),
        (lambda record: setattr(first_expert(record).gate, "weights", MemoryRecord()), "shape"),
    ],
)
def test_inconsistent_experts_are_refused(change: Callable[[Any], None], why: str) -> None:
    run(with_experts(lambda _: None), [(ONE, 0, 2)])
    layers = with_experts(change)
    with pytest.raises(NativeError, match=why):
        run(layers, [(ONE, 0, 2)])


def test_a_layer_that_was_not_placed_is_refused() -> None:
    with pytest.raises(NativeError):
        run(NativeLayers(library(), sizes(), zeros(8, 2, 2, 64, 16)), [(ONE, 0, 1)])


def test_a_product_that_does_not_fit_its_matrix_is_refused() -> None:
    linear = NativeLinear(library(), NativeThreads(library()), MatrixArrays(Dtype.F32, zeros(3, 32)))
    with pytest.raises(NativeError, match="memory"):
        linear(zeros(2, 31), 1)
    with pytest.raises(NativeError, match="range"):
        linear(zeros(2, 32), 0)
    wrong = copy.copy(linear)
    wrong._matrix = records.MatrixRecord(dtype=Dtype.F32, outs=0, width=32)
    with pytest.raises(NativeError):
        wrong(zeros(2, 32), 1)


def test_arrays_that_are_not_contiguous_are_refused() -> None:
    with pytest.raises(ValueError, match="not contiguous"):
        memory_of(zeros(4, 6)[:, ::2])


def test_every_status_has_a_message() -> None:
    message = library().functions["lamina_message"]
    words = [message(status) for status in range(11)]
    assert len(set(words[:9])) == 9
    assert words[9] == words[10] == b"an unknown status"


def test_records_and_constants_match_the_header() -> None:
    assert library().functions["lamina_size_of"](len(records.RECORDS)) == 0
    header = (SOURCE / "native.h").read_text()
    numbers = dict(re.findall(r"LAMINA_(\w+) = (\d+)", header))
    for name in ("STEP", "BLOCK_TOKENS", "PAGE_TOKENS", "MOST_THREADS", "LINE_BYTES"):
        assert getattr(records, name) == int(numbers[name])
    assert int(numbers["MOST_HEAD"]) == limits.MOST_HEAD
    found = re.search(r"typedef enum \{ (.*) \} Dtype;", header)
    assert found is not None
    assert [f"LAMINA_{dtype.name}" for dtype in Dtype] == found[1].split(", ")
