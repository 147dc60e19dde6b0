"""A store that drips bytes is given up like one that stalls, when reading and writing. A slow one is waited for."""

import io
import time
from collections.abc import Callable

import pytest

from storage.errors import StoreUnreachable
from storage.store.object_reader import ObjectReader
from storage.store.object_store import ObjectStore
from storage.store.paced import LEAST_BYTES_PER_SECOND, Pace, TooSlow
from storage.store.payload_store import PayloadStore
from storage.store.settings import StoreSettings
from tests.support.storage.dripping_store import Drips, dripping_store

NOWHERE = StoreSettings(
    endpoint_url="http://127.0.0.1:9", bucket="lamina", access_key_id="key", secret_access_key="secret", region="us-east-1"
)
STALL_SECONDS = 0.3  # six times as long as a byte takes: never without one for so long
LENGTH = 2**24
AT_MOST_SECONDS = 40.0  # attempts, pauses between them, and a busy machine. By bytes it would be a week


@pytest.mark.slow
@pytest.mark.parametrize("drips", ["head", "body"])
def test_a_pod_leaves_a_store_that_drips(drips: Drips) -> None:
    began = time.monotonic()
    with (
        dripping_store(NOWHERE, drips, LENGTH) as settings,
        ObjectReader(settings, stall_seconds=STALL_SECONDS, retry_seconds=2.0) as reader,
    ):
        with pytest.raises(StoreUnreachable, match=r"'part' .* TooSlow: timed out: less than 16384 bytes per second"):
            reader.read_range_into("part", 0, memoryview(bytearray(LENGTH)), total_bytes=LENGTH)
        with pytest.raises(StoreUnreachable, match="TooSlow"):
            reader.get("manifest.json")
    assert time.monotonic() - began < AT_MOST_SECONDS


ACTIONS: dict[str, Callable[[ObjectStore], object]] = {
    "get": lambda store: store.get("key"),
    "put": lambda store: store.put("key", b"small"),
    "put_stream": lambda store: store.put_stream("key", io.BytesIO(bytes(2**23))),
    "list": lambda store: list(store.list("key")),
    "delete": lambda store: store.delete("key"),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("action", "drips"),
    [("put_stream", "request"), *((action, "head") for action in ACTIONS), ("get", "body"), ("list", "body")],
)
def test_a_publisher_leaves_a_store_that_drips(action: str, drips: Drips) -> None:
    began = time.monotonic()
    with (
        dripping_store(NOWHERE, drips, LENGTH) as settings,
        pytest.raises(StoreUnreachable, match=r"less than 16384 bytes per second|Read timeout"),
    ):
        ACTIONS[action](ObjectStore(settings, stall_seconds=STALL_SECONDS))
    assert time.monotonic() - began < AT_MOST_SECONDS


@pytest.mark.slow
def test_a_claimed_payload_is_not_written_for_ever() -> None:
    with dripping_store(NOWHERE, "request", LENGTH) as settings, PayloadStore(settings, retry_seconds=1.0) as store:
        store._stall_seconds = STALL_SECONDS
        with pytest.raises(StoreUnreachable, match="did not deliver"):
            store.put("key", bytes(LENGTH))


def test_a_slow_transfer_with_pauses_is_not_too_slow() -> None:
    pace = Pace(stall_seconds=10.0)
    for _ in range(1000):
        pace.waited(4.0, 4 * LEAST_BYTES_PER_SECOND)
    pace.waited(10.0, 1)
    pace.waited(9.0, 1)
    with pytest.raises(TooSlow):
        pace.waited(2.0, 1)


def test_a_fast_beginning_is_no_credit_for_hours() -> None:
    pace = Pace(stall_seconds=10.0)
    pace.waited(0.1, 2**30)
    pace.waited(9.0, 1)
    pace.waited(9.0, 1)
    with pytest.raises(TooSlow):
        pace.waited(9.0, 1)
