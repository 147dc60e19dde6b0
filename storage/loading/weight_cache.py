"""A folder of verified objects that outlives the process: the next start maps them instead of reading the store.

Files are named by the digest and checksum of their contents, appear by a rename, and never change. They are checked by xxh3 at
each use. This finds damage but no forgery: a process that may write here has the reader's rights anyway. Several processes of
one node may share the folder. If the cache fails, objects are read from the store.

Files are mapped, which takes a tenth of the processor time of reading them. But if a mapped file is truncated, which its mode
forbids, the process ends by SIGBUS. The next process finds that the file is too short and removes it.
"""

import fcntl
import logging
import mmap
import os
import secrets
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, Final

from xxhash import xxh3_128_hexdigest

from storage.models.model_repository import StoredObject

_log = logging.getLogger(__name__)

_SUFFIX: Final = ".safetensors"
_UNFINISHED_SUFFIX: Final = ".unfinished"


class WeightCache:
    """A cache of at most `max_bytes` in `folder`, unfinished files included. Evicts the least recently used object first."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self._folder = folder
        self._max_bytes = max_bytes
        # Files that this process has mapped are not evicted: that would free no disk, and a stage larger than the cache
        # would read all its objects anew.
        self._mapped: set[Path] = set()

    def get(self, stored: StoredObject) -> memoryview | None:
        """Returns the object's bytes, page-aligned and mapped privately: writes stay in this process.

        None if the object is not in the cache. A file that fails its check is removed.
        """
        try:
            path = next(self._folder.glob(f"{stored.digest}.*{_SUFFIX}"), None)
            if path is None:
                return None
            data = _map_file(path, stored.bytes)
            if data is not None and xxh3_128_hexdigest(data) == path.name.split(".")[1]:
                os.utime(path)
                self._mapped.add(path)
                return data
            _log.warning("%s is not what was cached under this name; it is removed and read from the store again", path)
            path.unlink(missing_ok=True)
        except FileNotFoundError:
            return None
        except OSError as error:
            _log.warning("the weight cache cannot be read (%s); going on with the store", error)
        return None

    def put(self, stored: StoredObject, data: memoryview) -> None:
        """Writes a verified object's bytes into the cache if they fit after evictions. Errors of the file system are logged."""
        if stored.bytes > self._max_bytes:
            return
        path = self._folder / f"{stored.digest}.{xxh3_128_hexdigest(data)}{_SUFFIX}"
        unfinished = path.with_name(f"{secrets.token_hex(8)}{_UNFINISHED_SUFFIX}")
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            if path.exists() or (file := self._reserve(unfinished, stored.bytes)) is None:
                return
            with file:
                file.write(data)
                file.flush()
                unfinished.rename(path)
        except OSError as error:
            _log.warning("the weight cache cannot keep %s (%s); going on without", stored.key, error)
            with suppress(OSError):
                unfinished.unlink()

    def _reserve(self, unfinished: Path, size: int) -> BinaryIO | None:
        """Creates an unfinished file of `size` bytes, which is locked until it is closed. None if there is too little space.

        The bytes count as used from now on. Other objects may be evicted for them.
        """
        with (self._folder / ".lock").open("ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # one thread of one process at a time evicts and reserves
            if not self._evict_for(size):
                return None
            # Readers open it later, its writer has it open already: so its mode is read-only.
            file = open(unfinished, "xb", opener=lambda path, flags: os.open(path, flags, 0o444))  # noqa: SIM115
            fcntl.flock(file, fcntl.LOCK_EX)
            file.truncate(size)
            return file

    def _evict_for(self, wanted_bytes: int) -> bool:
        # Unfinished files first: a file that is finished meanwhile counts twice rather than not at all.
        total = wanted_bytes
        total += sum(status.st_size for path, status in self._files(_UNFINISHED_SUFFIX) if not _removed_if_abandoned(path))
        held = sorted((status.st_mtime_ns, status.st_size, path) for path, status in self._files(_SUFFIX))
        total += sum(size for _, size, _ in held)
        for _, size, path in held:
            if total <= self._max_bytes:
                break
            if path not in self._mapped:
                path.unlink(missing_ok=True)
                total -= size
        return total <= self._max_bytes

    def _files(self, suffix: str) -> Iterator[tuple[Path, os.stat_result]]:
        for path in self._folder.glob(f"*{suffix}"):
            with suppress(FileNotFoundError):
                yield path, path.stat()


def _removed_if_abandoned(path: Path) -> bool:
    """Removes an unfinished file if its writer has ended. A running writer holds a lock on it.

    Returns whether the file no longer exists.
    """
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink(missing_ok=True)
    except BlockingIOError:
        return False
    except FileNotFoundError:
        pass
    return True


def _map_file(path: Path, size: int) -> memoryview | None:
    """Maps a file privately and page-aligned. None if the file does not have `size` bytes."""
    with path.open("rb") as file:
        if os.fstat(file.fileno()).st_size != size:
            return None
        return memoryview(mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY))
