"""The store as a tier: a stage's parts of conversations, by what they hold.

    {prefix}/{pipeline}/{first layer}-{last layer}/{name}

The pipeline's fingerprint and the layers can be read, so that they can be pruned; the name is a keyed hash of the chain's
digest, the part and the layout of its bytes. Nothing in it is ever needed: a part that is lost is computed again.
"""

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final

from storage.errors import ObjectNotFound, StorageError
from storage.kv.parts import Part
from storage.kv.sealed import Sealer
from storage.store.payload_store import PayloadStore, StoredObject

_MOST_BYTES: Final = 2**30


class KVStore:
    """Of one stage. Thread-safe."""

    def __init__(self, store: PayloadStore, sealer: Sealer, prefix: str, pipeline: str, layers: tuple[int, int]) -> None:
        self._store = store
        self._sealer = sealer
        self.folder = f"{folder_of(prefix, pipeline)}{layers[0]}-{layers[1]}/"

    def key(self, kind: str, digest: bytes, part: Part) -> str:
        """kind: of the layout of its bytes. digest: of the chain, at the part's last block."""
        place = part.first.to_bytes(4, "little") + part.count.to_bytes(4, "little")
        return self.folder + self._sealer.name(kind.encode(), digest, place)

    def get(self, key: str) -> bytearray | None:
        """None where there is none. Raises SealBroken or another StorageError."""
        try:
            sealed = self._store.get(key, max_bytes=_MOST_BYTES)
        except ObjectNotFound:
            return None
        return self._sealer.open(key, sealed)

    def put(self, key: str, data: bytes | bytearray | memoryview) -> int:
        """Bytes written. Raises a StorageError."""
        sealed = self._sealer.seal(key, data)
        self._store.put(key, bytes(sealed))
        return len(sealed)

    def forget(self, key: str) -> None:
        """Deletes what cannot be used, so that it is written anew; where that fails nothing is lost."""
        with contextlib.suppress(StorageError):
            self._store.delete(key)

    def list(self) -> list[StoredObject]:
        """What this stage has there. Raises a StorageError."""
        return list(self._store.list(self.folder))

    def delete(self, objects: Iterable[StoredObject]) -> None:
        for found in objects:
            self._store.delete(found.key)


@dataclass(frozen=True, slots=True)
class Allowance:
    """What may lie in the store."""

    max_bytes: int
    max_age: timedelta

    def over(self, objects: Iterable[StoredObject], now: datetime) -> list[StoredObject]:
        """What has to go: all that is too old, and the oldest of the rest until the others fit."""
        kept_bytes = 0
        over = []
        for found in sorted(objects, key=lambda one: (one.modified, one.key), reverse=True):
            kept_bytes += found.bytes
            if kept_bytes > self.max_bytes or now - found.modified > self.max_age:
                over.append(found)
        return over


def prune(store: PayloadStore, prefix: str, allowance: Allowance, now: datetime) -> list[StoredObject]:
    """Of all pipelines together; what went. Raises a StorageError."""
    over = allowance.over(store.list(f"{prefix.strip('/')}/"), now)
    for found in over:
        store.delete(found.key)
    return over


def folder_of(prefix: str, pipeline: str) -> str:
    """Of all stages of a pipeline."""
    return f"{prefix.strip('/')}/{pipeline}/"


def folders(key: str, prefix: str) -> tuple[str, str]:
    """Of an object: fingerprint and layers."""
    pipeline, _, rest = key.removeprefix(prefix.strip("/") + "/").partition("/")
    return pipeline, rest.partition("/")[0]
