"""Loading a stage: exactly its objects, verified, in parallel, through every fault of a store, never with wrong bytes."""

import ctypes
import mmap
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import xxhash
from blake3 import blake3
from safetensors.torch import load_file

from storage.checkpoints.safetensors_format import TensorSpan
from storage.errors import ChecksumMismatch, ObjectAltered, ObjectNotFound, StorageError, StoreUnreachable
from storage.loading.memory import address_of, resident_bytes
from storage.loading.weight_cache import WeightCache
from storage.loading.weight_loader import LoadedObject, LoadProgress, iterate_layers, stage_objects
from storage.models.model_repository import PART_BYTES, ModelManifest, StoredObject
from storage.models.publisher import publish
from storage.store.object_reader import ObjectReader
from storage.store.object_store import ObjectStore
from storage.store.settings import StoreSettings
from tests.support.storage import tiny_models
from tests.support.storage.storage import Fault, FaultProxy, load_layers
from tests.support.storage.torch_tensors import as_torch, assert_equal


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six layers of about 1.2 MB."""
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny_models.whole_model("llama", hidden_size=160, intermediate_size=480).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def manifest(checkpoint: Path, store: ObjectStore) -> ModelManifest:
    return publish(checkpoint, store, "tiny", "float32")


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory, store: ObjectStore) -> ModelManifest:
    folder = tmp_path_factory.mktemp("tied")
    tiny_models.whole_model("llama_tied").save_pretrained(folder)
    return publish(folder, store, "tied", "float32")


@pytest.fixture
def reader(settings: StoreSettings) -> Iterator[ObjectReader]:
    with ObjectReader(settings) as reader:
        yield reader


def assert_loads(settings: StoreSettings, manifest: ModelManifest, checkpoint: Path, cache: WeightCache | None = None) -> None:
    expected = load_file(checkpoint / "model.safetensors")
    with ObjectReader(settings, stall_seconds=0.5, retry_seconds=20) as reader:
        tensors = load_layers(reader, manifest, 0, manifest.num_layers, cache=cache)
    assert_equal(as_torch(tensors), expected)


def test_a_stage_reads_its_own_objects_and_no_others(manifest: ModelManifest, tied: ModelManifest, proxy: FaultProxy) -> None:
    layers = [f"layer-0000{number}" for number in range(6)]
    assert stage_objects(manifest, 0, 2) == ["embedding", *layers[:2]]
    assert stage_objects(manifest, 2, 4) == layers[2:4]
    assert stage_objects(manifest, 4, 6) == [*layers[4:], "head"]
    assert stage_objects(manifest, 0, 6) == ["embedding", *layers, "head"]
    assert stage_objects(tied, 4, 6) == [*layers[4:], "embedding", "head"]
    assert stage_objects(tied, 0, 6) == ["embedding", *layers, "head"]
    with ObjectReader(proxy.settings) as reader:
        tensors = load_layers(reader, manifest, 2, 4)
    assert {path.rsplit("/", 1)[-1] for _, path in proxy.requests} == {f"{name}.safetensors" for name in layers[2:4]}
    assert {name.split(".")[2] for name in tensors} == {"2", "3"}


@pytest.mark.parametrize(("first", "last"), [(-1, 2), (2, 2), (3, 2), (0, 7)])
def test_a_range_that_is_not_in_the_model_is_refused(manifest: ModelManifest, first: int, last: int) -> None:
    with pytest.raises(ValueError, match=f"layers {first}:{last} are no part of 'tiny', which has layers 0:6"):
        stage_objects(manifest, first, last)


def test_buffers_are_writable_and_aligned(manifest: ModelManifest, reader: ObjectReader) -> None:
    for raw in load_layers(reader, manifest, 0, 6).values():
        assert not raw.data.readonly
        assert ctypes.addressof(ctypes.c_char.from_buffer(raw.data)) % 64 == 0


def test_objects_come_in_the_order_of_a_forward_pass(manifest: ModelManifest, reader: ObjectReader) -> None:
    assert [loaded.name for loaded in iterate_layers(reader, manifest, 0, 6)] == stage_objects(manifest, 0, 6)


def test_a_layer_can_be_placed_while_the_next_one_flows(manifest: ModelManifest, proxy: FaultProxy) -> None:
    proxy.faults.append(Fault(path="layer-00005", stall_after=1000))
    with ObjectReader(proxy.settings, stall_seconds=600.0) as reader:
        objects = iterate_layers(reader, manifest, 3, 6)
        assert [next(objects).name, next(objects).name] == ["layer-00003", "layer-00004"]
        proxy.down()  # ends what is stalled
        proxy.up()
        assert [loaded.name for loaded in objects] == ["layer-00005", "head"]


def test_reading_begins_with_the_call(manifest: ModelManifest, reader: ObjectReader) -> None:
    complete = threading.Event()

    def note(progress: LoadProgress) -> None:
        if progress.done_bytes == progress.total_bytes:
            complete.set()

    objects = iterate_layers(reader, manifest, 0, 6, on_progress=note)
    assert complete.wait(120)
    assert len(list(objects)) == 8


def test_an_objects_memory_is_freed_with_it(manifest: ModelManifest, reader: ObjectReader) -> None:
    def mapping_of(loaded: LoadedObject) -> weakref.ref[object]:
        owner = next(iter(loaded.tensors.values())).data.obj
        (memory,) = owner._objects.values()
        return weakref.ref(memory.obj)

    objects = iterate_layers(reader, manifest, 0, 6)
    mapping = mapping_of(next(objects))
    assert next(objects).name == "layer-00000"
    assert mapping() is None
    assert len(list(objects)) == 6


def test_a_tensors_memory_is_freed_before_the_rest_of_its_object(manifest: ModelManifest, reader: ObjectReader) -> None:
    tensors = next(iterate_layers(reader, manifest, 1, 2)).tensors
    gone = tensors.pop("model.layers.1.mlp.up_proj.weight")
    kept = {name: bytes(tensor.data) for name, tensor in tensors.items()}
    first = -(-address_of(gone.data) // mmap.PAGESIZE) * mmap.PAGESIZE
    size = (address_of(gone.data) + len(gone.data) - first) // mmap.PAGESIZE * mmap.PAGESIZE
    assert resident_bytes(first, size) == size > 0
    del gone
    assert resident_bytes(first, size) == 0
    assert {name: bytes(tensor.data) for name, tensor in tensors.items()} == kept


def test_progress_ends_at_the_total(manifest: ModelManifest, reader: ObjectReader) -> None:
    seen: list[LoadProgress] = []
    load_layers(reader, manifest, 2, 4, on_progress=seen.append)
    total = sum(manifest.objects[name].bytes for name in stage_objects(manifest, 2, 4))
    assert max(progress.done_bytes for progress in seen) == total
    assert {progress.total_bytes for progress in seen} == {total}


@pytest.mark.parametrize(
    "fault",
    [
        Fault(times=5, reset_after=100_000),
        Fault(times=5, end_after=100_000),
        Fault(times=2, stall_after=700_000),
        Fault(times=9, status=500),
        Fault(times=1, path="layer-00002", flip_byte=700_000),
        Fault(times=2, path="head", flip_byte=1000),
    ],
    ids=["resets", "early ends", "stalls", "500s", "altered once", "altered twice"],
)
def test_transient_faults_are_survived(fault: Fault, manifest: ModelManifest, checkpoint: Path, proxy: FaultProxy) -> None:
    proxy.faults.append(fault)
    assert_loads(proxy.settings, manifest, checkpoint)
    assert fault.times == 0


def test_a_store_that_is_away_for_a_while_is_survived(manifest: ModelManifest, checkpoint: Path, proxy: FaultProxy) -> None:
    settings, served = proxy.settings, 0

    def leave(method: str, path: str) -> None:
        nonlocal served
        served += 1
        if served == 4:
            proxy.down()  # Before this request is answered: its connection breaks, and so does every other one.
            threading.Timer(1.5, proxy.up).start()

    proxy.on_request = leave
    assert_loads(settings, manifest, checkpoint)
    assert served > 8


def test_an_altered_object_is_named_and_never_served(manifest: ModelManifest, proxy: FaultProxy) -> None:
    proxy.faults.append(Fault(times=99, path="layer-00003", flip_byte=5000))
    key, digest = manifest.objects["layer-00003"].key, manifest.objects["layer-00003"].parts[0]
    with (
        ObjectReader(proxy.settings) as reader,
        pytest.raises(ChecksumMismatch, match=rf"{key}, part 0 \(bytes 0 to \d+\): BLAKE3 {digest} was published, \w+ read"),
    ):
        load_layers(reader, manifest, 0, 6)
    assert sum("layer-00003" in path for _, path in proxy.requests) == 3


def forgeable(first: int, second: int) -> bytes:
    """2 KiB whose xxh3 depends on the sum of the two numbers alone.

    xxh3 multiplies the two halves of eight bytes, each after an exclusive or with a constant. If that makes the lower half
    zero, the upper half enters only a sum with others like it.
    """
    data = bytearray(2048)
    data[0:8] = bytes.fromhex("b8fe6c39") + first.to_bytes(4, "little")
    data[64:72] = bytes.fromhex("7c01812c") + second.to_bytes(4, "little")
    return bytes(data)


def test_forged_weights_are_refused(manifest: ModelManifest, reader: ObjectReader, store: ObjectStore) -> None:
    """A writer of the bucket puts other weights there, with the checksum that manifests of version 1 had."""
    honest, forged = forgeable(1000, 2000), forgeable(1001, 1999)
    assert honest != forged
    assert xxhash.xxh3_128_hexdigest(honest) == xxhash.xxh3_128_hexdigest(forged)
    part = blake3(honest).hexdigest()
    stored = StoredObject("forged", len(honest), PART_BYTES, (part,), {"x": TensorSpan("I8", (1024,), 64, 1088)})
    changed = msgspec.structs.replace(manifest, objects=manifest.objects | {"layer-00003": stored})
    store.put("forged", honest)
    assert load_layers(reader, changed, 3, 4)["x"].data == honest[64:1088]
    store.put("forged", forged)
    with pytest.raises(ChecksumMismatch, match=f"forged, part 0 .*: BLAKE3 {part} was published"):
        load_layers(reader, changed, 3, 4)


def shorten(store: ObjectStore, key: str) -> None:
    store.put(key, store.get(key)[:-10])


@pytest.mark.parametrize(
    ("damage", "error", "words"),
    [(ObjectStore.delete, ObjectNotFound, "no object .*layer-00001"), (shorten, ObjectAltered, "layer-00001.* were published")],
    ids=["missing", "truncated"],
)
def test_an_object_that_differs_from_its_manifest_is_named(
    damage: object, error: type[StorageError], words: str, checkpoint: Path, store: ObjectStore, reader: ObjectReader
) -> None:
    manifest = publish(checkpoint, store, f"damaged-{error.__name__}", "float32")
    damage(store, manifest.objects["layer-00001"].key)  # type: ignore[operator]
    with pytest.raises(error, match=words):
        load_layers(reader, manifest, 0, 2)


@pytest.mark.parametrize("empty", ["embedding", "layer-00000", "head"])
def test_an_object_without_bytes_is_complete_at_once(empty: str, manifest: ModelManifest, reader: ObjectReader) -> None:
    """A manifest that was read has no such object; the loader does not wait for it for ever."""
    nothing = msgspec.structs.replace(manifest.objects[empty], bytes=0, parts=(), tensors={})
    changed = msgspec.structs.replace(manifest, objects=manifest.objects | {empty: nothing})
    loaded: list[LoadedObject] = []
    thread = threading.Thread(target=lambda: loaded.extend(iterate_layers(reader, changed, 0, 6)), daemon=True)
    thread.start()
    thread.join(60)
    assert [each.name for each in loaded] == stage_objects(manifest, 0, 6)
    assert {each.name for each in loaded if not each.tensors} == {empty}


def test_a_store_that_stays_away_is_named(manifest: ModelManifest, proxy: FaultProxy) -> None:
    settings = proxy.settings
    proxy.down()
    with (
        ObjectReader(settings, retry_seconds=0.5) as reader,
        pytest.raises(StoreUnreachable, match=f"{settings.endpoint_url} did not deliver"),
    ):
        load_layers(reader, manifest, 0, 6)


def test_the_second_start_reads_the_cache(manifest: ModelManifest, checkpoint: Path, proxy: FaultProxy, tmp_path: Path) -> None:
    cache = WeightCache(tmp_path, 2**30)
    assert_loads(proxy.settings, manifest, checkpoint, cache)
    proxy.requests.clear()
    assert_loads(proxy.settings, manifest, checkpoint, cache)
    assert proxy.requests == []


def test_a_damaged_cache_is_read_from_the_store_again(
    manifest: ModelManifest, checkpoint: Path, proxy: FaultProxy, tmp_path: Path
) -> None:
    cache = WeightCache(tmp_path, 2**30)
    assert_loads(proxy.settings, manifest, checkpoint, cache)
    held = sorted(tmp_path.glob("*.safetensors"))
    for file in held:
        file.chmod(0o600)
    held[0].write_bytes(held[0].read_bytes()[:-1])
    data = bytearray(held[1].read_bytes())
    data[1000] ^= 1
    held[1].write_bytes(data)
    proxy.requests.clear()
    assert_loads(proxy.settings, manifest, checkpoint, cache)
    assert len(proxy.requests) == 2
    proxy.requests.clear()
    assert_loads(proxy.settings, manifest, checkpoint, cache)
    assert proxy.requests == []
