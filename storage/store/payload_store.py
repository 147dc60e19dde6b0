"""What a pod puts into the store and takes out again: payloads of events, by signed requests without boto3."""

import hashlib
from typing import Final

from storage.store.object_reader import ObjectReader
from storage.store.settings import StoreSettings
from storage.store.signing import object_path, signed_headers

MAX_PAYLOAD_BYTES: Final = 2**30
_RETRY_SECONDS: Final = 20.0
"""Somebody delivers the event again when this was not enough."""


class PayloadStore(ObjectReader):
    """An ObjectReader of whole objects that can write too. Thread-safe; a context manager."""

    def __init__(self, settings: StoreSettings, *, retry_seconds: float = _RETRY_SECONDS) -> None:
        super().__init__(settings, retry_seconds=retry_seconds)

    def get(self, key: str, *, max_bytes: int = MAX_PAYLOAD_BYTES) -> bytes:
        return super().get(key, max_bytes=max_bytes)

    def put(self, key: str, data: bytes) -> None:
        """Writes or overwrites an object in one request. Raises a StorageError subclass that names endpoint, bucket and key."""
        path, digest = object_path(self.settings, key), hashlib.sha256(data).hexdigest()
        for attempt in self._attempts(key):
            with attempt, self._exchange("PUT", key, signed_headers(self._keyed(), "PUT", path, digest), data) as response:
                response.read()
