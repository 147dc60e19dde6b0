"""The node-local cache: checked before trust, bounded, and shared by processes without locks that can be forgotten."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from storage.loading.weight_cache import WeightCache
from storage.models.model_repository import StoredObject, part_checksum
from tests.support.paths import ROOT


def an_object(seed: int, size: int = 1000) -> tuple[StoredObject, memoryview]:
    data = memoryview(bytearray((seed + number) % 256 for number in range(size)))
    parts = tuple(part_checksum(data[start : start + 256]) for start in range(0, size, 256))
    return StoredObject(f"key-{seed}", size, 256, parts, {}), data


def test_what_is_put_comes_back_and_writes_stay_private(tmp_path: Path) -> None:
    cache = WeightCache(tmp_path / "new" / "folder", 10_000)
    stored, data = an_object(1)
    assert cache.get(stored) is None
    cache.put(stored, data)
    first = cache.get(stored)
    assert first is not None
    assert first == data
    first[0] = 99
    assert cache.get(stored) == data


def test_the_name_is_the_contents(tmp_path: Path) -> None:
    cache = WeightCache(tmp_path, 10_000)
    stored, data = an_object(1)
    cache.put(stored, data)
    elsewhere = StoredObject("another/key", stored.bytes, stored.part_bytes, stored.parts, {})
    assert cache.get(elsewhere) == data


def test_the_least_recently_used_goes_first(tmp_path: Path) -> None:
    cache = WeightCache(tmp_path, 3000)
    objects = [an_object(seed) for seed in range(4)]
    for age, (stored, data) in enumerate(objects[:3]):
        cache.put(stored, data)
        used = time.time() - 100 + age
        os.utime(tmp_path / f"{stored.digest}.safetensors", (used, used))
    assert cache.get(objects[0][0]) is not None
    cache.put(*objects[3])
    assert [cache.get(stored) is not None for stored, _ in objects] == [True, False, True, True]
    assert sum(path.stat().st_size for path in tmp_path.glob("*.safetensors")) <= 3000


def test_what_is_mapped_survives_its_eviction(tmp_path: Path) -> None:
    cache = WeightCache(tmp_path, 1500)
    first, data = an_object(1)
    cache.put(first, data)
    mapped = cache.get(first)
    cache.put(*an_object(2))
    assert cache.get(first) is None
    assert mapped == data


def test_what_is_larger_than_the_cache_is_not_kept(tmp_path: Path) -> None:
    cache = WeightCache(tmp_path, 999)
    stored, data = an_object(1)
    cache.put(stored, data)
    assert cache.get(stored) is None


@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: data[:500] + b"\0" + data[501:], lambda data: b""])
def test_a_file_that_fails_its_check_is_removed(tmp_path: Path, damage: object) -> None:
    cache = WeightCache(tmp_path, 10_000)
    stored, data = an_object(1)
    cache.put(stored, data)
    (file,) = tmp_path.glob("*.safetensors")
    file.write_bytes(damage(file.read_bytes()))  # type: ignore[operator]
    assert cache.get(stored) is None
    assert not file.exists()


def test_a_folder_that_cannot_be_written_costs_only_the_cache(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    cache = WeightCache(tmp_path / "file" / "folder", 10_000)
    stored, data = an_object(1)
    cache.put(stored, data)
    assert cache.get(stored) is None


def test_what_a_dead_process_left_is_removed(tmp_path: Path) -> None:
    old, young = tmp_path / "old.unfinished", tmp_path / "young.unfinished"
    for path in (old, young):
        path.write_bytes(b"x")
    os.utime(old, (1, 1))
    WeightCache(tmp_path, 10_000).put(*an_object(1))
    assert not old.exists()
    assert young.exists()


def test_two_processes_share_a_folder(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from tests.storage.loading.test_weight_cache import an_object, WeightCache\n"
        "cache = WeightCache(Path(sys.argv[1]), 5000)\n"
        "for number in range(60):\n"
        "    stored, data = an_object(number % 8)\n"
        "    held = cache.get(stored)\n"
        "    assert held is None or held == data\n"
        "    cache.put(stored, data)\n"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "error", "-c", code, str(tmp_path)], cwd=ROOT, stderr=subprocess.PIPE, text=True
        )
        for _ in range(3)
    ]
    for process in processes:
        _, said = process.communicate(timeout=60)
        assert process.returncode == 0, said
        assert said == "", "no file failed its check and no write failed"
    assert sum(path.stat().st_size for path in tmp_path.glob("*.safetensors")) <= 5000
