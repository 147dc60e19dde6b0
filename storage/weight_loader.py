"""Loads a stage's layers out of the store: exactly its objects, in parallel ranged reads, into the memory that tensors use.

No torch here, so that bytes flow while torch is still being imported. Every part is verified as soon as it is in.
"""

import logging
import mmap
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Final, Protocol

from storage.errors import ChecksumMismatch
from storage.model_repository import Manifest, StoredObject, layer_object, part_checksum

_log = logging.getLogger(__name__)

CONNECTIONS: Final = 4
"""Measured on loopback: more are no faster, fewer are slower."""
_READS_OF_A_BAD_PART: Final = 3


@dataclass(frozen=True, slots=True)
class RawTensor:
    """A tensor's bytes where they were read to: writable, aligned to 64 bytes; `torch.frombuffer` makes a tensor of them.

    The memory lives for as long as any of its object's views does.
    """

    dtype: str
    """A safetensors name: F32, BF16, F16, I8."""
    shape: tuple[int, ...]
    data: memoryview


@dataclass(frozen=True, slots=True)
class LoadedObject:
    """One object, complete and verified."""

    name: str
    """embedding, layer-00007, or head."""
    tensors: dict[str, RawTensor]


@dataclass(frozen=True, slots=True)
class LoadProgress:
    """Told after every part, from the threads that read."""

    object: str
    done_bytes: int
    total_bytes: int
    seconds: float
    """Since the start of the load."""


ProgressCallback = Callable[[LoadProgress], None]


class RangeReader(Protocol):
    """An ObjectReader."""

    def read_range_into(self, key: str, start: int, view: memoryview, *, total_bytes: int | None = None) -> None: ...


class Cache(Protocol):
    """A WeightCache."""

    def get(self, stored: StoredObject) -> memoryview | None:
        """The verified bytes of an object, writable; None where it has none."""

    def put(self, stored: StoredObject, data: memoryview) -> None: ...


def stage_objects(manifest: Manifest, first: int, last: int) -> list[str]:
    """Names of the objects that layers [first, last) need, in the order of a forward pass.

    The first group has the embedding, the last one the head, and the embedding too where the two are tied.
    Raises ValueError for a range that is not in the model.
    """
    if not 0 <= first < last <= manifest.num_layers:
        raise ValueError(f"layers {first}:{last} are no part of {manifest.name!r}, which has layers 0:{manifest.num_layers}")
    is_first, is_last = first == 0, last == manifest.num_layers
    names = ["embedding"] if is_first else []
    names += map(layer_object, range(first, last))
    if is_last and manifest.tied and not is_first:
        names.append("embedding")
    return [*names, "head"] if is_last else names


def load_layers(
    reader: RangeReader,
    manifest: Manifest,
    first: int,
    last: int,
    *,
    cache: Cache | None = None,
    on_progress: ProgressCallback | None = None,
) -> dict[str, RawTensor]:
    """All tensors that layers [first, last) need, by their names in the checkpoint.

    Raises ValueError for the range, ChecksumMismatch naming object and part, or what the reader raises.
    """
    tensors: dict[str, RawTensor] = {}
    for loaded in iterate_layers(reader, manifest, first, last, cache=cache, on_progress=on_progress):
        tensors |= loaded.tensors
    return tensors


def iterate_layers(
    reader: RangeReader,
    manifest: Manifest,
    first: int,
    last: int,
    *,
    cache: Cache | None = None,
    on_progress: ProgressCallback | None = None,
) -> Iterator[LoadedObject]:
    """The same object by object, in the order of a forward pass, while the later ones are still being read.

    Reading starts with this call, not with the first `next`. Drop an object before taking the next one, and memory stays
    at the weights plus one layer, also where the caller copies.
    """
    load = _Load(reader, manifest, stage_objects(manifest, first, last), cache, on_progress)
    return load.objects()


class _ObjectLoad:
    """One object on its way in. Its parts may be read by several threads."""

    def __init__(self, name: str, stored: StoredObject) -> None:
        self.name = name
        self.stored = stored
        self.complete: Future[memoryview] = Future()
        self.lock = threading.Lock()
        self.buffer: memoryview | None = None
        self.from_cache = False
        self.parts_left = len(stored.parts)

    def whole(self) -> memoryview:
        assert self.buffer is not None
        return self.buffer

    def part(self, number: int) -> memoryview:
        start = number * self.stored.part_bytes
        return self.whole()[start : start + self.stored.part_bytes]

    def tensors(self, data: memoryview) -> dict[str, RawTensor]:
        spans = self.stored.tensors.items()
        return {name: RawTensor(span.dtype, span.shape, data[span.start : span.end]) for name, span in spans}


class _Load:
    """The threads that read one stage's parts, in the order of a forward pass."""

    def __init__(
        self,
        reader: RangeReader,
        manifest: Manifest,
        names: list[str],
        cache: Cache | None,
        on_progress: ProgressCallback | None,
    ) -> None:
        self._reader = reader
        self._cache = cache
        self._on_progress = on_progress
        self._order = deque(_ObjectLoad(name, manifest.objects[name]) for name in names)
        self._parts = deque((load, number) for load in self._order for number in range(len(load.stored.parts)))
        self._incomplete = {load.name: load for load in self._order}
        self._total_bytes = sum(load.stored.bytes for load in self._order)
        self._done_bytes = 0
        self._lock = threading.Lock()
        self._started = time.monotonic()
        for number in range(min(CONNECTIONS, len(self._parts))):
            threading.Thread(target=self._work, name=f"weights-{number}", daemon=True).start()

    def objects(self) -> Iterator[LoadedObject]:
        try:
            while self._order:
                load = self._order.popleft()
                yield LoadedObject(load.name, load.tensors(load.complete.result()))
        finally:
            self._parts.clear()

    def _work(self) -> None:
        while True:
            try:
                load, number = self._parts.popleft()
            except IndexError:
                return
            try:
                self._load_part(load, number)
            except Exception as error:  # noqa: BLE001  the thread ends here; whoever waits for the objects gets it
                self._fail(error)

    def _load_part(self, load: _ObjectLoad, number: int) -> None:
        with load.lock:
            if load.buffer is None:
                self._open(load)
        if load.from_cache:
            return
        part = load.part(number)
        self._read_verified(load.stored, number, part)
        self._tell(load, len(part))
        with load.lock:
            load.parts_left -= 1
            finished = load.parts_left == 0
        if finished:
            if self._cache:
                self._cache.put(load.stored, load.whole())
            self._complete(load)

    def _open(self, load: _ObjectLoad) -> None:
        """Takes the object from the cache or makes room for it."""
        load.buffer = self._cache.get(load.stored) if self._cache else None
        load.from_cache = load.buffer is not None
        if load.from_cache:
            self._tell(load, load.stored.bytes)
            self._complete(load)
        else:
            load.buffer = _aligned_memory(load.stored.bytes)

    def _read_verified(self, stored: StoredObject, number: int, part: memoryview) -> None:
        start = number * stored.part_bytes
        seen = ""
        for _ in range(_READS_OF_A_BAD_PART):
            self._reader.read_range_into(stored.key, start, part, total_bytes=stored.bytes)
            seen = part_checksum(part)
            if seen == stored.parts[number]:
                return
            _log.warning(
                "%s, part %d: checksum %s instead of %s; reading it again", stored.key, number, seen, stored.parts[number]
            )
        raise ChecksumMismatch(
            f"{stored.key}, part {number} (bytes {start} to {start + len(part) - 1}): checksum {stored.parts[number]} was "
            f"published, {seen} read, {_READS_OF_A_BAD_PART} times over; the object was altered, publish the model again"
        )

    def _tell(self, load: _ObjectLoad, count: int) -> None:
        with self._lock:
            self._done_bytes += count
            done = self._done_bytes
        if self._on_progress:
            self._on_progress(LoadProgress(load.name, done, self._total_bytes, time.monotonic() - self._started))

    def _complete(self, load: _ObjectLoad) -> None:
        _log.info(
            "%s is in%s, %d bytes; %d of %d after %.2f s",
            load.name,
            " (from the cache)" if load.from_cache else "",
            load.stored.bytes,
            self._done_bytes,
            self._total_bytes,
            time.monotonic() - self._started,
        )
        with self._lock:
            if self._incomplete.pop(load.name, None):
                load.complete.set_result(load.whole())

    def _fail(self, error: Exception) -> None:
        self._parts.clear()
        with self._lock:
            for load in self._incomplete.values():
                load.complete.set_exception(error)
            self._incomplete.clear()


def _aligned_memory(size: int) -> memoryview:
    """Writable, at a page's boundary, zero pages until touched."""
    # Without MADV_HUGEPAGE: measured, finding whole huge pages took a loaded machine two to three times as long to fill.
    return memoryview(mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
