"""A folder of verified objects that outlives the process: the next start maps them instead of reading the store.

Files are named by their contents' digest and checksum, appear by a rename, are never changed, and are checked again each time
before they are used: by xxh3, against damage alone, since whoever may write here runs as the reader does. Several processes of
one node may share the folder. A cache that fails costs time, never a start.

They are mapped, which takes a tenth of the processor time of reading them into memory. The price: whoever cuts a file short
under a mapping, which its mode forbids, ends the process by SIGBUS; the one that starts after it finds the file too short.
"""

import fcntl
import logging
import mmap
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, Final

import xxhash

from storage.models.model_repository import StoredObject

_log = logging.getLogger(__name__)

_SUFFIX: Final = ".safetensors"
_UNFINISHED_SUFFIX: Final = ".unfinished"


class WeightCache:
    """At most `max_bytes` in `folder`, unfinished files included; the object that was used longest ago goes first."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self._folder = folder
        self._max_bytes = max_bytes
        self._mapped: set[Path] = set()
        """By this process: to remove them would free no disk, and make a stage larger than the cache read all of it anew."""

    def get(self, stored: StoredObject) -> memoryview | None:
        """The object's bytes, mapped privately (writes stay in this process), at a page's boundary; None where it is not held.

        A file that fails its check is removed.
        """
        try:
            if (path := self._held_as(stored)) is None:
                return None
            data = _mapped(path, stored.bytes)
            if data is not None and _checksum(data) == path.name.split(".")[1]:
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
        """Keeps a verified object's bytes, making room for them first; where there is none, the object is not kept."""
        if stored.bytes > self._max_bytes:
            return
        path = self._folder / f"{stored.digest}.{_checksum(data)}{_SUFFIX}"
        unfinished = path.with_name(f"{secrets.token_hex(8)}{_UNFINISHED_SUFFIX}")
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            if path.exists() or (file := self._reserved(unfinished, stored.bytes)) is None:
                return
            with file:
                file.write(data)
                file.flush()
                unfinished.rename(path)
        except OSError as error:
            _log.warning("the weight cache cannot keep %s (%s); going on without", stored.key, error)
            with suppress(OSError):
                unfinished.unlink()

    def _held_as(self, stored: StoredObject) -> Path | None:
        return next(self._folder.glob(f"{stored.digest}.*{_SUFFIX}"), None)

    def _reserved(self, unfinished: Path, size: int) -> BinaryIO | None:
        """A file of this size, which counts from now on, locked for as long as its writer lives; None: there is no room."""
        with self._locked():
            if not self._made_room(size):
                return None
            file = open(unfinished, "xb", opener=_read_only)  # noqa: SIM115  the caller's to close
            fcntl.flock(file, fcntl.LOCK_EX)
            file.truncate(size)
            return file

    def _made_room(self, wanted_bytes: int) -> bool:
        # In this order: a file that is finished meanwhile counts twice rather than not at all.
        total = wanted_bytes
        total += sum(status.st_size for path, status in self._files(_UNFINISHED_SUFFIX) if not _removed_if_abandoned(path))
        held = sorted((status.st_mtime_ns, status.st_size, path) for path, status in self._files(_SUFFIX))
        total += sum(size for _, size, _ in held)
        for _, size, path in held:
            if total <= self._max_bytes:
                break
            if path in self._mapped:
                continue
            path.unlink(missing_ok=True)
            total -= size
        return total <= self._max_bytes

    def _files(self, suffix: str) -> Iterator[tuple[Path, os.stat_result]]:
        for path in self._folder.glob(f"*{suffix}"):
            with suppress(FileNotFoundError):
                yield path, path.stat()

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """One process, and one thread of it, at a time makes room."""
        with (self._folder / ".lock").open("ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def _removed_if_abandoned(path: Path) -> bool:
    """Whoever writes a file has it locked, until it is done or gone."""
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink(missing_ok=True)
    except BlockingIOError:
        return False
    except FileNotFoundError:
        pass
    return True


def _read_only(path: str, flags: int) -> int:
    """For whoever opens it later; its writer has it open already."""
    return os.open(path, flags, 0o444)


def _mapped(path: Path, size: int) -> memoryview | None:
    """None: the file has another size."""
    with path.open("rb") as file:
        if os.fstat(file.fileno()).st_size != size:
            return None
        return memoryview(mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY))


def _checksum(data: memoryview) -> str:
    return xxhash.xxh3_128_hexdigest(data)
