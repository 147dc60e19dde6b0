"""The store as a tier: what a reservation does not find in memory or at a peer is read from there."""

from typing import Final

from eventing.wire.prefix_chain import BLOCK_TOKENS
from functions.stage.engine.tiers import Wanted
from functions.stage.kv.fetching import Away, Fetcher, FetchFailed
from functions.stage.models.kv_bytes import AlteredKV, CheckedKV, ForeignKV
from storage.errors import SealBroken, StorageError
from storage.kv.kv_store import KVObjects
from storage.kv.parts import KVPart


class StoreTier:
    """Implements `Tier`."""

    name: Final = "store"

    def __init__(self, kept: KVObjects, fetcher: Fetcher) -> None:
        self._kept = kept
        self._fetcher = fetcher

    def restore(self, wanted: Wanted) -> int:
        return self._fetcher.restore(wanted, lambda part, _: self._part(wanted, part), "the store")

    def _part(self, wanted: Wanted, part: KVPart) -> CheckedKV | None:
        key = self._kept.key(self._fetcher.kind, wanted.chain[part.end - 1], part)
        try:
            data = self._kept.get(key)
            return None if data is None else self._fetcher.checked(data, part.first * BLOCK_TOKENS, part.end * BLOCK_TOKENS)
        except (SealBroken, AlteredKV, ForeignKV) as error:
            self._kept.forget(key)
            raise FetchFailed(str(error)) from error
        except StorageError as error:
            raise Away(str(error)) from error
