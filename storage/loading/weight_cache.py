"""A folder of verified objects that outlives the process: the next start maps them instead of reading the store.

Files are named by their contents' digest, appear by a rename, are never changed, and are checked again each time before
they are used. Several processes of one node may share the folder. A cache that fails costs time, never a start.
"""

import fcntl
import logging
import mmap
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from storage.models.model_repository import StoredObject, part_checksum

_log = logging.getLogger(__name__)

_SUFFIX: Final = ".safetensors"
_UNFINISHED_SUFFIX: Final = ".unfinished"
_ABANDONED_SECONDS: Final = 3600.0
"""An unfinished file older than this was left by a process that is gone."""


class WeightCache:
    """At most `max_bytes` of objects in `folder`; the one that was used longest ago goes first."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self._folder = folder
        self._max_bytes = max_bytes

    def get(self, stored: StoredObject) -> memoryview | None:
        """The object's bytes, mapped privately (writes stay in this process), at a page's boundary; None where it is not held.

        A file that fails its check is removed.
        """
        path = self._path(stored)
        try:
            data = _mapped(path, stored.bytes)
            if data is not None and _is_intact(stored, data):
                os.utime(path)
                return data
            _log.warning("%s is not what was cached under this name; it is removed and read from the store again", path)
            path.unlink(missing_ok=True)
        except FileNotFoundError:
            return None
        except OSError as error:
            _log.warning("the weight cache cannot be read (%s); going on with the store", error)
        return None

    def put(self, stored: StoredObject, data: memoryview) -> None:
        """Keeps a verified object's bytes, making room for them first."""
        path = self._path(stored)
        if stored.bytes > self._max_bytes or path.exists():
            return
        unfinished = path.with_suffix(f".{secrets.token_hex(8)}{_UNFINISHED_SUFFIX}")
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            unfinished.write_bytes(data)
            with self._locked():
                self._make_room(stored.bytes)
                unfinished.rename(path)
        except OSError as error:
            _log.warning("the weight cache cannot keep %s (%s); going on without", stored.key, error)
            with suppress(OSError):
                unfinished.unlink()

    def _path(self, stored: StoredObject) -> Path:
        return self._folder / f"{stored.digest}{_SUFFIX}"

    def _make_room(self, wanted_bytes: int) -> None:
        for left in self._folder.glob(f"*{_UNFINISHED_SUFFIX}"):
            if time.time() - left.stat().st_mtime > _ABANDONED_SECONDS:
                left.unlink(missing_ok=True)
        held = sorted((status.st_mtime_ns, status.st_size, path) for path, status in self._held())
        total = sum(size for _, size, _ in held)
        for _, size, path in held:
            if total + wanted_bytes <= self._max_bytes:
                return
            # Whoever has it mapped keeps its pages.
            path.unlink(missing_ok=True)
            total -= size

    def _held(self) -> Iterator[tuple[Path, os.stat_result]]:
        for path in self._folder.glob(f"*{_SUFFIX}"):
            try:
                yield path, path.stat()
            except FileNotFoundError:
                continue

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """One process, and one thread of it, at a time makes room and adds."""
        with (self._folder / ".lock").open("ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def _mapped(path: Path, size: int) -> memoryview | None:
    """None: the file has another size."""
    with path.open("rb") as file:
        if os.fstat(file.fileno()).st_size != size:
            return None
        return memoryview(mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY))


def _is_intact(stored: StoredObject, data: memoryview) -> bool:
    starts = range(0, stored.bytes, stored.part_bytes)
    return all(
        part_checksum(data[start : start + stored.part_bytes]) == expected
        for start, expected in zip(starts, stored.parts, strict=True)
    )
