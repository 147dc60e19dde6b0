"""The safetensors container: reads and lays out its header without touching tensor bytes.

A file is eight bytes of header length (little endian), the header (JSON, padded with spaces), and the tensors without gaps.
Lamina's own files align every tensor to 64 bytes. The format forbids holes, so a filler tensor follows each tensor whose length
is not a multiple of 64.
"""

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec

from storage.errors import CheckpointInvalid

ALIGNMENT: Final = 64
FILLER_PREFIX: Final = "lamina.filler."
ITEM_BYTES: Final[Mapping[str, int]] = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip
MAX_DIMENSIONS: Final = 8  # per tensor; to multiply a million of them would keep a core busy for hours
_MAX_HEADER_BYTES: Final = 100_000_000  # the safetensors library's own limit


class TensorSpan(msgspec.Struct, frozen=True):
    """A tensor in a file. `start` and `end` count from the beginning of the file."""

    dtype: str  # a safetensors name: F32, BF16, F16, I8 …
    shape: tuple[int, ...]
    start: int
    end: int


class _HeaderEntry(msgspec.Struct):
    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


def tensor_bytes(dtype: str, shape: Sequence[int]) -> int:
    """The length of a tensor in bytes. Raises KeyError for a dtype that safetensors does not have."""
    return ITEM_BYTES[dtype] * math.prod(shape)


def lay_out(tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> tuple[bytes, dict[str, TensorSpan]]:
    """Lays out a safetensors file with these tensors (dtype and shape by name) in this order.

    Returns the header, and the span of each tensor, fillers included.
    """
    entries: dict[str, Any] = {}
    position = 0
    for number, (name, (dtype, shape)) in enumerate(tensors.items()):
        end = position + tensor_bytes(dtype, shape)
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": (position, end)}
        position = end
        if filler := -end % ALIGNMENT:
            position = end + filler
            entries[f"{FILLER_PREFIX}{number}"] = {"dtype": "U8", "shape": (filler,), "data_offsets": (end, position)}
    body = msgspec.json.encode(entries)
    body += b" " * (-(len(body) + 8) % ALIGNMENT)
    header = len(body).to_bytes(8, "little") + body
    spans = {
        name: TensorSpan(entry["dtype"], entry["shape"], *(len(header) + offset for offset in entry["data_offsets"]))
        for name, entry in entries.items()
    }
    return header, spans


def read_spans(path: Path) -> dict[str, TensorSpan]:
    """Reads which tensors a safetensors file has, by name.

    Raises CheckpointInvalid unless the file is whole and well-formed.
    """
    return read_header(path)[0]


def read_header(path: Path) -> tuple[dict[str, TensorSpan], dict[str, str]]:
    """Reads which tensors a safetensors file has, and the file's metadata. Raises CheckpointInvalid as `read_spans` does."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
            raise CheckpointInvalid(f"{path} is no safetensors file, or only its beginning: {size} bytes; fetch it again")
        header = file.read(length)
    try:
        entries = msgspec.json.decode(header)
        metadata = msgspec.convert(entries.pop("__metadata__", None) or {}, type=dict[str, str])
        tensors = msgspec.convert(entries, type=dict[str, _HeaderEntry])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, AttributeError, TypeError) as error:
        raise CheckpointInvalid(f"{path} has a header that is not safetensors' ({error}); fetch it again") from error
    for name, entry in tensors.items():
        _check(path, name, entry, size - 8 - length)
    spans = {
        name: TensorSpan(entry.dtype, entry.shape, *(8 + length + offset for offset in entry.data_offsets))
        for name, entry in tensors.items()
    }
    return spans, metadata


def _check(path: Path, name: str, entry: _HeaderEntry, data_bytes: int) -> None:
    start, end = entry.data_offsets
    if entry.dtype not in ITEM_BYTES:
        raise CheckpointInvalid(f"{path}: tensor {name!r} has the dtype {entry.dtype}, which is not known here")
    if len(entry.shape) > MAX_DIMENSIONS:
        raise CheckpointInvalid(f"{path}: tensor {name!r} has {len(entry.shape)} dimensions, more than {MAX_DIMENSIONS}")
    if min(start, *entry.shape, 0) < 0 or end - start != tensor_bytes(entry.dtype, entry.shape):
        raise CheckpointInvalid(f"{path}: tensor {name!r} is {entry.dtype} {list(entry.shape)} but has {end - start} bytes")
    if end > data_bytes:
        raise CheckpointInvalid(
            f"{path} is truncated: tensor {name!r} ends at byte {end} of {data_bytes} bytes of tensors; fetch it again"
        )


def read_exactly(descriptor: int, offset: int, view: memoryview) -> None:
    """Fills `view` with the bytes of an open file from `offset` on. Raises CheckpointInvalid if the file is too short."""
    filled = 0
    while filled < len(view):
        count = os.preadv(descriptor, [view[filled:]], offset + filled)
        if not count:
            raise CheckpointInvalid(
                f"a checkpoint file ended at byte {offset + filled} while it was read; is it being written?"
            )
        filled += count
