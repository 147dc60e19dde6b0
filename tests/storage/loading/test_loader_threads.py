"""How the loader keeps its threads busy: several objects opened at once, one large object read by all."""

import os
import threading
from collections.abc import Callable
from typing import Final

import pytest
from blake3 import blake3

from storage.loading.memory import new_memory, populate
from storage.loading.weight_loader import CONNECTIONS
from storage.models.model_repository import ModelManifest, StoredObject, layer_object
from tests.storage.models.test_model_repository import a_manifest
from tests.support.storage.storage import load_layers

PART: Final = 4096
DEADLINE_SECONDS: Final = 20.0


def manifest_of(contents: dict[str, bytes]) -> ModelManifest:
    """The manifest of a model with these layers."""
    objects = {
        name: StoredObject(
            key=name,
            bytes=len(data),
            part_bytes=PART,
            parts=tuple(blake3(data[start : start + PART]).hexdigest() for start in range(0, len(data), PART)),
            tensors={},
        )
        for name, data in contents.items()
    }
    return a_manifest(num_layers=100, objects=objects, files={})


class MeetingReader:
    """Reads from memory; a read returns when `together` reads are in progress."""

    def __init__(self, contents: dict[str, bytes], together: int) -> None:
        self._contents = contents
        self._meeting = threading.Barrier(together)

    def read_range_into(
        self,
        key: str,
        start: int,
        view: memoryview,
        *,
        total_bytes: int | None = None,
        on_bytes: Callable[[memoryview], object] | None = None,
    ) -> None:
        self._meeting.wait(DEADLINE_SECONDS)
        view[:] = self._contents[key][start : start + len(view)]
        if on_bytes is not None:
            on_bytes(view)


class MeetingCache:
    """Has everything or nothing; a lookup returns when `together` lookups are in progress."""

    def __init__(self, contents: dict[str, bytes], together: int) -> None:
        self._contents = contents
        self._meeting = threading.Barrier(together)

    def get(self, stored: StoredObject) -> memoryview | None:
        self._meeting.wait(DEADLINE_SECONDS)
        data = self._contents.get(stored.key)
        return None if data is None else memoryview(bytearray(data))

    def put(self, stored: StoredObject, data: memoryview) -> None:
        """Keeps nothing."""


def layers(count: int, parts: int) -> dict[str, bytes]:
    return {layer_object(number): os.urandom(parts * PART) for number in range(1, count + 1)}


def test_several_objects_are_taken_from_the_cache_at_the_same_time() -> None:
    contents = layers(CONNECTIONS, parts=8)
    cache = MeetingCache(contents, together=CONNECTIONS)
    load_layers(MeetingReader({}, 1), manifest_of(contents), 1, CONNECTIONS + 1, cache=cache)


@pytest.mark.parametrize("misses", [False, True], ids=["no cache", "not in the cache"])
def test_one_object_is_read_by_all_connections(misses: bool) -> None:
    contents = layers(1, parts=2 * CONNECTIONS)
    cache = MeetingCache({}, together=1) if misses else None
    load_layers(MeetingReader(contents, together=CONNECTIONS), manifest_of(contents), 1, 2, cache=cache)


def test_no_more_threads_than_parts() -> None:
    contents = layers(1, parts=1)
    before = threading.active_count()
    load_layers(MeetingReader(contents, together=1), manifest_of(contents), 1, 2)
    assert threading.active_count() <= before + 1


def test_memory_is_there_before_it_is_read_into() -> None:
    memory = new_memory(64 * PART)
    populate(memory[16 * PART : 32 * PART])
    assert bytes(memory) == bytes(64 * PART)
    memory[:4] = b"made"
    populate(memory[: 8 * PART + 5])  # again, and not whole pages
    assert bytes(memory[:4]) == b"made"
