"""The tier of the store: keeps the KV of idle conversations, for the case that neither memory nor a peer has it.

KV is written when the prefix cache evicts it, and when the pod shuts down. The engine's thread copies the bytes into a bounded
queue, and another thread writes them to the store at a limited rate. If KV does not fit into the queue or into the pod's share
of the store, it is dropped. It is computed again when the conversation continues.
"""

import logging
import math
import threading
import time
from collections.abc import Callable
from functools import partial
from queue import SimpleQueue
from typing import Final

from eventing.wire.prefix_chain import BLOCK_TOKENS
from functions.stage.engine.engine import Engine
from functions.stage.engine.kv_tiers import RestoreRequest
from functions.stage.engine.prefix_cache import CachedPrefix
from functions.stage.engine.sequences import SequenceTable
from functions.stage.kv.fetching import Fetcher, FetchFailed, TierAway, part_blocks
from functions.stage.models.kv_bytes import AlteredKV, CheckedKV, ForeignKV, copied_kv, stamp
from functions.stage.models.kv_cache import KVBlocks
from storage.errors import SealBroken, StorageError
from storage.kv.kv_store import KVObjects, Retention
from storage.kv.parts import KVPart, parts_between
from storage.kv.sealed import SEAL_BYTES
from storage.kv.write_share import WriteShare

_log: Final = logging.getLogger(__name__)

WAITING_BYTES: Final = 2**26  # most bytes of copies that wait to be written, or one part
_PAUSE_SECONDS: Final = 30.0  # after a failure, until the store is tried again
_POLL_SECONDS: Final = 0.02

Written = Callable[[int], None]
"""A function that gets the size in bytes of each part that was written to the store, for metrics."""


class StoreTier:
    """Implements `Tier` with the store. Reads the parts that the `KVWriter` of any pod has written."""

    name: Final = "store"

    def __init__(self, store: KVObjects, fetcher: Fetcher) -> None:
        self._store = store
        self._fetcher = fetcher

    def restore(self, request: RestoreRequest) -> int:
        return self._fetcher.restore(request, lambda part, _: self._part(request, part), "the store")

    def _part(self, request: RestoreRequest, part: KVPart) -> CheckedKV | None:
        """Reads and verifies one part. None if the store does not have it.

        Deletes a part that fails verification. Raises FetchFailed.
        """
        key = self._store.key(self._fetcher.layout.kind, request.chain[part.end - 1], part)
        try:
            data = self._store.get(key)
            return None if data is None else self._fetcher.checked(data, part.first * BLOCK_TOKENS, part.end * BLOCK_TOKENS)
        except (SealBroken, AlteredKV, ForeignKV) as error:
            self._store.forget(key)
            raise FetchFailed(str(error)) from error
        except StorageError as error:
            raise TierAway(str(error)) from error


class KVWriter:
    """Writes cached prefixes to the store, in a thread of its own.

    The thread starts with the first prefix and never ends.
    """

    def __init__(self, store: KVObjects, pool: KVBlocks, retention: Retention, bytes_per_second: int, written: Written) -> None:
        """Prepares to write KV from `pool` to `store`, without starting the thread.

        retention: limits for all pods of the stage together. bytes_per_second: limit of this pod. written: see `Written`.
        """
        self._store = store
        self._pool = pool
        self._most_blocks = part_blocks(pool.layout)
        self._share = WriteShare(store, retention)
        self._bytes_per_second = bytes_per_second
        self._written = written
        self._waiting: SimpleQueue[tuple[str, bytearray]] = SimpleQueue()
        self.waiting_bytes = 0  # of copies that wait to be written or are being written
        self._paused_until = -math.inf
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def evicted(self, prefix: CachedPrefix) -> None:
        """Copies a prefix into the queue just before it is evicted. The caller must hold the engine's lock.

        Drops parts that do not fit into the queue, because the engine must not wait.
        """
        for key, part in self._missing_parts(prefix):
            if self._paused or not self._copy(prefix, key, part):
                return

    def drain(self, engine: Engine, seconds: float) -> None:
        """Writes all cached prefixes, most recently used first. Call it when the pod shuts down, without the engine's lock.

        Blocks until all prefixes are written, the store fails, or `seconds` have passed.
        """
        end = time.monotonic() + seconds
        for prefix in engine.with_sequences(lambda sequences: sequences.cache.cached()):
            for key, part in self._missing_parts(prefix):
                while not engine.with_sequences(partial(self._copy_if_cached, prefix, key, part)):
                    if time.monotonic() >= end or self._paused:
                        return
                    time.sleep(_POLL_SECONDS)
        while self.waiting_bytes and time.monotonic() < end and not self._paused:
            time.sleep(_POLL_SECONDS)
        if not self._paused:
            self._share.leave()

    @property
    def _paused(self) -> bool:
        return time.monotonic() < self._paused_until

    def _missing_parts(self, prefix: CachedPrefix) -> list[tuple[str, KVPart]]:
        # Readers that go on from a checkpoint ask for a part that ends there.
        ends = [len(prefix.chain), *(tokens // BLOCK_TOKENS for tokens in prefix.checkpoints)]
        parts = sorted({part for end in ends for part in parts_between(0, end, self._most_blocks)})
        keyed = [(self._store.key(self._pool.layout.kind, prefix.chain[part.end - 1], part), part) for part in parts]
        return [(key, part) for key, part in keyed if key not in self._share.stored_keys]

    def _copy_if_cached(self, prefix: CachedPrefix, key: str, part: KVPart, sequences: SequenceTable) -> bool:
        return not sequences.cache.still_holds(prefix) or self._copy(prefix, key, part)

    def _copy(self, prefix: CachedPrefix, key: str, part: KVPart) -> bool:
        """Copies a part into the queue. Copies nothing and returns False if WAITING_BYTES would be exceeded.

        The caller must hold the engine's lock.
        """
        num_bytes = part.count * BLOCK_TOKENS * self._pool.layout.token_bytes + self._pool.layout.state_bytes
        if self.waiting_bytes and self.waiting_bytes + num_bytes > WAITING_BYTES:
            return False
        data = copied_kv(self._pool, prefix.handle, part.first * BLOCK_TOKENS, part.end * BLOCK_TOKENS)
        with self._lock:
            self.waiting_bytes += len(data)
            if self._thread is None:
                self._thread = threading.Thread(target=self._write_all, name="keep-kv", daemon=True)
                self._thread.start()
        self._waiting.put((key, data))
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
            except Exception:  # noqa: BLE001 - this is the only thread that writes: it must go on
                self._paused_until = time.monotonic() + _PAUSE_SECONDS
                _log.exception("conversations are not kept for %.0f s", _PAUSE_SECONDS)
            finally:
                with self._lock:
                    self.waiting_bytes -= len(data)

    def _write(self, key: str, data: bytearray) -> None:
        num_bytes = len(data) + SEAL_BYTES
        if not self._share.admits(key, num_bytes):
            return
        began = time.monotonic()
        stamp(data)
        self._share.writes(num_bytes)
        self._store.put(key, data)
        self._share.stored_keys.add(key)
        self._written(num_bytes)
        time.sleep(max(0.0, num_bytes / self._bytes_per_second - (time.monotonic() - began)))
