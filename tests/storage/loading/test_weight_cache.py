"""The node-local cache: checked before trust, bounded, and shared by processes without locks that can be forgotten."""

import fcntl
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from blake3 import blake3

from storage.loading.weight_cache import WeightCache
from storage.models.model_repository import StoredObject
from tests.support.paths import ROOT


def an_object(seed: int, size: int = 1000) -> tuple[StoredObject, memoryview]:
    data = memoryview(bytearray((seed + number) % 256 for number in range(size)))
    parts = tuple(blake3(data[start : start + 256]).hexdigest() for start in range(0, size, 256))
    return StoredObject(f"key-{seed}", size, 256, parts, {}), data


STORED, DATA = an_object(1)


def test_a_kept_object_is_returned_and_writes_to_it_stay_private(tmp_path: Path) -> None:
    cache = WeightCache(tmp_path / "new" / "folder", 10_000)
    assert cache.get(STORED) is None
    cache.put(STORED, DATA)
    first = cache.get(STORED)
    assert first is not None
    assert first == DATA
    first[0] = 99
    assert cache.get(STORED) == DATA


def test_the_name_depends_on_contents_only(tmp_path: Path) -> None:
    cache = WeightCache(tmp_path, 10_000)
    cache.put(STORED, DATA)
    elsewhere = StoredObject("another/key", STORED.bytes, STORED.part_bytes, STORED.parts, {})
    assert cache.get(elsewhere) == DATA


def test_the_least_recently_used_object_is_evicted_first(tmp_path: Path) -> None:
    cache = WeightCache(tmp_path, 3000)
    objects = [an_object(seed) for seed in range(4)]
    for age, (stored, data) in enumerate(objects[:3]):
        cache.put(stored, data)
        used = time.time() - 100 + age
        (file,) = tmp_path.glob(f"{stored.digest}.*")
        os.utime(file, (used, used))
    assert cache.get(objects[0][0]) is not None
    cache.put(*objects[3])
    assert [cache.get(stored) is not None for stored, _ in objects] == [True, False, True, True]
    assert sum(path.stat().st_size for path in tmp_path.glob("*.safetensors")) <= 3000


def test_a_mapped_object_survives_its_eviction(tmp_path: Path) -> None:
    cache, of_another_process = WeightCache(tmp_path, 1500), WeightCache(tmp_path, 1500)
    cache.put(STORED, DATA)
    mapped = cache.get(STORED)
    of_another_process.put(*an_object(2))
    assert cache.get(STORED) is None
    assert mapped == DATA


def test_objects_that_this_process_has_mapped_are_not_evicted(tmp_path: Path) -> None:
    cache = WeightCache(tmp_path, 1500)
    cache.put(STORED, DATA)
    assert cache.get(STORED) == DATA
    cache.put(*an_object(2))
    assert cache.get(STORED) == DATA
    assert held_bytes(tmp_path) <= 1500


def test_a_file_cut_short_under_its_mapping_costs_one_start(tmp_path: Path) -> None:
    """SIGBUS, and the next process reads the store again."""
    code = (
        "import os, sys; from pathlib import Path; from tests.storage.loading.test_weight_cache import an_object, WeightCache\n"
        "folder = Path(sys.argv[1])\n"
        "cache = WeightCache(folder, 10**6)\n"
        "stored, data = an_object(1, 100_000)\n"
        "cache.put(stored, data)\n"
        "held = cache.get(stored)\n"
        "(file,) = folder.glob('*.safetensors')\n"
        "assert file.stat().st_mode & 0o222 == 0, 'only its owner, and on purpose'\n"
        "file.chmod(0o600)\n"
        "os.truncate(file, 0)\n"
        "held == data\n"
    )
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, stderr=subprocess.PIPE, text=True, check=False)
    assert (run.returncode, run.stderr) == (-signal.SIGBUS, "")
    cache = WeightCache(tmp_path, 10**6)
    stored, data = an_object(1, 100_000)
    assert cache.get(stored) is None
    cache.put(stored, data)
    assert cache.get(stored) == data


def test_unfinished_files_count(tmp_path: Path) -> None:
    cache = WeightCache(tmp_path, 2500)
    with writing(tmp_path, 1000), writing(tmp_path, 1000):
        cache.put(STORED, DATA)
        assert cache.get(STORED) is None
        assert held_bytes(tmp_path) <= 2500
    cache.put(STORED, DATA)
    assert cache.get(STORED) is not None


def test_the_folder_is_never_larger_than_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Looked at before and after each file gets its name."""
    most = 0
    rename = Path.rename

    def looking(path: Path, target: Path) -> Path:
        nonlocal most
        most = max(most, held_bytes(tmp_path))
        renamed = rename(path, target)
        most = max(most, held_bytes(tmp_path))
        return renamed

    monkeypatch.setattr(Path, "rename", looking)
    cache = WeightCache(tmp_path, 3000)
    for number in range(9):
        cache.put(*an_object(number))
    assert 2000 < most <= 3000


def test_an_object_larger_than_the_cache_is_not_kept(tmp_path: Path) -> None:
    cache = WeightCache(tmp_path, 999)
    cache.put(STORED, DATA)
    assert cache.get(STORED) is None


@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: data[:500] + b"\0" + data[501:], lambda data: b""])
def test_a_file_that_fails_its_check_is_removed(tmp_path: Path, damage: object) -> None:
    cache = WeightCache(tmp_path, 10_000)
    cache.put(STORED, DATA)
    (file,) = tmp_path.glob("*.safetensors")
    file.chmod(0o600)
    file.write_bytes(damage(file.read_bytes()))  # type: ignore[operator]
    assert cache.get(STORED) is None
    assert not file.exists()


def test_a_folder_that_cannot_be_written_costs_only_the_cache(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    cache = WeightCache(tmp_path / "file" / "folder", 10_000)
    cache.put(STORED, DATA)
    assert cache.get(STORED) is None


@contextmanager
def writing(folder: Path, size: int) -> Iterator[Path]:
    """A file that another process is writing."""
    path = folder / f"{secrets.token_hex(4)}.unfinished"
    with path.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.truncate(size)
        yield path


def held_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def test_unfinished_files_of_a_dead_process_are_removed(tmp_path: Path) -> None:
    left = tmp_path / "left.unfinished"
    left.write_bytes(b"x")
    with writing(tmp_path, 1) as alive:
        WeightCache(tmp_path, 10_000).put(*an_object(1))
        assert not left.exists()
        assert alive.exists()


@pytest.mark.slow
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
