"""Batch ↔ bytes. Only the table is copied: token ids and tensor are views on both sides.

The body, all numbers little endian (wire version 3):

    offset  bytes  what
    0       3      "LMB"
    3       1      wire version, 3
    4       4      u32 rows, 1 to MAX_ROWS
    8       4      u32 tokens, the sum of the rows' lengths, at most MAX_BATCH_TOKENS
    12      4      u32 table_bytes, at most MAX_TABLE_BYTES
    16      4      dtype of the tensor in ASCII, padded with zero bytes: F32, BF16, F16, I8; four zero bytes: no tensor
    20      4      u32 hidden_size, 1 to MAX_HIDDEN_SIZE; 0: no tensor
    24      4 × tokens            token ids, int32
    …       table_bytes           the table: MessagePack array of `events.Row` as maps without fields that have their default
    …       0 to 63               zero bytes up to a multiple of 64, only with a tensor
    …       tokens × bytes of a row     the tensor, C order: hidden_size numbers a row; in I8 after a float32, their scale

The first 24 bytes determine every size, so a body of another length is refused before the rest is read.
"""

import struct
from array import array
from collections.abc import Sequence
from itertools import pairwise
from typing import Final

import msgspec

from eventing.problems import EventTooLarge, MalformedEvent
from eventing.wire.events import (
    ITEM_BYTES,
    MAX_BATCH_TOKENS,
    MAX_HIDDEN_SIZE,
    MAX_ROWS,
    WIRE_VERSION,
    Batch,
    Row,
    Status,
    Tensor,
    row_bytes,
)

MAX_TABLE_BYTES: Final = 4 * 2**20
TENSOR_ALIGNMENT: Final = 64

_MAGIC: Final = b"LMB" + bytes([WIRE_VERSION])
_HEADER: Final = struct.Struct("<4s3I4sI")
_NO_DTYPE: Final = bytes(4)
_NO_TOKENS: Final = memoryview(array("i"))
_encoder: Final = msgspec.msgpack.Encoder()
_decoder: Final = msgspec.msgpack.Decoder(tuple[Row, ...])


def encode_batch(batch: Batch) -> list[bytes | memoryview]:
    """Encodes a batch as buffers, to be sent in this order. Raises MalformedEvent or EventTooLarge if it is inconsistent."""
    tokens = len(batch.token_ids)
    table = _encoder.encode(batch.rows)
    dtype, hidden_size = _tensor_header(batch.hidden, tokens)
    _check_limits(len(batch.rows), tokens, len(table))
    _check_rows(batch.rows, len(batch.rows), tokens)
    header = _HEADER.pack(_MAGIC, len(batch.rows), tokens, len(table), dtype, hidden_size)
    buffers: list[bytes | memoryview] = [header, *_raw(batch.token_ids), table]
    if batch.hidden is not None:
        buffers[-1] = table + bytes(_padding(tokens, len(table)))
        buffers += _raw(batch.hidden.data)
    return buffers


def decode_batch(body: bytes | bytearray | memoryview) -> Batch:
    """Decodes a batch. Its token ids and tensor are views of `body`. Raises MalformedEvent or EventTooLarge."""
    view = memoryview(body)
    rows, tokens, table_bytes, tensor_dtype, hidden_size = _read_header(view)
    token_end = _HEADER.size + 4 * tokens
    table_end = token_end + table_bytes
    begin, end = table_end, table_end
    if tensor_dtype:
        begin += _padding(tokens, table_bytes)
        end = begin + tokens * row_bytes(tensor_dtype, hidden_size)
    if len(view) != end:
        raise MalformedEvent(f"the body has {len(view)} bytes, its header describes {end}")
    if any(view[table_end:begin]):
        raise MalformedEvent("the bytes between table and tensor are not zero")
    return Batch(
        rows=_read_table(view[token_end:table_end], rows, tokens),
        token_ids=view[_HEADER.size : token_end].cast("i") if tokens else _NO_TOKENS,
        hidden=Tensor(tensor_dtype, (tokens, hidden_size), view[begin:end]) if tensor_dtype else None,
    )


def select_rows(batch: Batch, keep: Sequence[int]) -> Batch:
    """Returns a batch of only the rows with the indices `keep` (ascending), with their tokens and hidden states.

    Copies data only if the rows that stay are not adjacent; otherwise the result holds views of `batch`.
    """
    if len(keep) == len(batch.rows):
        return batch
    offsets, hidden = batch.offsets(), batch.hidden
    spans = [(offsets[index], offsets[index + 1]) for index in keep if batch.rows[index].length]
    if hidden is not None:
        tokens, size = sum(last - first for first, last in spans), row_bytes(hidden.dtype, hidden.shape[1])
        data = _gather(hidden.data, [(first * size, last * size) for first, last in spans])
        hidden = Tensor(hidden.dtype, (tokens, hidden.shape[1]), data)
    return Batch(tuple(batch.rows[index] for index in keep), _gather(batch.token_ids, spans), hidden)


def _tensor_header(hidden: Tensor | None, tokens: int) -> tuple[bytes, int]:
    if hidden is None:
        return _NO_DTYPE, 0
    if len(hidden.shape) != 2 or hidden.shape[0] != tokens:
        raise MalformedEvent(f"the tensor has shape {list(hidden.shape)}, wanted is [{tokens}, hidden_size]")
    _check_tensor(hidden.dtype, hidden.shape[1])
    expected = tokens * row_bytes(hidden.dtype, hidden.shape[1])
    if hidden.data.nbytes != expected:
        shape = f"{hidden.dtype} {list(hidden.shape)}"
        raise MalformedEvent(f"the tensor has {hidden.data.nbytes} bytes, {shape} takes {expected}")
    return hidden.dtype.encode(), hidden.shape[1]


def _read_header(view: memoryview) -> tuple[int, int, int, str, int]:
    """Reads the header and checks each number against its limits.

    Returns the counts of rows and tokens, table_bytes, the tensor's dtype ("" without a tensor) and hidden_size.
    """
    if len(view) < _HEADER.size:
        raise MalformedEvent(f"the body has {len(view)} bytes, a Batch begins with {_HEADER.size}")
    magic, rows, tokens, table_bytes, dtype, hidden_size = _HEADER.unpack_from(view)
    if magic[:3] != _MAGIC[:3]:
        raise MalformedEvent(f"the body begins with {magic[:3]!r}, a Batch with {_MAGIC[:3]!r}")
    if magic[3] != WIRE_VERSION:
        raise MalformedEvent(f"the body has wire version {magic[3]}, this side speaks {WIRE_VERSION}")
    _check_limits(rows, tokens, table_bytes)
    if dtype == _NO_DTYPE:
        if hidden_size:
            raise MalformedEvent(f"hidden_size is {hidden_size} although there is no tensor")
        return rows, tokens, table_bytes, "", 0
    name = dtype.decode("ascii", "backslashreplace").rstrip("\0")
    _check_tensor(name, hidden_size)
    return rows, tokens, table_bytes, name, hidden_size


def _read_table(table: memoryview, expected_rows: int, tokens: int) -> tuple[Row, ...]:
    try:
        rows = _decoder.decode(table)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise MalformedEvent(f"the table of rows cannot be read: {error}") from error
    _check_rows(rows, expected_rows, tokens)
    return rows


def _check_limits(rows: int, tokens: int, table_bytes: int) -> None:
    if rows == 0:
        raise MalformedEvent("the batch has no rows")
    for seen, limit, what in (
        (rows, MAX_ROWS, "rows"),
        (tokens, MAX_BATCH_TOKENS, "tokens"),
        (table_bytes, MAX_TABLE_BYTES, "bytes of table"),
    ):
        if seen > limit:
            raise EventTooLarge(f"the batch has {seen} {what}, the most is {limit}")


def _check_rows(rows: Sequence[Row], expected_rows: int, tokens: int) -> None:
    if len(rows) != expected_rows:
        raise MalformedEvent(f"the table has {len(rows)} rows, the header says {expected_rows}")
    total = 0
    for index, row in enumerate(rows):
        if row.length and row.status is not Status.OK:
            raise MalformedEvent(f"row {index} is {row.status} and has length {row.length}; it must be 0")
        total += row.length
    if total != tokens:
        raise MalformedEvent(f"the rows' lengths add up to {total}, there are {tokens} token ids")


def _check_tensor(dtype: str, hidden_size: int) -> None:
    if dtype not in ITEM_BYTES:
        raise MalformedEvent(f"the tensor has dtype {dtype!r}, served are {', '.join(ITEM_BYTES)}")
    if not 1 <= hidden_size <= MAX_HIDDEN_SIZE:
        raise MalformedEvent(f"hidden_size is {hidden_size}, it must be 1 to {MAX_HIDDEN_SIZE}")


def _padding(tokens: int, table_bytes: int) -> int:
    return -(_HEADER.size + 4 * tokens + table_bytes) % TENSOR_ALIGNMENT


def _raw(view: memoryview) -> list[memoryview]:
    """Returns a list with the view as plain bytes, or an empty list for an empty view, which Python cannot cast."""
    return [view.cast("B")] if view.nbytes else []


def _gather(view: memoryview, spans: Sequence[tuple[int, int]]) -> memoryview:
    """Returns the spans [first, end) of `view`, which ascend, as one memoryview.

    The result is a view if the spans are adjacent; otherwise it is a copy.
    """
    if all(end == begin for (_, end), (begin, _) in pairwise(spans)):
        return view[spans[0][0] : spans[-1][1]] if spans else view[:0]
    joined = memoryview(b"".join(view[first:last] for first, last in spans))
    return joined.cast("i") if view.format == "i" else joined
