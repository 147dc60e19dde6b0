"""Publishing Hugging Face folders: all families, conversions, resumed and repeated runs, and damaged checkpoints."""

import json
import os
import re
import shutil
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import gguf
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from knative.commands.failures import one_line
from storage.checkpoints.decoder_config import with_description
from storage.errors import (
    AccessDenied,
    ArchitectureUnsupported,
    CheckpointInvalid,
    ChecksumMismatch,
    ModelNotPublished,
    StorageError,
    StoreUnreachable,
)
from storage.models.model_repository import ModelManifest, object_names, read_file, read_manifest
from storage.models.publisher import PublishProgress, publish
from storage.store.embedded import EmbeddedStore
from storage.store.object_reader import ObjectReader
from storage.store.object_store import ObjectStore
from storage.store.settings import StoreSettings
from tests.storage.checkpoints.test_gguf_families import write_gguf
from tests.support.paths import ROOT
from tests.support.storage import tiny_models
from tests.support.storage.storage import STORE_OF_ARGUMENTS, Fault, FaultProxy, load_layers, store_arguments
from tests.support.storage.torch_tensors import as_torch, assert_equal, folder_tensors

O_PROJ, GATE = "model.layers.3.self_attn.o_proj.weight", "model.layers.2.mlp.gate_proj.weight"
Damage = Callable[[Path], object]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Untied, in several shards."""
    folder = tmp_path_factory.mktemp("llama")
    save(tiny_models.whole_model("llama"), folder, max_shard_size="100KB")
    assert len(list(folder.glob("*.safetensors"))) >= 3
    return folder


@pytest.fixture
def copied(llama: Path, tmp_path: Path) -> Path:
    """A llama that a test may damage."""
    return shutil.copytree(llama, tmp_path / "llama")


def save(model: PreTrainedModel, folder: Path, max_shard_size: str = "1GB") -> Path:
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


def loaded(settings: StoreSettings, manifest: ModelManifest) -> dict[str, torch.Tensor]:
    with ObjectReader(settings) as reader:
        return as_torch(load_layers(reader, manifest, 0, manifest.num_layers))


@pytest.mark.sampled(every=3)
@pytest.mark.parametrize("family", tiny_models.ALL)
def test_every_family_is_published_unchanged(family: str, settings: StoreSettings, store: ObjectStore, tmp_path: Path) -> None:
    model = tiny_models.whole_model(family)
    save(model, tmp_path)
    manifest = publish(tmp_path, store, family, "float32")
    assert_equal(loaded(settings, manifest), tiny_models.as_published(model.config.model_type, folder_tensors(tmp_path)))
    config = model.config
    assert list(manifest.objects) == object_names(tiny_models.NUM_LAYERS)
    assert manifest.model_type == config.model_type
    assert manifest.architecture == type(model).__name__
    assert (manifest.hidden_size, manifest.vocab_size) == (config.hidden_size, config.vocab_size)
    assert manifest.tied == config.tie_word_embeddings
    expected = with_description(json.loads((tmp_path / "config.json").read_bytes()))
    assert json.loads(read_file(store, manifest, "config.json")) == json.loads(json.dumps(expected))


def test_infinity_as_python_writes_it_is_published_as_json(settings: StoreSettings, store: ObjectStore, tmp_path: Path) -> None:
    """Checkpoints of Nemotron-H have it."""
    save(tiny_models.whole_model("nemotron_h"), tmp_path)
    path = tmp_path / "config.json"
    config = path.read_text()
    path.write_text(config.replace('{\n      "__float__": "Infinity"\n    }', "Infinity"))
    assert "[\n    0.0,\n    Infinity\n  ]" in path.read_text()
    manifest = publish(tmp_path, store, "infinity", "float32")
    found = json.loads(read_file(store, manifest, "config.json"), parse_constant=pytest.fail)
    assert found == json.loads(json.dumps(with_description(json.loads(config))))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_other_float_types_are_rounded_as_torch_does(
    dtype: str, llama: Path, settings: StoreSettings, store: ObjectStore
) -> None:
    manifest = publish(llama, store, "rounded", dtype)
    expected = {name: tensor.to(getattr(torch, dtype)) for name, tensor in folder_tensors(llama).items()}
    assert_equal(loaded(settings, manifest), expected)


@pytest.mark.parametrize(("family", "router"), [("gpt_oss", r"mlp\.router\."), ("qwen3_moe", r"mlp\.gate\.weight")])
def test_routers_in_c_are_not_rounded(
    family: str, router: str, settings: StoreSettings, store: ObjectStore, tmp_path: Path
) -> None:
    save(tiny_models.whole_model(family), tmp_path)
    tensors = loaded(settings, publish(tmp_path, store, family, "bfloat16"))
    wide = {name for name, tensor in tensors.items() if tensor.dtype == torch.float32}
    assert wide
    assert wide == {name for name in tensors if re.search(router, name)}


@pytest.mark.parametrize(
    ("family", "dtype", "kept"),
    [
        ("deepseek_v3", "bfloat16", r"e_score_correction_bias|mlp\.gate\.weight"),
        ("gpt_oss", "float16", r"norm"),
        ("qwen3_moe", "float16", None),
    ],
)
def test_what_transformers_keeps_in_float32_is_not_rounded(
    family: str, dtype: str, kept: str | None, settings: StoreSettings, store: ObjectStore, tmp_path: Path
) -> None:
    model = tiny_models.whole_model(family)
    save(model, tmp_path)
    tensors = loaded(settings, publish(tmp_path, store, family, dtype))
    assert {name for name, tensor in tensors.items() if tensor.dtype == torch.float32} == {
        name for name in tensors if kept and re.search(kept, name)
    }
    # The same tensors as in a model that transformers loads.
    whole = type(model).from_pretrained(tmp_path, dtype=getattr(torch, dtype))
    in_float32 = {name for name, parameter in whole.state_dict().items() if parameter.dtype == torch.float32}
    assert {name for name in in_float32 if name in tensors} == {name for name in tensors if kept and re.search(kept, name)}


@pytest.mark.parametrize(
    ("family", "changes", "dtype", "words"),
    [
        ("llama", {"model_type": "dory"}, "float32", "'dory' is not supported: its layers run more than once"),
        ("gemma", {"use_bidirectional_attention": True}, "float32", "attend to later ones"),
        ("llama", {"hidden_act": "mish"}, "int8", "activation 'mish'"),
    ],
)
def test_a_model_that_no_stage_runs_is_refused_before_the_first_byte(
    family: str, changes: dict[str, object], dtype: str, words: str, store: ObjectStore, tmp_path: Path
) -> None:
    save(tiny_models.whole_model(family), tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    before = {item.key for item in store.list("")}
    with pytest.raises(ArchitectureUnsupported, match=words):
        publish(tmp_path, store, "refused", dtype)
    assert {item.key for item in store.list("")} == before


def unknown_architecture(folder: Path) -> Path:
    path = write_gguf(folder / "x.gguf", "llama")
    path.write_bytes(path.read_bytes().replace(struct.pack("<Q", 5) + b"llama", struct.pack("<Q", 5) + b"lalal"))
    return path


def unknown_tokenizer_rule(folder: Path) -> Path:
    return write_gguf(folder / "x.gguf", "llama", add=lambda writer: writer.add_tokenizer_pre("of-tomorrow"))


def unknown_tensor_type(folder: Path) -> Path:
    path = write_gguf(folder / "x.gguf", "llama")
    name = b"blk.0.attn_q.weight"
    data = bytearray(path.read_bytes())
    struct.pack_into("<I", data, data.index(name) + len(name) + 4 + 2 * 8, 99)  # after the number of dimensions and two of them
    path.write_bytes(data)
    return path


def big_endian(folder: Path) -> Path:
    writer = gguf.GGUFWriter(folder / "x.gguf", "llama", endianess=gguf.GGUFEndian.BIG)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return folder / "x.gguf"


def unknown_quantization(folder: Path) -> Path:
    save(tiny_models.whole_model("llama"), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "of-tomorrow"}}))
    return folder


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (unknown_architecture, "holds a 'lalal'; known are llama, qwen2, .*; publish others from safetensors"),
        (
            unknown_tokenizer_rule,
            r"the rules 'of-tomorrow'; known are .* Name a folder with the model's tokenizer\.json by --token",
        ),
        (unknown_tensor_type, r"'blk\.0\.attn_q\.weight' quantized as 99, which cannot be read .*; use another quantization"),
        (big_endian, "is big-endian, which is not read; fetch the little-endian file"),
        (unknown_quantization, "quantized with of-tomorrow; known are awq, .* Publish the unquantized checkpoint instead"),
    ],
)
def test_unknown_formats_are_refused_before_the_first_byte(
    make: Callable[[Path], Path], words: str, proxy: FaultProxy, tmp_path: Path
) -> None:
    with pytest.raises(StorageError, match=words):
        publish(make(tmp_path), ObjectStore(proxy.settings), "unknown", "float32")
    assert proxy.count("PUT") == proxy.count("POST") == 0


def test_mistral_with_kinds_of_layers_is_published_as_ministral(store: ObjectStore, tmp_path: Path) -> None:
    """As transformers' AutoConfig reads it."""
    save(tiny_models.whole_model("ministral"), tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "mistral"}))
    manifest = publish(tmp_path, store, "mistral", "float32")
    assert manifest.model_type == json.loads(read_file(store, manifest, "config.json"))["model_type"] == "ministral"


def test_int8_has_a_scale_per_output_channel(llama: Path, settings: StoreSettings, store: ObjectStore) -> None:
    manifest = publish(llama, store, "quantized", "int8")
    tensors, checkpoint = loaded(settings, manifest), folder_tensors(llama)
    matrix = "model.layers.3.mlp.up_proj.weight"
    assert tensors[matrix].dtype == torch.int8
    scale = tensors[f"{matrix}_scale"]
    assert torch.equal(scale, checkpoint[matrix].abs().amax(1) / 127)
    error = (tensors[matrix].float() * scale[:, None] - checkpoint[matrix]).abs()
    assert bool((error <= scale[:, None] * 0.501).all())
    assert tensors["model.layers.3.input_layernorm.weight"].dtype == torch.bfloat16
    outer = ("lm_head.weight", "model.embed_tokens.weight")
    assert {bytes(tensors[f"{name}_format"].numpy()) for name in outer} == {b'{"format":"Q8_0","shape":[128,32]}'}


def test_objects_are_safetensors_files_with_aligned_tensors(llama: Path, store: ObjectStore, tmp_path: Path) -> None:
    manifest = publish(llama, store, "aligned", "float32")
    path = tmp_path / "layer.safetensors"
    path.write_bytes(store.get(manifest.objects["layer-00002"].key))
    with safe_open(path, framework="pt") as file:
        expected = {name: tensor for name, tensor in folder_tensors(llama).items() if ".layers.2." in name}
        assert_equal({name: file.get_tensor(name) for name in file.keys()}, expected)  # noqa: SIM118  not a dict
    assert all(span.start % 64 == 0 for stored in manifest.objects.values() for span in stored.tensors.values())


def test_tensors_of_odd_lengths_are_aligned(store: ObjectStore, settings: StoreSettings, tmp_path: Path) -> None:
    save(tiny_models.whole_model("llama", hidden_size=40, intermediate_size=37), tmp_path)
    manifest = publish(tmp_path, store, "odd", "bfloat16")
    assert all(span.start % 64 == 0 for stored in manifest.objects.values() for span in stored.tensors.values())
    assert_equal(loaded(settings, manifest), {name: t.bfloat16() for name, t in folder_tensors(tmp_path).items()})


def test_a_second_run_uploads_nothing(llama: Path, proxy: FaultProxy) -> None:
    store = ObjectStore(proxy.settings)
    first = publish(llama, store, "twice", "float32")
    proxy.requests.clear()
    assert publish(llama, store, "twice", "float32") == first
    assert [method for method, _ in proxy.requests] == ["GET"]


def test_the_digest_depends_on_contents_only(llama: Path, copied: Path, store: ObjectStore, tmp_path: Path) -> None:
    first = publish(llama, store, "original", "float32")
    with EmbeddedStore(tmp_path / "elsewhere") as other:
        again = publish(copied, ObjectStore(other.settings), "copy", "float32")
    assert again.digest == first.digest
    assert publish(llama, store, "original", "bfloat16").digest != first.digest


def test_a_changed_checkpoint_replaces_the_old_one(copied: Path, settings: StoreSettings, store: ObjectStore) -> None:
    first = publish(copied, store, "changing", "float32")
    shard = sorted(copied.glob("*.safetensors"))[0]
    save_file({name: tensor + 1 for name, tensor in load_file(shard).items()}, shard, {"format": "pt"})
    second = publish(copied, store, "changing", "float32")
    assert second.digest != first.digest
    assert_equal(loaded(settings, read_manifest(store, "changing", "float32")), folder_tensors(copied))


def test_an_interrupted_run_is_invisible_and_resumes(llama: Path, settings: StoreSettings, proxy: FaultProxy) -> None:
    store = ObjectStore(proxy.settings)
    with pytest.raises(Stopped):
        publish(llama, store, "interrupted", "float32", progress=stop_at("layer-00003"))
    with pytest.raises(ModelNotPublished):
        read_manifest(store, "interrupted", "float32")
    finished = objects_finished(store, "interrupted")
    assert finished
    assert "layer-00003" not in finished
    proxy.requests.clear()
    seen: list[PublishProgress] = []
    manifest = publish(llama, store, "interrupted", "float32", progress=seen.append)
    assert objects_sent(proxy) == manifest.objects.keys() - finished
    assert seen[-1].done_bytes == seen[-1].total_bytes == sum(stored.bytes for stored in manifest.objects.values())
    assert_equal(loaded(settings, manifest), folder_tensors(llama))
    assert not [item.key for item in store.list("models/interrupted/") if "fragment" in item.key]


def objects_finished(store: ObjectStore, name: str) -> set[str]:
    keys = [item.key.rsplit("/", 1)[-1] for item in store.list(f"models/{name}/")]
    return {key.removesuffix(".fragment.json") for key in keys if key.endswith(".fragment.json")}


def objects_sent(proxy: FaultProxy) -> set[str]:
    paths = [path.rsplit("/", 1)[-1] for method, path in proxy.requests if method == "PUT"]
    return {path.removesuffix(".safetensors") for path in paths if path.endswith(".safetensors")}


@pytest.mark.parametrize(
    ("status", "error", "words"),
    [(403, AccessDenied, "check the keys"), (507, StoreUnreachable, "look at the store and its disk")],
)
def test_a_refused_object_leaves_nothing_visible_and_says_how_to_go_on(
    status: int, error: type[StorageError], words: str, llama: Path, settings: StoreSettings, proxy: FaultProxy
) -> None:
    store, name = ObjectStore(proxy.settings), f"refused-{status}"
    proxy.faults.append(Fault("layer-00003.safetensors", "PUT", times=100, status=status))
    with pytest.raises(error, match=words) as raised:
        publish(llama, store, name, "float32")
    assert "the same push goes on where this one stopped" in str(one_line(raised.value))
    with pytest.raises(ModelNotPublished):
        read_manifest(store, name, "float32")
    finished = objects_finished(store, name)
    proxy.faults.clear()
    proxy.requests.clear()
    manifest = publish(llama, store, name, "float32")
    assert objects_sent(proxy) == manifest.objects.keys() - finished
    assert_equal(loaded(settings, manifest), folder_tensors(llama))


def test_two_publications_of_one_name_do_not_mix(
    llama: Path, copied: Path, settings: StoreSettings, store: ObjectStore
) -> None:
    with_one_bit_more(copied)
    both = threading.Barrier(2)

    def meet(progress: PublishProgress) -> None:
        if progress.object == "layer-00002" and progress.done_bytes < progress.total_bytes:
            with suppress(threading.BrokenBarrierError):
                both.wait(timeout=0 if both.broken else 60)
                both.abort()

    with ThreadPoolExecutor(2) as threads:
        pushes = [threads.submit(publish, path, store, "raced", "float32", progress=meet) for path in (llama, copied)]
        manifests = [push.result() for push in pushes]
    assert manifests[0].publication != manifests[1].publication
    winner = read_manifest(store, "raced", "float32")
    assert winner in manifests
    for manifest, path in zip(manifests, (llama, copied), strict=True):
        assert_equal(loaded(settings, manifest), folder_tensors(path))


def test_a_store_that_fails_leaves_the_old_model(llama: Path, copied: Path, proxy: FaultProxy) -> None:
    store = ObjectStore(proxy.settings)
    first = publish(llama, store, "kept", "float32")
    (copied / "generation_config.json").write_text("{}")

    def stop(progress: PublishProgress) -> None:
        if progress.object == "head":
            proxy.down()

    with pytest.raises(StoreUnreachable, match="is it running"):
        publish(copied, store, "kept", "float32", progress=stop)
    proxy.up()
    assert read_manifest(store, "kept", "float32") == first


@pytest.mark.parametrize("equal", [True, False])
def test_a_tied_checkpoint_with_a_head_is_untied_if_the_head_differs(
    equal: bool, store: ObjectStore, settings: StoreSettings, tmp_path: Path
) -> None:
    save(tiny_models.whole_model("llama_tied"), tmp_path)
    found = load_file(tmp_path / "model.safetensors")
    head = {"lm_head.weight": found["model.embed_tokens.weight"] + (0 if equal else 1)}
    save_file(found | head, tmp_path / "model.safetensors")
    manifest = publish(tmp_path, store, f"tied-{equal}", "float32")
    assert manifest.tied is equal
    assert json.loads(read_file(store, manifest, "config.json"))["tie_word_embeddings"] is equal
    assert_equal(loaded(settings, manifest), found if equal else found | head)


def test_a_chat_template_in_the_tokenizer_s_configuration_is_found(copied: Path, store: ObjectStore) -> None:
    template = [{"name": "tools", "template": "no"}, {"name": "default", "template": "{{ messages }}"}]
    (copied / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    manifest = publish(copied, store, "template", "float32")
    assert read_file(store, manifest, "chat_template.jinja") == b"{{ messages }}"


def with_one_bit_more(folder: Path) -> None:
    """Changes the contents, but neither sizes nor times of change."""
    for shard in folder.glob("*.safetensors"):
        times = shard.stat()
        tensors = {name: tensor + 1 for name, tensor in load_file(shard).items()}
        save_file(tensors, shard, {"format": "pt"})
        assert shard.stat().st_size == times.st_size
        os.utime(shard, ns=(times.st_atime_ns, times.st_mtime_ns))


def test_checkpoints_with_equal_sizes_and_times_are_told_apart(
    copied: Path, settings: StoreSettings, store: ObjectStore
) -> None:
    first = publish(copied, store, "same-times", "float32")
    with_one_bit_more(copied)
    second = publish(copied, store, "same-times", "float32")
    assert second.digest != first.digest
    assert_equal(loaded(settings, second), folder_tensors(copied))


def test_publishing_afresh_repairs_a_damaged_object(llama: Path, settings: StoreSettings, store: ObjectStore) -> None:
    first = publish(llama, store, "mended", "float32")
    key = first.objects["layer-00002"].key
    store.put(key, bytes(first.objects["layer-00002"].bytes))
    assert publish(llama, store, "mended", "float32") == first
    with pytest.raises(ChecksumMismatch, match="push --afresh"):
        loaded(settings, first)
    assert publish(llama, store, "mended", "float32", afresh=True) == first
    assert_equal(loaded(settings, first), folder_tensors(llama))


class Stopped(Exception):
    """Any error that ends a publisher."""


def stop_at(name: str) -> Callable[[PublishProgress], None]:
    def stop(progress: PublishProgress) -> None:
        if progress.object == name:
            raise Stopped

    return stop


def test_a_resume_never_mixes_two_checkpoints(copied: Path, settings: StoreSettings, store: ObjectStore) -> None:
    with pytest.raises(Stopped):
        publish(copied, store, "mixed", "float32", progress=stop_at("layer-00003"))
    with_one_bit_more(copied)
    manifest = publish(copied, store, "mixed", "float32")
    assert_equal(loaded(settings, manifest), folder_tensors(copied))


def test_a_resume_verifies_the_objects_that_it_skips(
    copied: Path, settings: StoreSettings, store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even if two checkpoints had one fingerprint, or a newer publisher converted differently."""
    monkeypatch.setattr("storage.models.publisher.checkpoint_fingerprint", lambda path: "the same for all")
    with pytest.raises(Stopped):
        publish(copied, store, "verified", "int8", progress=stop_at("layer-00003"))
    with_one_bit_more(copied)
    seen: list[PublishProgress] = []
    manifest = publish(copied, store, "verified", "int8", progress=seen.append)
    assert seen[-1].done_bytes == seen[-1].total_bytes
    with monkeypatch.context() as patch:
        patch.setattr("storage.models.publisher.checkpoint_fingerprint", lambda path: "another")
        assert publish(copied, store, "whole", "int8").digest == manifest.digest


def test_a_checkpoint_that_changes_while_it_is_published_is_refused(copied: Path, store: ObjectStore) -> None:
    def change(progress: PublishProgress) -> None:
        if progress.object == "layer-00003" and not changed:
            with_one_bit_more(copied)
            changed.append(True)

    changed: list[bool] = []
    with pytest.raises(CheckpointInvalid, match="changed while it was published; publish it again"):
        publish(copied, store, "moving", "float32", progress=change)
    with pytest.raises(ModelNotPublished):
        read_manifest(store, "moving", "float32")


def cut_a_shard(keep: slice) -> Damage:
    def damage(folder: Path) -> None:
        shard = sorted(folder.glob("*.safetensors"))[1]
        shard.write_bytes(shard.read_bytes()[keep])

    return damage


def tensors(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Damage:
    return lambda folder: replace_tensors(folder, change(folder_tensors(folder)))


def tensor(name: str, shape: tuple[int, ...]) -> Damage:
    """The tensor in another shape, or one more."""
    return tensors(lambda found: found | {name: torch.ones(shape)})


def without(part: str) -> Damage:
    return tensors(lambda found: {name: tensor for name, tensor in found.items() if part not in name})


def replace_tensors(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    save_file(tensors, folder / "model.safetensors")


def pickle_only(folder: Path) -> None:
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04")


def config(**changes: object) -> Damage:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


@pytest.mark.parametrize(
    ("damage", "error", "words"),
    [
        (cut_a_shard(slice(-1)), CheckpointInvalid, "model-00002.* is truncated"),
        (cut_a_shard(slice(40)), CheckpointInvalid, "only its beginning: 40 bytes"),
        (lambda folder: sorted(folder.glob("*.safetensors"))[1].unlink(), CheckpointInvalid, "lacks the shard 'model-00002"),
        (without(".layers.4."), CheckpointInvalid, "no tensor of the checkpoint is for layer-00004; config.json says 6 layers"),
        (pickle_only, CheckpointInvalid, "pytorch_model.bin, a pickle"),
        (config(num_hidden_layers=5), CheckpointInvalid, r"'model.layers.5..*', but config.json says 5 layers"),
        (config(model_type="mystery"), ArchitectureUnsupported, "model_type 'mystery'"),
        (config(num_attention_heads="four"), CheckpointInvalid, "num_attention_heads"),
        (config(model_type="t5"), ArchitectureUnsupported, "'t5' is not supported: .* it has an encoder"),
        (config(quantization_config={"quant_method": "gptq"}), CheckpointInvalid, "quantized with gptq"),
        (
            tensors(lambda found: found | {"model.norm.weight": found["model.norm.weight"].int()}),
            CheckpointInvalid,
            "'model.norm.weight' is I32",
        ),
        (tensor(O_PROJ, (40, 32)), CheckpointInvalid, rf"'{O_PROJ}' is \[40, 32\] and config.json makes it \[32, 32\]"),
        (tensor(GATE, (64, 48)), CheckpointInvalid, rf"'{GATE}' is \[64, 48\] and config.json makes it \[64, 32\]"),
        (tensor("lm_head.weight", (64, 32)), CheckpointInvalid, r"is \[64, 32\] and config.json makes it \[128, 32\]"),
        (tensor("model.norm.weight", (33,)), CheckpointInvalid, r"is \[33\] and config.json makes it \[32\]"),
        (tensor(O_PROJ.replace("weight", "bias"), (32,)), CheckpointInvalid, "has '.*o_proj.bias', for which .* no place"),
        (without(GATE), CheckpointInvalid, f"lacks '{GATE}', which its config.json asks for"),
        (config(hidden_size=64), CheckpointInvalid, r"is \[128, 32\] and config.json makes it \[128, 64\]"),
        (config(num_hidden_layers=10**12), CheckpointInvalid, r"says 1000000000000 layers, and at most \d+ can be run"),
        (tensor("vision_tower.patch.weight", (2,)), ArchitectureUnsupported, "'vision_tower.patch.weight'"),
        (lambda folder: (folder / "config.json").unlink(), CheckpointInvalid, "has no config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), CheckpointInvalid, "not the JSON"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_nothing_is_visible(
    damage: Damage, error: type[StorageError], words: str, copied: Path, store: ObjectStore
) -> None:
    damage(copied)
    with pytest.raises(error, match=words):
        publish(copied, store, "damaged", "float32")
    with pytest.raises(ModelNotPublished):
        read_manifest(store, "damaged", "float32")
    assert list(store.list("models/damaged/")) == []


def test_values_beyond_float16_are_refused(copied: Path, store: ObjectStore) -> None:
    tensors(lambda found: found | {"model.norm.weight": found["model.norm.weight"] + 1e6})(copied)
    with pytest.raises(CheckpointInvalid, match=r"'model\.norm\.weight' has values beyond float16"):
        publish(copied, store, "beyond", "float16")


@pytest.mark.sampled(every=3)
@pytest.mark.parametrize("family", sorted({*tiny_models.ALL} - {*tiny_models.LLAMA_SHAPED}))
def test_shapes_of_other_families_are_those_of_transformers(family: str, store: ObjectStore, tmp_path: Path) -> None:
    save(tiny_models.whole_model(family), tmp_path)
    tensors = folder_tensors(tmp_path)
    names = (name for name in tensors if ".3." in name and "experts" not in name)
    name = next(name for name in names if tensors[name].ndim == 2)
    replace_tensors(tmp_path, tensors | {name: torch.ones(tensors[name].shape[0] + 1, tensors[name].shape[1])})
    with pytest.raises(CheckpointInvalid, match=re.escape(f"tensor {name!r} is [")):
        publish(tmp_path, store, "misshapen", "float32")
    assert list(store.list("models/misshapen/")) == []


@pytest.mark.parametrize("family", ["gpt2", "falcon", "gptj"])
def test_int8_is_refused_for_families_that_no_stage_runs_in_it(family: str, store: ObjectStore, tmp_path: Path) -> None:
    save(tiny_models.whole_model(family), tmp_path)
    with pytest.raises(ArchitectureUnsupported, match=f"'?{family}'?.*; publish it as bfloat16"):
        publish(tmp_path, store, f"{family}-int8", "int8")
    assert list(store.list(f"models/{family}-int8/")) == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_act": "mish"}, "do not run activation 'mish'; publish it as bfloat16"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "do not run rotation .*dynamic"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "rotation"),
    ],
)
def test_int8_is_refused_for_a_config_that_no_stage_runs_in_it(
    changes: dict[str, object], words: str, copied: Path, store: ObjectStore
) -> None:
    config(**changes)(copied)
    with pytest.raises(ArchitectureUnsupported, match=words):
        publish(copied, store, "odd", "int8")
    assert list(store.list("models/odd/int8/")) == []
    publish(copied, store, "odd", "bfloat16")


@pytest.mark.parametrize(
    ("content", "words"), [(b"\x80\x02pickle", "known are folders"), (b"GGUF\x03\0\0\0", "no GGUF file, or only its beginning")]
)
def test_files_of_other_formats_are_refused(content: bytes, words: str, store: ObjectStore, tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(content)
    with pytest.raises(CheckpointInvalid, match=words):
        publish(path, store, "format", "float32")


def test_a_missing_source_is_refused(store: ObjectStore) -> None:
    with pytest.raises(CheckpointInvalid, match="neither a folder, nor a file, nor a hub id"):
        publish("no such folder", store, "nowhere", "float32")


def test_a_second_run_imports_nothing_heavy(llama: Path, settings: StoreSettings, store: ObjectStore) -> None:
    publish(llama, store, "light", "float32")
    code = (
        f"{STORE_OF_ARGUMENTS}from storage.models.publisher import publish\n"
        "publish(sys.argv[1], store, 'light', 'float32')\n"
        "print({'torch', 'numpy', 'transformers', 'gguf', 'tokenizers', 'huggingface_hub'} & set(sys.modules))\n"
    )
    arguments = [str(llama), *store_arguments(settings)]
    run = subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, check=True, capture_output=True, text=True)
    assert run.stdout == "set()\n"
