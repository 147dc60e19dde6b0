"""Keys and values in a real S3 server: kept under opaque names, refused if altered, pruned."""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import pytest

from storage.errors import SealBroken
from storage.kv.kv_store import KVObjects, Retention
from storage.kv.parts import KVPart
from storage.kv.sealed import Sealer
from storage.store.object_reader import ObjectInfo
from storage.store.payload_store import PayloadStore
from storage.store.settings import StoreSettings

DIGEST = bytes(range(16))
SEALER = Sealer(b"k" * 32)
NOW = datetime(2026, 11, 26, tzinfo=UTC)


@pytest.fixture(scope="module")
def objects(settings: StoreSettings) -> Iterator[PayloadStore]:
    with PayloadStore(settings) as store:
        yield store


def kv_store(objects: PayloadStore, pipeline: str = "0123456789", layers: tuple[int, int] = (0, 10)) -> KVObjects:
    return KVObjects(objects, SEALER, "kv", pipeline, layers)


def test_a_part_is_read_under_its_own_name_only(objects: PayloadStore) -> None:
    store = kv_store(objects)
    key = store.key("native", DIGEST, KVPart(0, 8))
    assert store.get(key) is None
    written = store.put(key, b"keys and values" * 1000)
    assert store.get(key) == b"keys and values" * 1000
    assert [(one.key, one.bytes) for one in store.list()] == [(key, written)]
    others = {
        store.key("torch", DIGEST, KVPart(0, 8)),
        store.key("native", DIGEST[::-1], KVPart(0, 8)),
        store.key("native", DIGEST, KVPart(8, 8)),
        store.key("native", DIGEST, KVPart(0, 4)),
        kv_store(objects, layers=(10, 20)).key("native", DIGEST, KVPart(0, 8)),
        kv_store(objects, "another123").key("native", DIGEST, KVPart(0, 8)),
    }
    assert len(others) == 6
    assert all(store.get(other) is None for other in others)


def test_stored_names_and_contents_reveal_nothing(objects: PayloadStore) -> None:
    store = kv_store(objects, "secret0000")
    key = store.key("native", DIGEST, KVPart(0, 1))
    store.put(key, b"what a client said" * 100)
    assert b"client" not in objects.get(key)
    assert DIGEST.hex() not in key


def test_an_altered_truncated_or_exchanged_object_is_refused(objects: PayloadStore) -> None:
    store = kv_store(objects, "altered000")
    key, other = store.key("native", DIGEST, KVPart(0, 1)), store.key("native", DIGEST, KVPart(1, 1))
    store.put(key, b"a" * 1000)
    store.put(other, b"b" * 1000)
    good = objects.get(key)
    for bad in (good[:-1], good[:500] + bytes([good[500] ^ 1]) + good[501:], b"", objects.get(other)):
        objects.put(key, bad)
        with pytest.raises(SealBroken):
            store.get(key)
    objects.put(key, good)
    assert store.get(key) == b"a" * 1000


def test_old_objects_expire_and_then_the_oldest_until_the_rest_fits(objects: PayloadStore) -> None:
    def found(name: str, size: int, hours: int) -> ObjectInfo:
        return ObjectInfo(name, size, NOW - timedelta(hours=hours))

    listed = [found("new", 10, 0), found("hour", 10, 1), found("day", 10, 24), found("week", 1, 7 * 24)]
    assert [one.key for one in Retention(100, timedelta(days=2)).expired(listed, NOW)] == ["week"]
    assert [one.key for one in Retention(20, timedelta(days=2)).expired(listed, NOW)] == ["day", "week"]
    assert [one.key for one in Retention(5, timedelta(days=30)).expired(listed, NOW)] == ["new", "hour", "day", "week"]
    store = kv_store(objects, "pruned0000")
    for number in range(3):
        store.put(store.key("native", DIGEST, KVPart(number, 1)), b"x" * 1000)
    store.delete(Retention(1500, timedelta(hours=1)).expired(store.list(), datetime.now(UTC)))
    assert len(store.list()) == 1
