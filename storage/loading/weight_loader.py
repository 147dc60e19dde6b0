"""Loads the objects of a stage's layers from the store, by parallel ranged reads, into the memory that tensors use.

This file imports nothing heavy, so that bytes arrive while libraries are still being imported. Every part is verified after it
has been read.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from blake3 import blake3

from storage.errors import ChecksumMismatch
from storage.loading.memory import freed_with_last_view, new_memory, populate
from storage.models.model_repository import ModelManifest, StoredObject, layer_object

if TYPE_CHECKING:  # a stage imports this file for RawTensor alone
    from storage.loading.weight_cache import WeightCache
    from storage.store.object_reader import ObjectReader

_log = logging.getLogger(__name__)

CONNECTIONS: Final = 4  # measured on loopback: more are no faster, fewer are slower
_READS_OF_A_BAD_PART: Final = 3


@dataclass(frozen=True, slots=True)
class RawTensor:
    """A tensor's bytes, in the memory into which they were read. Writable and aligned to 64 bytes, for `frombuffer`.

    Its pages are freed when no view of `data` is left, also while other tensors of the object are in use.
    """

    dtype: str  # a safetensors name: F32, BF16, F16, I8; U8 for matrices in four bits
    shape: tuple[int, ...]
    data: memoryview
    from_file: bool = False  # a private mapping of a file, not to be written to: its pages can be dropped and read again


@dataclass(frozen=True, slots=True)
class LoadedObject:
    """One object of a published model with all of its tensors, complete and verified."""

    name: str  # embedding, layer-00007, or head
    tensors: dict[str, RawTensor]


@dataclass(frozen=True, slots=True)
class LoadProgress:
    """The progress of a load. It is reported after every part, in the thread that read the part."""

    object: str  # the one that the part belongs to
    done_bytes: int  # of all objects
    total_bytes: int
    seconds: float  # since the start of the load


ProgressCallback = Callable[[LoadProgress], None]


def stage_objects(manifest: ModelManifest, first: int, last: int) -> list[str]:
    """Names of the objects that layers [first, last) need, in the order of a forward pass.

    The first stage needs the embedding. If layers get inputs from token ids, every stage needs it. The last stage needs the
    head, and also the embedding if both are tied. Raises ValueError for a range that is not in the model.
    """
    if not 0 <= first < last <= manifest.num_layers:
        raise ValueError(f"layers {first}:{last} are no part of {manifest.name!r}, which has layers 0:{manifest.num_layers}")
    is_first, is_last = first == 0, last == manifest.num_layers
    names = ["embedding"] if is_first else []
    names += map(layer_object, range(first, last))
    if not is_first and (manifest.has_layer_inputs or (is_last and manifest.tied)):
        names.append("embedding")
    return [*names, "head"] if is_last else names


def iterate_layers(
    reader: "ObjectReader",
    manifest: ModelManifest,
    first: int,
    last: int,
    *,
    cache: "WeightCache | None" = None,
    on_progress: ProgressCallback | None = None,
    map_files: bool = False,
) -> Iterator[LoadedObject]:
    """Loads the objects that layers [first, last) need. Yields each when it is complete, in the order of a forward pass.

    map_files: if it is set, an object that was not in the cache is mapped from there after it has been written to it. Raises
    ValueError for a range outside the model, ChecksumMismatch, which names object and part, or the reader's errors.

    Reading starts with this call, not with the first `next`, and continues in threads. A caller that copies tensors should drop
    each object before it takes the next one. It then needs memory for the weights and one more layer.
    """
    names = stage_objects(manifest, first, last)
    return _Load(reader, {name: manifest.objects[name] for name in names}, cache, on_progress, map_files).objects()


def iterate_objects(reader: "ObjectReader", stored: Mapping[str, StoredObject]) -> Iterator[LoadedObject]:
    """Loads the objects in `stored`, in its order, as `iterate_layers` does."""
    return _Load(reader, stored, None, None, map_files=False, log_level=logging.DEBUG).objects()


class _ObjectLoad:
    """One object that is being read: its memory, and how many of its parts are missing.

    Several threads may read its parts.
    """

    def __init__(self, name: str, stored: StoredObject) -> None:
        self.name = name
        self.stored = stored
        self.complete: Future[memoryview] = Future()
        self.buffer = memoryview(b"")
        self.from_cache = False
        self.parts_left = len(stored.parts)

    def part(self, number: int) -> memoryview:
        start = number * self.stored.part_bytes
        return self.buffer[start : start + self.stored.part_bytes]

    def tensors(self, data: memoryview) -> dict[str, RawTensor]:
        """Returns the tensors in the object's bytes. Call it once: each tensor's bytes are freed with it."""
        return {
            name: RawTensor(span.dtype, span.shape, freed_with_last_view(data[span.start : span.end]), self.from_cache)
            for name, span in self.stored.tensors.items()
        }


class _Load:
    """One load of a stage. Threads read its parts in the order of a forward pass.

    A thread first opens an object: its bytes come from the cache, or its memory is allocated and its parts are queued.
    """

    def __init__(
        self,
        reader: "ObjectReader",
        stored: Mapping[str, StoredObject],
        cache: "WeightCache | None",
        on_progress: ProgressCallback | None,
        map_files: bool,
        log_level: int = logging.INFO,
    ) -> None:
        self._reader = reader
        self._map_files = map_files
        self._log_level = log_level
        self._cache = cache
        self._on_progress = on_progress
        self._order = deque(_ObjectLoad(name, each) for name, each in stored.items())
        self._unopened = deque(self._order)
        self._opening = 0
        self._parts: deque[tuple[_ObjectLoad, int]] = deque()
        self._incomplete = {load.name: load for load in self._order}
        self._total_bytes = sum(load.stored.bytes for load in self._order)
        self._done_bytes = 0
        self._changed = threading.Condition()
        self._started = time.monotonic()
        tasks = max(len(self._order), sum(len(load.stored.parts) for load in self._order))
        for number in range(min(CONNECTIONS, tasks)):
            threading.Thread(target=self._work, name=f"weights-{number}", daemon=True).start()

    def objects(self) -> Iterator[LoadedObject]:
        try:
            while self._order:
                load = self._order.popleft()
                yield LoadedObject(load.name, load.tensors(load.complete.result()))
        finally:
            self._stop()

    def _work(self) -> None:
        while (task := self._next()) is not None:
            load, number = task
            try:
                if number is None:
                    self._open(load)
                else:
                    self._load_part(load, number)
            except Exception as error:  # noqa: BLE001  the thread ends soon; the consumer of the objects gets the error
                for incomplete in self._stop():
                    incomplete.complete.set_exception(error)

    def _next(self) -> tuple[_ObjectLoad, int | None] | None:
        """Returns a thread's next task: (object, number of the part to read), or (object to open, None).

        None if no task is left. Waits while another thread opens an object, because that may add parts.
        """
        with self._changed:
            while True:
                if self._parts:
                    return self._parts.popleft()
                if self._unopened:
                    self._opening += 1
                    return self._unopened.popleft(), None
                if not self._opening:
                    return None
                self._changed.wait()

    def _open(self, load: _ObjectLoad) -> None:
        """Completes the object from the cache, or allocates its memory and queues its parts."""
        parts = 0
        try:
            cached = self._cache.get(load.stored) if self._cache else None
            load.from_cache = cached is not None
            load.buffer = new_memory(load.stored.bytes) if cached is None else cached
            parts = 0 if load.from_cache else len(load.stored.parts)
        finally:
            with self._changed:
                self._opening -= 1
                if load.name in self._incomplete:  # not stopped meanwhile
                    self._parts.extend((load, number) for number in range(parts))
                self._changed.notify_all()
        if not parts:
            self._report(load, load.stored.bytes)
            self._complete(load)

    def _load_part(self, load: _ObjectLoad, number: int) -> None:
        part = load.part(number)
        populate(part)
        self._read_verified(load.stored, number, part)
        self._report(load, len(part))
        with self._changed:
            load.parts_left -= 1
            finished = load.parts_left == 0
        if finished:
            if self._cache:
                self._cache.put(load.stored, load.buffer)
                if self._map_files and (mapped := self._cache.get(load.stored)) is not None:
                    load.buffer, load.from_cache = mapped, True
            self._complete(load)

    def _read_verified(self, stored: StoredObject, number: int, part: memoryview) -> None:
        start = number * stored.part_bytes
        published = stored.parts[number]
        seen = ""
        for _ in range(_READS_OF_A_BAD_PART):
            # Hashed piece by piece, in the processor's cache: that takes two thirds of the time of hashing the whole part.
            digest = blake3()
            self._reader.read_range_into(stored.key, start, part, total_bytes=stored.bytes, on_bytes=digest.update)
            seen = digest.hexdigest()
            if seen == published:
                return
            _log.warning("%s, part %d: BLAKE3 %s instead of %s; reading it again", stored.key, number, seen, published)
        raise ChecksumMismatch(
            f"{stored.key}, part {number} (bytes {start} to {start + len(part) - 1}): BLAKE3 {published} was "
            f"published, {seen} read, {_READS_OF_A_BAD_PART} "
            "times over; the object was altered, publish the model again (push --afresh)"
        )

    def _report(self, load: _ObjectLoad, count: int) -> None:
        with self._changed:
            self._done_bytes += count
            done = self._done_bytes
        if self._on_progress:
            self._on_progress(LoadProgress(load.name, done, self._total_bytes, time.monotonic() - self._started))

    def _complete(self, load: _ObjectLoad) -> None:
        _log.log(
            self._log_level,
            "%s is in%s, %d bytes; %d of %d after %.2f s",
            load.name,
            " (from the cache)" if load.from_cache else "",
            load.stored.bytes,
            self._done_bytes,
            self._total_bytes,
            time.monotonic() - self._started,
        )
        with self._changed:
            awaited = self._incomplete.pop(load.name, None) is not None
        if awaited:
            load.complete.set_result(load.buffer)

    def _stop(self) -> list[_ObjectLoad]:
        """Drops all tasks that have not begun. Returns the incomplete objects, which will never be complete."""
        with self._changed:
            self._parts.clear()
            self._unopened.clear()
            incomplete = list(self._incomplete.values())
            self._incomplete.clear()
            self._changed.notify_all()
            return incomplete
