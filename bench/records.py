"""The records of a run: JSON lines in one file, to which several processes may append."""

import os
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

import msgspec


class Record(msgspec.Struct, frozen=True, tag_field="kind", tag=str.lower):
    """`t`: seconds since the start of the run."""

    t: float


R = TypeVar("R", bound=Record)


@dataclass
class Recorder:
    """Appends records. Processes share a clock by `started` (the machine's `time.monotonic`)."""

    path: Path
    started: float = field(default_factory=time.monotonic)
    _file: int = -1

    def __enter__(self) -> Self:
        self._file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        os.close(self._file)

    @property
    def now(self) -> float:
        return round(time.monotonic() - self.started, 4)

    def write(self, record: Record) -> None:
        """A single write to a file opened for appending, so that lines of several processes do not mix."""
        os.write(self._file, msgspec.json.encode(record) + b"\n")


def decoded(path: Path, decoder: msgspec.json.Decoder[R]) -> list[R]:
    """In order of time. Raises msgspec.DecodeError, OSError."""
    found = [decoder.decode(line) for line in path.read_bytes().splitlines() if line.strip()]
    return sorted(found, key=lambda record: record.t)


def of(kind: type[R], records: Iterable[Record]) -> list[R]:
    return [record for record in records if isinstance(record, kind)]
