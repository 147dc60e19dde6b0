"""Writing in pods, against a real S3 server: objects are written, read, replaced and listed, and refusals are named."""

from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from storage.errors import AccessDenied, BucketNotFound, ObjectNotFound, StorageError, StoreUnreachable, UnexpectedAnswer
from storage.store.payload_store import PayloadStore
from storage.store.settings import StoreSettings
from tests.support.storage.storage import FaultProxy

KEY = "claims/20261124T13Z/payload"


@pytest.fixture
def store(settings: StoreSettings) -> Iterator[PayloadStore]:
    with PayloadStore(settings) as store:
        yield store


@pytest.mark.parametrize("size", [0, 1, 3 * 2**20])
def test_an_object_is_read_as_it_was_put(store: PayloadStore, size: int) -> None:
    for filling in (b"a", b"b"):
        store.put(KEY, filling * size)
        assert store.get(KEY) == filling * size


@pytest.mark.parametrize("size", [0, 1, 8 * 2**20, 20 * 2**20 + 1])
def test_an_object_of_any_length_is_written_piece_by_piece(store: PayloadStore, size: int) -> None:
    data = (bytes(range(256)) * (size // 256 + 1))[:size]
    store.put_pieces(KEY, (data[start : start + 3 * 2**20] for start in range(0, size, 3 * 2**20)))
    assert store.get(KEY) == data


def test_an_object_whose_pieces_end_early_does_not_appear(store: PayloadStore) -> None:
    def pieces() -> Iterator[bytes]:
        yield bytes(9 * 2**20)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        store.put_pieces(f"{KEY}-broken", pieces())
    with pytest.raises(ObjectNotFound):
        store.get(f"{KEY}-broken")


def test_a_listing_may_begin_anywhere(store: PayloadStore) -> None:
    for number in range(5):
        store.put(f"pages/{number}", b"x")
    assert [found.key for found in store.list("pages/", after="pages/1", at_once=2)] == [f"pages/{n}" for n in (2, 3, 4)]


def test_connections_are_reused(proxy: FaultProxy) -> None:
    with PayloadStore(proxy.settings) as store:
        for number in range(3):
            store.put(f"{KEY}-{number}", b"x" * 100_000)
            store.get(f"{KEY}-{number}")
    assert proxy.connections == 1


def test_more_than_allowed_is_not_read(store: PayloadStore) -> None:
    store.put(KEY, b"12345")
    with pytest.raises(UnexpectedAnswer, match="5 bytes, at most 4"):
        store.get(KEY, max_bytes=4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"secret_access_key": "wrong"}, AccessDenied),
        ({"bucket": "elsewhere"}, BucketNotFound),
        ({"endpoint_url": "http://127.0.0.1:1"}, StoreUnreachable),
    ],
)
def test_refusals_are_named(settings: StoreSettings, changes: dict[str, Any], error: type[StorageError]) -> None:
    with PayloadStore(replace(settings, **changes), retry_seconds=0.3) as store:
        with pytest.raises(error):
            store.put(KEY, b"x")
        with pytest.raises(error):
            list(store.list("kept/"))


def test_a_missing_file_is_named(store: PayloadStore) -> None:
    with pytest.raises(ObjectNotFound, match="claims/nothing"):
        store.get("claims/nothing")


@pytest.mark.slow
def test_a_listing_has_all_keys_sizes_and_times_and_deleted_ones_are_gone(store: PayloadStore) -> None:
    before = datetime.now(UTC) - timedelta(seconds=5)
    for number in range(1100):  # more than a page has
        store.put(f"kept/a+b &ü/{number:04}", b"x" * (number % 3))
    found = list(store.list("kept/a+b &ü/"))
    assert [one.key for one in found] == [f"kept/a+b &ü/{number:04}" for number in range(1100)]
    assert [one.bytes for one in found[:4]] == [0, 1, 2, 0]
    assert all(before < one.modified < datetime.now(UTC) + timedelta(seconds=5) for one in found)
    for one in found[1:]:
        store.delete(one.key)
    store.delete("kept/was-never-there")
    assert [one.key for one in store.list("kept/")] == [found[0].key]
    assert list(store.list("nothing/")) == []


def test_missing_keys_are_asked_for_again_for_every_operation(settings: StoreSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> StoreSettings:
        raise OSError("the token service is away")

    with PayloadStore(settings, retry_seconds=0.0) as store:
        monkeypatch.setattr(store, "_keyed", none)
        for action in (
            lambda: store.put(KEY, b""),
            lambda: store.get(KEY),
            lambda: store.delete(KEY),
            lambda: [*store.list("")],
        ):
            with pytest.raises(StoreUnreachable, match="the token service is away"):
                action()
