"""Reads the header of a GGUF file (specification versions 2 and 3): metadata and the places of tensors, not their bytes.

gguf's own reader trusts every count in a file (an array of 2⁶⁰ items keeps it busy until memory is gone), maps the file, and
takes ten times as long. Here a count that leads beyond the file's bytes is an error, so the header's length bounds the work.
"""

import re
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
_MAX_HEADER_BYTES: Final = 2**26  # four times what a vocabulary of a quarter of a million tokens with merges takes
# Value types of one item each, as `struct` names them, all little endian.
_SCALARS: Final[Mapping[int, str]] = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING: Final = 8
_PART: Final = re.compile(r"(?P<name>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})")
_ARRAY: Final = 9


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """A tensor of a GGUF file: its type, shape and place."""

    name: str
    kind: int  # a GGMLQuantizationType
    shape: tuple[int, ...]  # in C order, the reverse of GGUF's own
    start: int  # offset of its first byte in the file
    path: Path  # the file


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """The metadata and the list of tensors of a GGUF file."""

    fields: dict[str, Any]  # numbers, strings, and lists of either
    tensors: list[GgufTensor]


def gguf_parts(path: Path) -> list[Path]:
    """Finds all files of a GGUF checkpoint, given any of them. The first has the metadata. Most checkpoints have one file.

    Raises CheckpointInvalid if a part is missing.
    """
    found = _PART.fullmatch(path.stem)
    if not found:
        return [path]
    names = [f"{found['name']}-{number:05d}-of-{found['count']}{path.suffix}" for number in range(1, int(found["count"]) + 1)]
    parts = [path.with_name(name) for name in names]
    if missing := [part.name for part in parts if not part.is_file()]:
        raise CheckpointInvalid(f"{path} is one of {len(parts)} parts, and {path.parent} lacks {missing[0]}; fetch it")
    return parts or [path]


def read_header(path: Path) -> GgufHeader:
    """Reads the header of a GGUF file.

    Raises CheckpointInvalid if the file is no GGUF file, is incomplete, or contradicts itself.
    """
    try:
        with path.open("rb") as file:
            return _HeaderReader(file, min(path.stat().st_size, _MAX_HEADER_BYTES)).header()
    except (ValueError, struct.error, UnicodeDecodeError) as error:
        raise CheckpointInvalid(f"{path} is no GGUF file, or only its beginning ({error}); fetch it again") from error


class _HeaderReader:
    """Reads the header of an open file once, from front to back. Raises ValueError, struct.error or UnicodeDecodeError."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        """Creates a reader of at most `size` bytes from `file`. A length or count that leads beyond them is an error."""
        self._file = file
        self._left = size

    def header(self) -> GgufHeader:
        if self._bytes(4) != _MAGIC:
            raise ValueError("it does not begin with GGUF")
        if (version := self._scalar("I")) not in _VERSIONS:
            if int.from_bytes(version.to_bytes(4, "little"), "big") in _VERSIONS:
                raise CheckpointInvalid(f"{self._file.name} is big-endian, which is not read; fetch the little-endian file")
            raise ValueError(f"version {version}, known are {_VERSIONS}")
        tensor_count, field_count = self._scalar("Q"), self._scalar("Q")
        fields: dict[str, Any] = {}
        for _ in range(field_count):
            name = self._string()
            if name in fields:
                raise ValueError(f"{name!r} is there twice")
            fields[name] = self._value(self._scalar("I"))
        infos: dict[str, tuple[tuple[int, ...], int, int]] = {}
        for _ in range(tensor_count):
            name = self._string()
            info = self._shape(name), self._scalar("I"), self._scalar("Q")
            if name in infos:
                raise ValueError(f"tensor {name!r} is there twice")
            infos[name] = info
        alignment = fields.get("general.alignment", _DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
            raise ValueError(f"an alignment of {alignment!r}")
        start = -(-self._file.tell() // alignment) * alignment
        path = Path(self._file.name)
        tensors = [GgufTensor(name, kind, shape, start + at, path) for name, (shape, kind, at) in infos.items()]
        return GgufHeader(fields, tensors)

    def _shape(self, name: str) -> tuple[int, ...]:
        dimensions = self._scalar("I")
        if not 0 < dimensions <= MAX_DIMENSIONS:
            raise ValueError(f"tensor {name!r} has {dimensions} dimensions")
        shape = struct.unpack(f"<{dimensions}Q", self._bytes(8 * dimensions))
        if not all(shape):
            raise ValueError(f"tensor {name!r} is empty")
        return tuple(reversed(shape))

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            return self._scalar(_struct_code(kind))
        kind, count = self._scalar("I"), self._scalar("Q")
        if kind == _STRING:
            # Each string takes at least the eight bytes of its length, so no list grows beyond the file.
            return [self._string() for _ in range(count)]
        code = _struct_code(kind)
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


def _struct_code(kind: int) -> str:
    if kind not in _SCALARS:
        raise ValueError(f"a value of type {kind}")  # also an array of arrays, which no known writer makes
    return _SCALARS[kind]
