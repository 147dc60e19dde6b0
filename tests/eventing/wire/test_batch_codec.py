"""The Batch codec: round trips without copies, and malformed bodies that are refused before they are read."""

import contextlib
import struct
import timeit
from array import array

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eventing.problems import EventTooLarge, MalformedEvent, Problem
from eventing.wire.batch_codec import MAX_TABLE_BYTES, TENSOR_ALIGNMENT, decode_batch, encode_batch, select_rows
from eventing.wire.events import MAX_BATCH_TOKENS, MAX_HIDDEN_SIZE, MAX_ROWS, Batch, Row, Status, Tensor
from tests.support.functions.batches import batches, encoded, make_batch

HEADER_BYTES = 24


@pytest.mark.slow
@given(batches())
def test_round_trip_and_pass_through(batch: Batch) -> None:
    body = encoded(batch)
    decoded = decode_batch(body)
    assert decoded == batch
    assert encoded(decoded) == body


@pytest.mark.slow
@given(batches(), st.data())
def test_random_corruption_raises_nothing_but_problems(batch: Batch, data: st.DataObject) -> None:
    body = bytearray(encoded(batch))
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(0, len(body) - 1))
        body[position] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(body)) | st.just(len(body)))
    _decode_or_problem(bytes(body[:cut]))


@given(st.binary(max_size=200))
def test_random_bytes_raise_nothing_but_problems(body: bytes) -> None:
    _decode_or_problem(body)
    _decode_or_problem(b"LMB\x03" + body)


def _decode_or_problem(body: bytes) -> None:
    with contextlib.suppress(Problem):
        batch = decode_batch(body)
        assert sum(row.length for row in batch.rows) == len(batch.token_ids)


def test_neither_side_copies() -> None:
    batch = make_batch([3, 2], hidden_size=8)
    ids, tensor = encode_batch(batch)[1], encode_batch(batch)[-1]
    assert isinstance(ids, memoryview)
    assert isinstance(tensor, memoryview)
    assert ids.obj is batch.token_ids.obj
    assert tensor.obj is batch.hidden.data.obj

    body = bytearray(encoded(batch))
    decoded = decode_batch(body)
    assert decoded.token_ids.obj is body
    assert decoded.hidden.data.obj is body


@pytest.mark.slow
@given(batches())
def test_tensor_begins_aligned(batch: Batch) -> None:
    body = encoded(batch)
    if batch.hidden is not None:
        assert (len(body) - batch.hidden.data.nbytes) % TENSOR_ALIGNMENT == 0


def test_layout_of_the_docstring() -> None:
    body = encoded(make_batch([1, 2], hidden_size=2, dtype="BF16"))
    assert body[:4] == b"LMB\x03"
    assert struct.unpack_from("<2I", body, 4) == (2, 3)
    assert body[16:20] == b"BF16"
    assert struct.unpack_from("<I", body, 20) == (2,)
    assert struct.unpack_from("<3i", body, 24) == (0, 1, 2)
    assert body[-12:] == bytes(range(12))


def test_layout_of_eight_bits() -> None:
    """A scale of four bytes ahead of each token's numbers, so that a token's part is one piece."""
    batch = make_batch([1, 2], hidden_size=6, dtype="I8")
    body = encoded(batch)
    assert body[16:20] == b"I8\0\0"
    assert struct.unpack_from("<I", body, 20) == (6,)
    assert body[-3 * (4 + 6) :] == bytes(range(30))
    last = select_rows(batch, [1]).hidden
    assert (last.shape, last.data.tobytes()) == ((2, 6), bytes(range(10, 30)))


def _header(
    magic: bytes = b"LMB\x03", rows: int = 1, tokens: int = 0, table: int = 0, dtype: bytes = bytes(4), hidden_size: int = 0
) -> bytes:
    return struct.pack("<4s3I4sI", magic, rows, tokens, table, dtype, hidden_size)


@pytest.mark.parametrize(
    ("body", "error", "seen"),
    [
        (b"", MalformedEvent, "0 bytes"),
        (b"LMB\x03", MalformedEvent, "4 bytes"),
        (b"{" + bytes(40), MalformedEvent, r"begins with b'{"),
        (_header(magic=b"LMB\x02"), MalformedEvent, "wire version 2"),
        (_header(rows=0), MalformedEvent, "no rows"),
        (_header(rows=MAX_ROWS + 1), EventTooLarge, f"{MAX_ROWS + 1} rows"),
        (_header(rows=10_000), EventTooLarge, "10000 rows"),
        (_header(tokens=MAX_BATCH_TOKENS + 1), EventTooLarge, f"{MAX_BATCH_TOKENS + 1} tokens"),
        (_header(tokens=2**32 - 1), EventTooLarge, f"{2**32 - 1} tokens"),
        (_header(table=MAX_TABLE_BYTES + 1), EventTooLarge, "bytes of table"),
        (_header(dtype=b"F64\0", hidden_size=4), MalformedEvent, "'F64'"),
        (_header(dtype=b"\xff\xff\xff\xff", hidden_size=4), MalformedEvent, r"\\xff"),
        (_header(dtype=b"F32\0", hidden_size=0), MalformedEvent, "hidden_size is 0"),
        (_header(dtype=b"F32\0", hidden_size=MAX_HIDDEN_SIZE + 1), MalformedEvent, f"hidden_size is {MAX_HIDDEN_SIZE + 1}"),
        (_header(hidden_size=4), MalformedEvent, "hidden_size is 4 although"),
        (_header(tokens=1, dtype=b"I8\0\0", hidden_size=4) + bytes(44), MalformedEvent, "68 bytes, its header describes 72"),
        (_header(tokens=1, dtype=b"I8 \0", hidden_size=4), MalformedEvent, "'I8 '"),
        (_header(tokens=MAX_BATCH_TOKENS, dtype=b"F32\0", hidden_size=MAX_HIDDEN_SIZE), MalformedEvent, "describes 34360"),
        (_header(table=5), MalformedEvent, "24 bytes, its header describes 29"),
        (_header(table=1) + b"\x80", MalformedEvent, "table of rows"),
        (_header(table=1) + b"\xc1", MalformedEvent, "table of rows"),
        (_header(table=1) + b"\x90", MalformedEvent, "0 rows, the header says 1"),
        (_header(table=5) + b"\xdd\xff\xff\xff\xff", MalformedEvent, "table of rows"),
        (_header(table=3000) + b"\x91" * 3000, MalformedEvent, "table of rows"),
    ],
)
def test_malformed_bodies_are_named(body: bytes, error: type[Problem], seen: str) -> None:
    with pytest.raises(error, match=seen):
        decode_batch(body)


def test_trailing_bytes() -> None:
    body = encoded(make_batch([2], hidden_size=4))
    with pytest.raises(MalformedEvent, match=f"{len(body) + 1} bytes, its header describes {len(body)}"):
        decode_batch(body + b"\0")


def test_padding_must_be_zero() -> None:
    body = bytearray(encoded(make_batch([2], hidden_size=4)))
    body[-2 * 4 * 4 - 1] = 1
    with pytest.raises(MalformedEvent, match="not zero"):
        decode_batch(body)


@pytest.mark.parametrize(
    ("fields", "seen"),
    [
        ({"id": ""}, "table of rows.*id"),
        ({"position": -1}, "table of rows.*position"),
        ({"position": 2**40}, "table of rows.*position"),
        ({"length": msgspec.UNSET}, "table of rows.*length"),
        ({"shell": "rm"}, "table of rows.*shell"),
        ({"want": "all"}, "table of rows.*want"),
        ({"sampling": {"top_p": 1.5}}, "table of rows.*top_p"),
        ({"sampling": {"temperature": float("nan")}}, "table of rows.*temperature"),
        ({"length": 3}, "add up to 3, there are 0 token ids"),
        ({"length": 3, "status": "miss"}, "row 0 is miss and has length 3"),
    ],
)
def test_malformed_rows_are_named(fields: dict[str, object], seen: str) -> None:
    row = {"id": "s", "attempt": 0, "position": 0, "length": 0} | fields
    table = msgspec.msgpack.encode([{name: value for name, value in row.items() if value is not msgspec.UNSET}])
    with pytest.raises(MalformedEvent, match=seen):
        decode_batch(_header(table=len(table)) + table)


def _one_row(dtype: str, shape: tuple[int, ...], size: int) -> Batch:
    return Batch(make_batch([1]).rows, memoryview(array("i", [1])), Tensor(dtype, shape, memoryview(bytes(size))))


@pytest.mark.parametrize(
    ("batch", "error", "seen"),
    [
        (Batch((), memoryview(array("i"))), MalformedEvent, "no rows"),
        (Batch(make_batch([2]).rows, memoryview(array("i", [1]))), MalformedEvent, "add up to 2, there are 1"),
        (Batch(make_batch([0] * (MAX_ROWS + 1)).rows, memoryview(array("i"))), EventTooLarge, "1025 rows"),
        (_one_row("F32", (2, 1), 8), MalformedEvent, r"\[2, 1\]"),
        (_one_row("F32", (1, 2), 7), MalformedEvent, "7 bytes"),
        (_one_row("I8", (1, 2), 2), MalformedEvent, "takes 6"),
        (_one_row("I64", (1, 1), 8), MalformedEvent, "'I64'"),
        (_one_row("F32", (1,), 4), MalformedEvent, r"\[1\]"),
    ],
)
def test_inconsistent_batches_are_not_written(batch: Batch, error: type[Problem], seen: str) -> None:
    with pytest.raises(error, match=seen):
        encode_batch(batch)


@pytest.mark.slow
@given(batches(), st.data())
def test_select_rows_keeps_tokens_and_tensor_rows(batch: Batch, data: st.DataObject) -> None:
    keep = sorted(data.draw(st.sets(st.integers(0, len(batch.rows) - 1), min_size=1)))
    selected = select_rows(batch, keep)
    offsets, kept_offsets = batch.offsets(), selected.offsets()
    assert selected.rows == tuple(batch.rows[index] for index in keep)
    for new, old in enumerate(keep):
        expected = batch.token_ids[offsets[old] : offsets[old + 1]]
        assert selected.token_ids[kept_offsets[new] : kept_offsets[new + 1]].tolist() == expected.tolist()
    if batch.hidden is not None:
        size = batch.hidden.data.nbytes // max(1, len(batch.token_ids))
        expected_bytes = b"".join(batch.hidden.data[offsets[i] * size : offsets[i + 1] * size] for i in keep)
        assert selected.hidden.data.tobytes() == expected_bytes
    assert decode_batch(encoded(selected)) == selected


def test_select_rows_copies_only_what_is_in_pieces() -> None:
    batch = make_batch([2, 0, 3, 1], hidden_size=2)
    assert select_rows(batch, range(4)) is batch
    for keep in ([0, 2, 3], [2, 3], [0], [0, 2]):
        selected = select_rows(batch, keep)
        assert selected.hidden.data.obj is batch.hidden.data.obj
        assert selected.token_ids.obj is batch.token_ids.obj
    in_pieces = select_rows(batch, [0, 3])
    assert in_pieces.token_ids.tolist() == [0, 1, 5]


def test_a_batch_of_failed_rows_only() -> None:
    rows = (Row(id="s", attempt=1, position=5, length=0, status=Status.MISS, held=3),)
    for hidden in (None, Tensor("F16", (0, 576), memoryview(b""))):
        batch = Batch(rows, memoryview(array("i")), hidden)
        assert decode_batch(encoded(batch)) == batch


def test_cost_of_a_decode_step_does_not_grow_with_the_tensor() -> None:
    """A tensor of 5 MiB costs what one of 5 KiB does: a copy would take milliseconds."""
    batch = make_batch([512], hidden_size=5120, dtype="BF16")
    body = encoded(batch)
    assert min(timeit.repeat(lambda: encode_batch(batch), number=20, repeat=5)) / 20 < 2e-4
    assert min(timeit.repeat(lambda: decode_batch(body), number=20, repeat=5)) / 20 < 2e-4
