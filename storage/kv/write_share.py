"""How much KV one pod may write to the store, so that all pods of its stage together stay within the configured bytes."""

import math
import secrets
import time
from datetime import UTC, datetime, timedelta
from typing import Final

from storage.kv.kv_store import KVObjects, Retention

_LISTING_SECONDS: Final = 600.0  # age at which the listing of stored objects is renewed: other pods write and delete, too
# 7/8 of the bytes are shared out; the last eighth is for pods that have counted fewer writers than there are.
_EIGHTH: Final = 8
_LARGEST_SHARE: Final = 32  # one in so many of the bytes: pods that start together have not seen one another yet


class WriteShare:
    """Counts what one pod writes between two listings of its stage's objects. Only the thread that writes may call it.

    Each pod that writes leaves a mark in the store. A listing deletes objects beyond the age, and the oldest beyond 3/4 of the
    bytes; what is then free, up to 7/8, is shared by all pods with a mark. A pod whose share is used up lists again.
    """

    def __init__(self, store: KVObjects, retention: Retention) -> None:
        """retention: bytes and age of what all pods of the stage keep."""
        self._store = store
        self._retention = retention
        self._mark = store.marks + secrets.token_hex(8)
        self._share_bytes = 0
        self._listed_at = -math.inf
        self.stored_keys: set[str] = set()  # of parts that need not be written; any thread may read it

    def admits(self, key: str, num_bytes: int) -> bool:
        """Whether the part `key` shall be written, which takes `num_bytes`. Lists the store first if need be.

        False if it is stored already, or larger than what is left for it. Raises a StorageError.
        """
        if time.monotonic() - self._listed_at > _LISTING_SECONDS or num_bytes > self._share_bytes:
            self._list(num_bytes)
        return key not in self.stored_keys and num_bytes <= self._share_bytes

    def writes(self, num_bytes: int) -> None:
        """Counts a part. Call it before the part is written: a write that fails may have reached the store."""
        self._share_bytes -= num_bytes

    def leave(self) -> None:
        """Removes this pod's mark, so that other pods share its part. Errors of the store are ignored."""
        self._share_bytes = 0
        self._store.forget(self._mark)

    def _list(self, num_bytes: int) -> None:
        """Renews the set of stored keys and this pod's share. num_bytes: of the part that it is to have room for.

        Objects older than half of the allowed age are left out of the set, so that they are written again while still in use.
        """
        self._store.mark(self._mark)
        objects, now = self._store.list(), datetime.now(UTC)
        marks = [found for found in objects if found.key.startswith(self._store.marks)]
        left = [found for found in marks if now - found.modified > timedelta(seconds=2 * _LISTING_SECONDS)]
        writers = max(1, len(marks) - len(left))
        most = self._retention.max_bytes
        shared = most - most // _EIGHTH
        free = min(max(most // _EIGHTH, writers * num_bytes), most // 2)
        parts = [found for found in objects if not found.key.startswith(self._store.marks)]
        over = Retention(shared - free, self._retention.max_age).expired(parts, now)
        self._store.delete([*over, *left])
        deleted = {found.key for found in over}
        kept = [found for found in parts if found.key not in deleted]
        self.stored_keys = {found.key for found in kept if now - found.modified < self._retention.max_age / 2}
        share = (shared - sum(found.bytes for found in kept)) // writers
        self._share_bytes = min(share, max(most // _LARGEST_SHARE, num_bytes))
        self._listed_at = time.monotonic()
