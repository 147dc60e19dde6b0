"""Limits how much KV one pod writes to the store, so that all pods of its stage together keep within the configured bytes."""

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
    """Limits the bytes that one pod writes between two listings of its stage's objects.

    Only the thread that writes may call the methods. Each pod that writes leaves a mark in the store. A listing deletes objects
    beyond the maximum age, and the oldest others until about 3/4 of the configured bytes are used. The free bytes up to 7/8 are
    shared by all pods with a mark. A pod that has used up its share lists again.
    """

    def __init__(self, store: KVObjects, retention: Retention) -> None:
        """Creates a share of 0 bytes; the first call of `admits` lists the store.

        retention: limits for what all pods of the stage keep together.
        """
        self._store = store
        self._retention = retention
        self._mark = store.marks + secrets.token_hex(8)
        self._share_bytes = 0
        self._listed_at = -math.inf
        self.stored_keys: set[str] = set()  # of parts that need not be written; any thread may read it

    def admits(self, key: str, num_bytes: int) -> bool:
        """Whether to write the part `key` of `num_bytes`.

        False if the part is stored already, or larger than what is left of this pod's share. Lists the store first if the last
        listing is old or the share is too small. Raises a StorageError.
        """
        if time.monotonic() - self._listed_at > _LISTING_SECONDS or num_bytes > self._share_bytes:
            self._list(num_bytes)
        return key not in self.stored_keys and num_bytes <= self._share_bytes

    def writes(self, num_bytes: int) -> None:
        """Subtracts a part from the share.

        Call it before the part is written: a write that fails may have reached the store.
        """
        self._share_bytes -= num_bytes

    def leave(self) -> None:
        """Removes this pod's mark, so that other pods get its share. Errors of the store are ignored."""
        self._share_bytes = 0
        self._store.forget(self._mark)

    def _list(self, num_bytes: int) -> None:
        """Lists the store, deletes expired objects, and renews the set of stored keys and this pod's share.

        num_bytes: size of the part to be written next, for which the share should suffice. Objects older than half of the
        allowed age are left out of the set, so that they are written again while still in use.
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
