"""Idle conversations into the store: those that memory is taken from, and all that is left when the pod ends.

They are copied on the engine's thread; one other does the rest, at a limited rate. What does not fit into what may wait is
dropped: it is computed again.
"""

import logging
import math
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from queue import Full, Queue
from typing import Final, Protocol, TypeVar

from eventing.wire.prefix_chain import BLOCK_TOKENS
from functions.stage.engine.remembered import Left
from functions.stage.engine.sequences import SequenceTable
from functions.stage.kv.fetching import part_blocks
from functions.stage.models.kv_bytes import copied_kv, stamp
from functions.stage.models.kv_ranges import KVRanges
from storage.errors import StorageError
from storage.kv.kv_store import KVObjects, Retention
from storage.kv.parts import KVPart, parts_between

_log: Final = logging.getLogger(__name__)

_WAITING_PARTS: Final = 16
"""Copies of a few MB each."""
_LISTING_SECONDS: Final = 600.0
"""How long a listing is believed: others delete, too."""
_PAUSE_SECONDS: Final = 30.0
"""Behind a failure, until the store is tried again."""
_LOOK_SECONDS: Final = 0.02

T = TypeVar("T")
Written = Callable[[int], None]
"""Told of the bytes of each part that is in the store."""


class Memory(Protocol):
    """What is remembered, and the thread that may read it; an Engine is one."""

    def with_sequences(self, action: Callable[[SequenceTable], T]) -> T: ...


class Keeping:
    """Begin with `evicted` or `drain`, from any threads."""

    def __init__(self, kept: KVObjects, pool: KVRanges, retention: Retention, bytes_per_second: int, written: Written) -> None:
        self._kept = kept
        self._pool = pool
        self._most = part_blocks(pool.layout)
        self._retention = retention
        self._bytes_per_second = bytes_per_second
        self._written = written
        self._waiting: Queue[tuple[str, bytearray]] = Queue(_WAITING_PARTS)
        self._there: set[str] = set()
        """Keys that need not be written."""
        self._listed_at = -math.inf
        self._paused_until = -math.inf
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def evicted(self, left: Left) -> None:
        """On the engine's thread, before it is forgotten. Waits for nothing."""
        for key, part in self._to_write(left):
            if self._waiting.full() or self._paused:
                return
            self._offer(key, self._copied(left, part), wait_seconds=0.0)

    def drain(self, memory: Memory, seconds: float) -> None:
        """Writes all that is remembered, most recently used first; returns when that is done, or fails, or the time is over."""
        end = time.monotonic() + seconds
        for left in memory.with_sequences(lambda sequences: sequences.memory.left()):
            for key, part in self._to_write(left):
                data = memory.with_sequences(
                    lambda sequences, left=left, part=part: self._still(sequences, left, part)  # type: ignore[misc]
                )
                while data is not None and not self._offer(key, data, _LOOK_SECONDS):
                    if time.monotonic() >= end or self._paused:
                        return
        while self._waiting.unfinished_tasks and time.monotonic() < end and not self._paused:
            time.sleep(_LOOK_SECONDS)

    @property
    def _paused(self) -> bool:
        return time.monotonic() < self._paused_until

    def _to_write(self, left: Left) -> list[tuple[str, KVPart]]:
        parts = parts_between(0, len(left.chain), self._most)
        keyed = [(self._kept.key(self._pool.layout.kind, left.chain[part.end - 1], part), part) for part in parts]
        return [(key, part) for key, part in keyed if key not in self._there]

    def _still(self, sequences: SequenceTable, left: Left, part: KVPart) -> bytearray | None:
        return self._copied(left, part) if sequences.memory.still_has(left) else None

    def _copied(self, left: Left, part: KVPart) -> bytearray:
        return copied_kv(self._pool, left.handle, part.first * BLOCK_TOKENS, part.end * BLOCK_TOKENS)

    def _offer(self, key: str, data: bytearray, wait_seconds: float) -> bool:
        """Whether it was taken."""
        try:
            self._waiting.put((key, data), wait_seconds > 0, wait_seconds or None)
        except Full:
            return False
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._write_all, name="keep-kv", daemon=True)
                self._thread.start()
        return True

    def _write_all(self) -> None:
        while True:
            key, data = self._waiting.get()
            try:
                if not self._paused:
                    self._write(key, data)
            except StorageError as error:
                self._paused_until = time.monotonic() + _PAUSE_SECONDS
                _log.warning("conversations are not kept for %.0f s, and computed when they go on: %s", _PAUSE_SECONDS, error)
            except Exception:  # noqa: BLE001 - there is no other thread to write
                self._paused_until = time.monotonic() + _PAUSE_SECONDS
                _log.exception("conversations are not kept for %.0f s", _PAUSE_SECONDS)
            finally:
                self._waiting.task_done()

    def _write(self, key: str, data: bytearray) -> None:
        if time.monotonic() - self._listed_at > _LISTING_SECONDS:
            self._list()
        if key in self._there:
            return
        began = time.monotonic()
        stamp(data)
        num_bytes = self._kept.put(key, data)
        self._there.add(key)
        self._written(num_bytes)
        time.sleep(max(0.0, num_bytes / self._bytes_per_second - (time.monotonic() - began)))

    def _list(self) -> None:
        """Takes away what is too old or too much. What has half of its age behind it is written again when it is idle again."""
        objects, now = self._kept.list(), datetime.now(UTC)
        over = self._retention.expired(objects, now)
        self._kept.delete(over)
        young = {found.key for found in objects if now - found.modified < self._retention.max_age / 2}
        self._there = young.difference(found.key for found in over)
        self._listed_at = time.monotonic()
