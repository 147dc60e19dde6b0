"""A stage with less memory than experts reads them from the weight cache. Its bits are those of a stage that has all."""

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from functions.stage.models.layer_group import Segment
from functions.stage.models.native.group import NativeGroup
from storage.loading.weight_cache import WeightCache
from storage.loading.weight_loader import iterate_layers
from storage.models.model_repository import ModelManifest, read_file
from storage.models.publisher import publish
from storage.store.embedded import EmbeddedStore
from storage.store.object_reader import ObjectReader
from storage.store.object_store import ObjectStore
from storage.store.settings import StoreSettings
from tests.support.functions.group_chain import tokens_of
from tests.support.storage import tiny_models


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StoreSettings]:
    with EmbeddedStore(tmp_path_factory.mktemp("store")) as store:
        yield store.settings


@pytest.fixture(scope="module")
def store(settings: StoreSettings) -> ObjectStore:
    return ObjectStore(settings)


SIZES = {"hidden_size": 128, "intermediate_size": 96, "num_experts": 8, "num_experts_per_tok": 2, "num_hidden_layers": 2}
TOKENS = np.array(tokens_of(1, 40), np.int64)


def group_of(reader: ObjectReader, manifest: ModelManifest, cache: WeightCache | None, budget: int | None) -> NativeGroup:
    config = msgspec.json.decode(read_file(reader, manifest, "config.json"))
    group = NativeGroup(config, 0, manifest.num_layers, manifest.dtype, 2**22, weights_budget_bytes=budget)
    for loaded in iterate_layers(reader, manifest, 0, manifest.num_layers, cache=cache, map_files=budget is not None):
        group.place(loaded.tensors)
    group.finish()
    group.use_threads(2)
    return group


def states_of(group: NativeGroup) -> Any:
    """A prompt in two chunks, which uses most experts, and then tokens one by one."""
    handle = group.kv.reserve(64)
    outputs, position = [], 0
    for length in (13, 7, *[1] * 20):
        outputs.append(group.forward(TOKENS[position : position + length], [Segment(handle, position, length)]))
        position += length
    return np.concatenate(outputs)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "q4"])
def test_a_budget_of_one_expert_gives_the_same_bits(
    dtype: str, settings: StoreSettings, store: ObjectStore, tmp_path: Path
) -> None:
    tiny_models.whole_model("olmoe", **SIZES).save_pretrained(tmp_path / "model")
    manifest = publish(tmp_path / "model", store, "experts", dtype)
    cache = WeightCache(tmp_path / "cache", 2**30)
    with ObjectReader(settings) as reader:
        expected = states_of(group_of(reader, manifest, None, None))
        one_expert = max(8192, 3 * 96 * 128 * {"float32": 4, "bfloat16": 2, "int8": 1, "q4": 0.625}[dtype])
        plain = group_of(reader, manifest, cache, 1)
        kept = plain._kept_bytes
        for budget in (1, int(kept + one_expert), 2**30):  # the second start maps what the first has written
            group = group_of(reader, manifest, cache, budget)
            assert group.cold_experts().resident_bytes == 0
            assert np.array_equal(states_of(group), expected), budget
            counts = group.cold_experts()
            assert counts.read > 0
            if budget < 2**30:
                assert counts.read > 2 * SIZES["num_experts"], "experts are read again"
                assert counts.resident_bytes <= 2 * one_expert, "those of the last layer"
            else:
                assert counts.read <= 2 * SIZES["num_experts"]
                assert counts.found > counts.read


def mapped_bytes_in_memory(folder: Path) -> int:
    """Of this process's mappings of files in the folder."""
    lines = Path("/proc/self/smaps").read_text().splitlines()
    starts = [number for number, line in enumerate(lines) if str(folder) in line]
    return 1024 * sum(int(next(line for line in lines[start:] if line.startswith("Rss:")).split()[1]) for start in starts)


def test_dropped_experts_are_not_in_memory(settings: StoreSettings, store: ObjectStore, tmp_path: Path) -> None:
    # Pages that are read come with some around them, which other experts may have.
    tiny_models.whole_model("olmoe", **SIZES | {"intermediate_size": 768}).save_pretrained(tmp_path / "model")
    manifest = publish(tmp_path / "model", store, "experts", "float32")
    with ObjectReader(settings) as reader:
        group = group_of(reader, manifest, WeightCache(tmp_path / "cache", 2**30), 1)
        states_of(group)
        with_budget = mapped_bytes_in_memory(tmp_path / "cache")
        del group
        gc.collect()
        group = group_of(reader, manifest, WeightCache(tmp_path / "cache", 2**30), 2**30)
        states_of(group)
    assert 0 < with_budget < 0.8 * mapped_bytes_in_memory(tmp_path / "cache")


def test_experts_that_no_file_has_stay_in_memory(settings: StoreSettings, store: ObjectStore, tmp_path: Path) -> None:
    tiny_models.whole_model("olmoe", **SIZES).save_pretrained(tmp_path / "model")
    manifest = publish(tmp_path / "model", store, "experts", "float32")
    with ObjectReader(settings) as reader:
        expected = states_of(group_of(reader, manifest, None, None))
        group = group_of(reader, manifest, WeightCache(tmp_path / "cache", 10_000), 1)  # too small for a layer
    assert np.array_equal(states_of(group), expected)
    assert group.cold_experts().read == 0
