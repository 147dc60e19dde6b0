"""Hidden states in 8 bits: near the originals, each row by itself; rows that are not finite are refused."""

import numpy as np
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from eventing.wire.batch_codec import decode_batch, encode_batch
from eventing.wire.events import Batch, Row, Status, Tensor, row_bytes
from functions.stage.engine.wire_tensors import hidden_array, wire_tensor
from functions.stage.models.floats import Array, HiddenDtype, narrowed
from tests.support.functions.counting_group import HIDDEN, CountingGroup
from tests.support.functions.stage_pipeline import batch, engines

shapes = array_shapes(min_dims=2, max_dims=2, max_side=7)
rows_of_hidden = arrays(np.float32, shapes, elements=st.floats(width=32, allow_nan=False, allow_infinity=False))
ordinary = arrays(np.float32, shapes, elements=st.floats(-3e4, 3e4, width=32))


def in_8_bits(hidden: Array, dtype: HiddenDtype = "F32") -> Tensor:
    return wire_tensor(hidden, dtype, "I8")


@given(rows_of_hidden)
@example(np.array([[np.finfo(np.float32).max, 1.0], [-np.finfo(np.float32).max, 0.0]], np.float32))
def test_i8_is_within_half_a_step_of_its_input(hidden: Array) -> None:
    tensor = in_8_bits(hidden)
    assert tensor.data.nbytes == len(hidden) * row_bytes("I8", hidden.shape[1])
    given_back = hidden_array(tensor, "F32").astype(np.float64)
    largest = np.abs(hidden).max(axis=1, keepdims=True).astype(np.float64)
    error = np.abs(given_back - hidden)
    assert (error <= np.maximum(largest / 253.9, 1.6e-36)).all(), "beyond that only a row of next to nothing, which is zeros"


@given(ordinary, st.sampled_from(["F32", "BF16", "F16"]))
def test_a_rows_bits_do_not_depend_on_other_rows(numbers: Array, dtype: HiddenDtype) -> None:
    hidden = narrowed(numbers, dtype)
    together = in_8_bits(hidden, dtype)
    alone = [in_8_bits(hidden[index : index + 1], dtype) for index in range(len(hidden))]
    assert together.data.tobytes() == b"".join(each.data.tobytes() for each in alone)
    rows = [hidden_array(each, dtype) for each in alone]
    assert hidden_array(together, dtype).tobytes() == np.concatenate(rows).tobytes()
    assert hidden_array(together, dtype).dtype == hidden.dtype


def test_the_bytes_are_those_of_the_page() -> None:
    hidden = np.array([[254.0, -127.0, 3.0, 0.0], [0.0, 0.0, 0.0, 0.0]], np.float32)
    scales = np.array([2.0, 1.0], "<f4").view(np.uint8).reshape(2, 4).tolist()
    assert in_8_bits(hidden).data.tolist() == [*scales[0], 127, 256 - 64, 2, 0, *scales[1], 0, 0, 0, 0]


@given(st.lists(st.binary(min_size=row_bytes("I8", HIDDEN), max_size=row_bytes("I8", HIDDEN)), min_size=1, max_size=9))
def test_rows_of_any_bytes_are_computed_if_finite_and_refused_otherwise(rows: list[bytes]) -> None:
    data = b"".join(rows)
    with np.errstate(over="ignore", invalid="ignore"):
        expected = [
            np.isfinite(np.frombuffer(row[:4], "<f4")[0] * np.frombuffer(row[4:], np.int8).astype(np.float32)).all()
            for row in rows
        ]
    table = tuple(Row(f"s{index}", 0, 0, 1, reserve_tokens=1) for index in range(len(rows)))
    into = batch(table, range(len(rows)))
    into = Batch(into.rows, into.token_ids, Tensor("I8", (len(rows), HIDDEN), memoryview(data)))
    with engines([CountingGroup(2, 4, 6)], wire_dtype="I8") as (stage,):
        reply = stage.handle(decode_batch(b"".join(encode_batch(into))), source="gateway")
    assert [row.status is Status.OK for row in reply.rows] == expected
    refused = {row.reason for row in reply.rows if row.status is Status.INVALID}
    assert refused <= {"hidden states that came into layer 2 are not finite"}
    assert reply.hidden is None or (reply.hidden.dtype, reply.hidden.shape) == ("I8", (sum(expected), HIDDEN))
