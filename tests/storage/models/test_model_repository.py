"""The manifest: what it refuses, what its digest depends on, and how published models are found."""

from datetime import UTC, datetime
from typing import Any

import msgspec
import pytest

from storage.checkpoints.safetensors_format import TensorSpan
from storage.errors import ChecksumMismatch, ManifestInvalid, ManifestTooNew, ManifestTooOld, ModelNotPublished, ObjectNotFound
from storage.models.model_repository import (
    MANIFEST_VERSION,
    ModelManifest,
    StoredFile,
    StoredObject,
    decode_manifest,
    encode_manifest,
    list_models,
    manifest_key,
    object_names,
    read_file,
    read_manifest,
)
from storage.store.object_reader import ObjectInfo


def an_object(folder: str, name: str) -> StoredObject:
    span = TensorSpan("F32", (4, 8), 64, 192)
    return StoredObject(f"{folder}/{name}.safetensors", 192, 128, ("a" * 64, "b" * 64), {f"{name}.weight": span})


def a_manifest(folder: str = "models/tiny/float32/1", **changes: Any) -> ModelManifest:
    manifest = ModelManifest(
        manifest_version=MANIFEST_VERSION,
        name="tiny",
        dtype="float32",
        publication="1",
        architecture="LlamaForCausalLM",
        model_type="llama",
        num_layers=2,
        hidden_size=8,
        vocab_size=4,
        num_kv_heads=1,
        head_dim=8,
        context_length=64,
        tied=False,
        objects={name: an_object(folder, name) for name in object_names(2)},
        files={
            "config.json": StoredFile(
                f"{folder}/config.json", 2, "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"
            )
        },
    )
    return msgspec.structs.replace(manifest, **changes)


class Objects(dict[str, bytes]):
    """A reader over a dict."""

    def get(self, key: str) -> bytes:  # type: ignore[override]
        if key not in self:
            raise ObjectNotFound(key)
        return self[key]

    def list(self, prefix: str) -> list[ObjectInfo]:
        return [ObjectInfo(key, len(value), datetime.now(UTC)) for key, value in self.items() if key.startswith(prefix)]


def test_a_manifest_is_read_as_it_was_written() -> None:
    manifest = a_manifest()
    objects = Objects({manifest_key("tiny", "float32"): encode_manifest(manifest)})
    assert read_manifest(objects, "tiny", "float32") == manifest


def test_an_unpublished_model_is_named() -> None:
    with pytest.raises(ModelNotPublished, match="'tiny' is not published as int8"):
        read_manifest(Objects(), "tiny", "int8")


@pytest.mark.parametrize("name", ["", "a/b", "../x", ".hidden", "a b", "ä", "x" * 129])
def test_invalid_names_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="model name"):
        manifest_key(name, "float32")


def test_an_unknown_dtype_is_refused() -> None:
    with pytest.raises(ValueError, match="'float8' is none of float32"):
        manifest_key("tiny", "float8")


def test_a_newer_manifest_is_refused_by_its_version_alone() -> None:
    with pytest.raises(ManifestTooNew, match="version 3 and this Lamina reads up to 2"):
        decode_manifest(b'{"manifest_version": 3, "unknown": []}', "key")


def test_a_manifest_with_forgeable_checksums_is_refused() -> None:
    with pytest.raises(
        ManifestTooOld, match=r"version 1, whose checksums do not hold against forgery.*; publish the model again"
    ):
        decode_manifest(b'{"manifest_version": 1}', "key")


DEEP = b'{"manifest_version": 2, "unknown": ' + b"[" * 100_000


@pytest.mark.parametrize("data", [b"", b"{}", b"[1]", b"\xff", b'{"manifest_version": 2}', b'{"manifest_version": "2"}', DEEP])
def test_an_invalid_manifest_is_refused(data: bytes) -> None:
    with pytest.raises(ManifestInvalid, match="key cannot be read"):
        decode_manifest(data, "key")


def changed(**changes: Any) -> ModelManifest:
    manifest = a_manifest()
    stored = msgspec.structs.replace(manifest.objects["head"], **changes)
    return msgspec.structs.replace(manifest, objects=manifest.objects | {"head": stored})


@pytest.mark.parametrize(
    "manifest",
    [
        a_manifest(num_layers=3),
        a_manifest(num_layers=0),
        a_manifest(hidden_size=0),
        a_manifest(num_layers=2**40),
        changed(parts=("a" * 64,)),
        changed(parts=("a" * 32, "b" * 32)),
        changed(part_bytes=0),
        changed(bytes=100),
        changed(bytes=0, parts=(), tensors={}),
        changed(tensors={}),
        changed(bytes=256),
        changed(tensors={"embedding.weight": TensorSpan("F32", (4, 8), 64, 192)}),
        changed(tensors={"x": TensorSpan("F32", (1,) * 9, 64, 68)}),
        changed(tensors={"x": TensorSpan("F64", (2, 8), 64, 192)}),
        changed(tensors={"x": TensorSpan("F32", (4, 8), 64, 192), "y": TensorSpan("F32", (4, 8), 64, 192)}),
        changed(tensors={"x": TensorSpan("F32", (1,), 0, 4), "y": TensorSpan("F32", (16,), 128, 192)}),
        changed(tensors={"x": TensorSpan("F32", (4, 8), 64, 191)}),
        changed(tensors={"x": TensorSpan("F32", (4, -8), 64, 192)}),
        changed(tensors={"x": TensorSpan("F32", (2**40, 2**40), 64, 192)}),
        changed(tensors={"x": TensorSpan("F7", (4, 8), 64, 192)}),
        changed(tensors={"x": TensorSpan("F32", (4, 8), 128, 256)}),
        changed(tensors={"x": TensorSpan("F32", (4, 8), 60, 188)}),
    ],
)
def test_a_manifest_that_contradicts_itself_is_refused(manifest: ModelManifest) -> None:
    with pytest.raises(ManifestInvalid, match="publish the model again"):
        decode_manifest(encode_manifest(manifest), "key")


def test_the_digest_covers_contents_not_places() -> None:
    digest = a_manifest().digest
    assert a_manifest("models/other/float32/2", name="other", publication="2").digest == digest
    assert changed(parts=("a" * 64, "c" * 64)).digest != digest
    assert a_manifest(context_length=65).digest != digest
    assert a_manifest(architecture="MistralForCausalLM").digest != digest
    assert a_manifest(files={}).digest != digest
    assert a_manifest(tied=True).digest != digest
    assert a_manifest(objects=dict(reversed(a_manifest().objects.items()))).digest == digest


def test_published_models_are_listed_by_their_manifests() -> None:
    keys = (
        "b/float32/manifest.json",
        "a/int8/manifest.json",
        "a/int8/1/head.safetensors",
        "c/int8/1/manifest.json",
        "d/manifest.json",
    )
    assert list_models(Objects({f"models/{key}": b"" for key in keys})) == [("a", "int8"), ("b", "float32")]


def test_files_are_verified() -> None:
    manifest = a_manifest()
    key = manifest.files["config.json"].key
    assert read_file(Objects({key: b"{}"}), manifest, "config.json") == b"{}"
    with pytest.raises(ChecksumMismatch, match=key):
        read_file(Objects({key: b"[]"}), manifest, "config.json")
    with pytest.raises(ObjectNotFound, match=r"without tokenizer.json; it has config.json"):
        read_file(Objects(), manifest, "tokenizer.json")
