"""The GGUF container (its specification's versions 2 and 3): metadata and where the tensors lie, without touching their bytes.

gguf's own reader believes every count that a file states (an array of 2⁶⁰ items keeps it busy until memory is gone), maps
the file, and takes ten times as long. Here no count is followed beyond the bytes that are there, so that the work is bounded
by the header's length, and tensors are read by offset.
"""

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final

from storage.checkpoints.safetensors_format import MAX_DIMENSIONS
from storage.errors import CheckpointInvalid

_MAGIC: Final = b"GGUF"
_VERSIONS: Final = (2, 3)
_DEFAULT_ALIGNMENT: Final = 32
_MAX_HEADER_BYTES: Final = 2**26
"""A vocabulary of a quarter of a million tokens, with merges, takes a quarter of it."""
_SCALARS: Final[Mapping[int, str]] = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""Value types of one item each, as `struct` names them, all little endian."""
_STRING: Final = 8
_ARRAY: Final = 9


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """A tensor of a file. `shape` is in C order, the reverse of GGUF's own."""

    name: str
    kind: int
    """A GGMLQuantizationType."""
    shape: tuple[int, ...]
    start: int
    """From the beginning of the file."""


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """What a file says of itself."""

    fields: dict[str, Any]
    """Numbers, strings, and lists of either."""
    tensors: list[GgufTensor]


def read_header(path: Path) -> GgufHeader:
    """Raises CheckpointInvalid for what is no GGUF file, or only a part of one, or contradicts itself."""
    try:
        with path.open("rb") as file:
            return _Reader(file, min(path.stat().st_size, _MAX_HEADER_BYTES)).header()
    except (ValueError, struct.error, UnicodeDecodeError) as error:
        raise CheckpointInvalid(f"{path} is no GGUF file, or only its beginning ({error}); fetch it again") from error


class _Reader:
    """Goes through the header once. Raises ValueError, struct.error or UnicodeDecodeError."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        """size: bytes of the file that may belong to the header."""
        self._file = file
        self._left = size

    def header(self) -> GgufHeader:
        if self._bytes(4) != _MAGIC:
            raise ValueError("it does not begin with GGUF")
        if (version := self._scalar("I")) not in _VERSIONS:
            raise ValueError(f"version {version}, known are {_VERSIONS}; big-endian files are not read")
        tensor_count, field_count = self._scalar("Q"), self._scalar("Q")
        fields: dict[str, Any] = {}
        for _ in range(field_count):
            name = self._string()
            if name in fields:
                raise ValueError(f"{name!r} is there twice")
            fields[name] = self._value(self._scalar("I"))
        infos: dict[str, tuple[tuple[int, ...], int, int]] = {}
        for _ in range(tensor_count):
            name, *info = self._tensor_info()
            if name in infos:
                raise ValueError(f"tensor {name!r} is there twice")
            infos[name] = tuple(info)  # type: ignore[assignment]  # it has three
        start = self._aligned(fields.get("general.alignment", _DEFAULT_ALIGNMENT))
        return GgufHeader(fields, [GgufTensor(name, kind, shape, start + at) for name, (shape, kind, at) in infos.items()])

    def _tensor_info(self) -> tuple[str, tuple[int, ...], int, int]:
        name, dimensions = self._string(), self._scalar("I")
        if not 0 < dimensions <= MAX_DIMENSIONS:
            raise ValueError(f"tensor {name!r} has {dimensions} dimensions")
        shape = struct.unpack(f"<{dimensions}Q", self._bytes(8 * dimensions))
        if not all(shape):
            raise ValueError(f"tensor {name!r} is empty")
        return name, tuple(reversed(shape)), self._scalar("I"), self._scalar("Q")

    def _value(self, kind: int) -> Any:
        if kind != _ARRAY:
            return self._string() if kind == _STRING else self._scalar(_format_of(kind))
        kind, count = self._scalar("I"), self._scalar("Q")
        if kind == _STRING:
            # Each has eight bytes of length at least: no list grows beyond the file.
            return [self._string() for _ in range(count)]
        code = _format_of(kind)
        return list(struct.unpack(f"<{count}{code}", self._bytes(count * struct.calcsize(f"<{code}"))))

    def _string(self) -> str:
        return self._bytes(self._scalar("Q")).decode()

    def _scalar(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self._bytes(struct.calcsize(f"<{code}")))[0]

    def _bytes(self, count: int) -> bytes:
        if count > self._left:
            raise ValueError(f"{count} bytes from byte {self._file.tell()} on are not there")
        self._left -= count
        return self._file.read(count)

    def _aligned(self, alignment: Any) -> int:
        if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
            raise ValueError(f"an alignment of {alignment!r}")
        return -(-self._file.tell() // alignment) * alignment


def _format_of(kind: int) -> str:
    if kind not in _SCALARS:
        raise ValueError(f"a value of type {kind}")  # an array of arrays, too, which nothing writes
    return _SCALARS[kind]
