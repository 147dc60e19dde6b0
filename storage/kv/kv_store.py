"""The object store as a tier of the KV cache: a stage's keys and values, found by their content.

    {prefix}/{pipeline}/{first layer}-{last layer}/{name}
    {prefix}/{pipeline}/{first layer}-{last layer}/writer-{pod}

The pipeline's fingerprint and the layers are plain text, because pruning needs them. The name is a keyed hash of the prefix
chain's digest, the part, and the layout of the part's bytes. If a part is lost, its KV is computed again.
"""

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final

from storage.errors import ObjectNotFound, StorageError
from storage.kv.parts import KVPart
from storage.kv.sealed import Sealer
from storage.store.object_reader import ObjectInfo
from storage.store.payload_store import PayloadStore

_MAX_PART_BYTES: Final = 2**30


class KVObjects:
    """The objects in the store that contain KV of one stage of a pipeline. Thread-safe."""

    def __init__(self, store: PayloadStore, sealer: Sealer, prefix: str, pipeline: str, layers: tuple[int, int]) -> None:
        self._store = store
        self._sealer = sealer
        self.folder = f"{prefix.strip('/')}/{pipeline}/{layers[0]}-{layers[1]}/"
        self.marks = self.folder + "writer-"  # begins the keys of marks: objects that say that a pod writes here

    def key(self, kind: str, digest: bytes, part: KVPart) -> str:
        """The object key of a part, that is, of the KV of some successive blocks of tokens.

        kind: names the layout of the part's bytes. digest: digest of the prefix chain at the part's last block.
        """
        place = part.first.to_bytes(4, "little") + part.count.to_bytes(4, "little")
        return self.folder + self._sealer.name(kind.encode(), digest, place)

    def get(self, key: str) -> bytearray | None:
        """Reads and decrypts an object; None if the store does not have it. Raises SealBroken or another StorageError."""
        try:
            sealed = self._store.get(key, max_bytes=_MAX_PART_BYTES)
        except ObjectNotFound:
            return None
        return self._sealer.open(key, sealed)

    def put(self, key: str, data: bytes | bytearray | memoryview) -> int:
        """Encrypts `data` and stores it as object `key`. Returns the number of bytes written. Raises a StorageError."""
        sealed = self._sealer.seal(key, data)
        self._store.put(key, bytes(sealed))
        return len(sealed)

    def mark(self, key: str) -> None:
        """Writes or renews the mark `key`, by which a pod says that it writes here. Raises a StorageError."""
        self._store.put(key, b"writes")

    def forget(self, key: str) -> None:
        """Deletes an object that can no longer be used, such as an altered one. Errors of the store are ignored."""
        with contextlib.suppress(StorageError):
            self._store.delete(key)

    def list(self) -> list[ObjectInfo]:
        """Lists all parts of this stage, and the marks of its pods. Raises a StorageError."""
        return list(self._store.list(self.folder))

    def delete(self, objects: Iterable[ObjectInfo]) -> None:
        for found in objects:
            self._store.delete(found.key)


@dataclass(frozen=True, slots=True)
class Retention:
    """Limits for the KV in the store: total bytes and age."""

    max_bytes: int
    max_age: timedelta

    def expired(self, objects: Iterable[ObjectInfo], now: datetime) -> list[ObjectInfo]:
        """Selects the objects to delete: those over `max_age`, and the oldest others until at most `max_bytes` remain."""
        kept_bytes = 0
        expired = []
        for found in sorted(objects, key=lambda each: (each.modified, each.key), reverse=True):
            kept_bytes += found.bytes
            if kept_bytes > self.max_bytes or now - found.modified > self.max_age:
                expired.append(found)
        return expired


def prune(store: PayloadStore, prefix: str, retention: Retention, now: datetime) -> list[ObjectInfo]:
    """Deletes stored KV beyond the limits of `retention`, and returns the deleted objects.

    The limits apply to the KV of all pipelines together. prefix: folder in the bucket that contains this KV. Raises a
    StorageError.
    """
    expired = retention.expired(store.list(f"{prefix.strip('/')}/"), now)
    for found in expired:
        store.delete(found.key)
    return expired


def pipeline_and_layers(key: str, prefix: str) -> tuple[str, str]:
    """Returns the pipeline's fingerprint and the stage's layers (such as `0-15`) from the key of a stored KV object.

    prefix: folder in the bucket that contains the KV of all pipelines.
    """
    pipeline, _, rest = key.removeprefix(prefix.strip("/") + "/").partition("/")
    return pipeline, rest.partition("/")[0]
