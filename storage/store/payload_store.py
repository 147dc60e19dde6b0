"""What a pod puts into the store and takes out again, payloads of events and others, by signed requests without boto3."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Final

from storage.errors import UnexpectedAnswer
from storage.store.object_reader import ObjectReader
from storage.store.settings import StoreSettings
from storage.store.signing import canonical_query, object_path, signed_headers

if TYPE_CHECKING:
    from xml.etree.ElementTree import Element

MAX_PAYLOAD_BYTES: Final = 2**30
_RETRY_SECONDS: Final = 20.0
"""Somebody delivers the event again when this was not enough."""


@dataclass(frozen=True, slots=True)
class StoredObject:
    """As a listing has it."""

    key: str
    bytes: int
    modified: datetime
    """Aware."""


class PayloadStore(ObjectReader):
    """An ObjectReader of whole objects that can write too. Thread-safe; a context manager."""

    def __init__(self, settings: StoreSettings, *, stall_seconds: float = 10.0, retry_seconds: float = _RETRY_SECONDS) -> None:
        super().__init__(settings, stall_seconds=stall_seconds, retry_seconds=retry_seconds)

    def get(self, key: str, *, max_bytes: int = MAX_PAYLOAD_BYTES) -> bytes:
        return super().get(key, max_bytes=max_bytes)

    def put(self, key: str, data: bytes) -> None:
        """Writes or overwrites an object in one request. Raises a StorageError subclass that names endpoint, bucket and key."""
        path, digest = object_path(self.settings, key), hashlib.sha256(data).hexdigest()
        for attempt in self._attempts(key):
            with attempt, self._exchange("PUT", key, signed_headers(self._keyed(), "PUT", path, digest), data) as response:
                response.read()

    def delete(self, key: str) -> None:
        """Harmless where there is none. Raises a StorageError subclass that names endpoint, bucket and key."""
        path = object_path(self.settings, key)
        for attempt in self._attempts(key):
            with attempt, self._exchange("DELETE", key, signed_headers(self._keyed(), "DELETE", path)) as response:
                response.read()

    def list(self, prefix: str) -> Iterator[StoredObject]:
        """All objects whose keys begin with `prefix` (ListObjectsV2). Raises a StorageError subclass."""
        asked = {"list-type": "2", "prefix": prefix}
        while True:
            page = self._page(asked)
            yield from _objects(page)
            following = page.findtext("{*}NextContinuationToken")
            if page.findtext("{*}IsTruncated") != "true" or not following:
                return
            asked["continuation-token"] = following

    def _page(self, asked: dict[str, str]) -> "Element":
        from xml.etree import ElementTree  # no start needs it

        query, path = canonical_query(asked), object_path(self.settings, "")
        answer = b""
        for attempt in self._attempts(asked["prefix"]):
            with attempt:
                headers = signed_headers(self._keyed(), "GET", path, query=query)
                with self._exchange("GET", "", headers, query=query) as response:
                    answer = response.read()
        try:
            return ElementTree.fromstring(answer)
        except ElementTree.ParseError as error:
            raise UnexpectedAnswer(f"{self.settings.place} answers a listing with what is no XML: {error}") from error


def _objects(page: "Element") -> Iterator[StoredObject]:
    for found in page.iterfind("{*}Contents"):
        modified = found.findtext("{*}LastModified") or "1970-01-01T00:00:00Z"
        key, size = found.findtext("{*}Key") or "", found.findtext("{*}Size") or "0"
        yield StoredObject(key, int(size), datetime.fromisoformat(modified))
