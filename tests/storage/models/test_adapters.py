"""Publishing PEFT folders: what is stored, what is refused and why, versions and their shares."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from storage.errors import AdapterInvalid, AdapterNotPublished, ChecksumMismatch, ModelNotPublished, StorageError
from storage.loading.weight_loader import iterate_objects
from storage.models import adapter_publisher
from storage.models.adapter_publisher import adapted_models, delete_adapter, publish_adapter, set_share
from storage.models.adapters import list_adapters, read_name, read_version
from storage.models.publisher import publish
from storage.store.object_reader import ObjectReader
from storage.store.object_store import ObjectStore
from storage.store.settings import StoreSettings
from tests.support.storage import tiny_models
from tests.support.storage.adapters import adapted, saved
from tests.support.storage.torch_tensors import as_torch

TENSORS = "adapter_model.safetensors"


@pytest.fixture(scope="module", autouse=True)
def base(store: ObjectStore, tmp_path_factory: pytest.TempPathFactory) -> None:
    for family in ("llama", "gpt2"):
        folder = tmp_path_factory.mktemp(family)
        tiny_models.whole_model(family).save_pretrained(folder)
        publish(folder, store, family, "float32")


def folder_of(path: Path, seed: int = 1, family: str = "llama", **config: Any) -> Path:
    return saved(adapted(tiny_models.whole_model(family), seed, **config), path)


def objects(settings: StoreSettings, version: str, model: str = "llama") -> dict[str, torch.Tensor]:
    with ObjectReader(settings) as reader:
        stored = read_version(reader, model, version).objects
        return {name: tensor for each in iterate_objects(reader, stored) for name, tensor in as_torch(each.tensors).items()}


PATTERNS = {"rank_pattern": {"layers.1.self_attn.q_proj": 6}, "alpha_pattern": {"v_proj": 5}, "use_rslora": True}


@pytest.mark.parametrize(
    ("family", "config", "object_bytes", "number"),
    [("llama", PATTERNS, 4 * 2**20, 1), ("gpt2", {"r": 6, "fan_in_fan_out": True, "use_rslora": True}, 30_000, 3)],
    ids=["one object", "two layers in each object"],
)
def test_matrices_are_stored_unchanged_with_their_scale(
    family: str,
    config: dict[str, Any],
    object_bytes: int,
    number: int,
    store: ObjectStore,
    settings: StoreSettings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(adapter_publisher, "_OBJECT_BYTES", object_bytes)
    folder = folder_of(tmp_path, family=family, **config)
    published = publish_adapter(store, family, "plain", folder)
    assert len(read_version(store, family, published.version).objects) == number
    found, source = objects(settings, published.version, family), load_file(folder / TENSORS)
    assert published.rank == 6
    assert len(found) == len(source) * 3 // 2
    for name, tensor in source.items():
        assert torch.equal(found[name.removeprefix("base_model.model.").removesuffix(".weight")], tensor), name
    scales = {name.removesuffix(".lora_scale"): tensor.item() for name, tensor in found.items() if name.endswith("_scale")}
    for module, scale in scales.items():
        rank = found[f"{module}.lora_A"].shape[0]
        assert scale == pytest.approx((5 if "v_proj" in module else 8) / math.sqrt(rank)), module


def test_a_push_is_a_version_and_running_requests_are_shared(store: ObjectStore, tmp_path: Path) -> None:
    one = publish_adapter(store, "llama", "shared", folder_of(tmp_path / "1", seed=1))
    again = publish_adapter(store, "llama", "shared", tmp_path / "1")
    assert again == one
    two = publish_adapter(store, "llama", "shared", folder_of(tmp_path / "2", seed=2), share=10)
    name = read_name(store, "llama", "shared")
    assert {each.version: each.share for each in name.versions} == {one.version: 90, two.version: 10}
    assert [name.version_at(point) for point in (0, 0.89, 0.9, 0.999)] == [one.version] * 2 + [two.version] * 2
    back = set_share(store, "llama", "shared", one.version[:8], 100)
    assert {back.version_at(point / 100) for point in range(100)} == {one.version}
    with pytest.raises(AdapterNotPublished, match="0 versions"):
        set_share(store, "llama", "shared", "no-such", 100)


def test_a_deleted_name_leaves_the_versions_of_others(store: ObjectStore, tmp_path: Path) -> None:
    version = publish_adapter(store, "llama", "kept", folder_of(tmp_path, seed=7)).version
    publish_adapter(store, "llama", "doomed", tmp_path)
    delete_adapter(store, "llama", "doomed")
    assert read_version(store, "llama", version).rank == 4
    assert "doomed" not in list_adapters(store, "llama")
    assert "llama" in adapted_models(store)
    delete_adapter(store, "llama", "kept")
    assert not [item for item in store.list("adapters/llama/versions/") if version in item.key]
    with pytest.raises(AdapterNotPublished):
        read_version(store, "llama", version)


def _config(change: dict[str, Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | change))

    return damage


def _tensor(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / TENSORS)
        change(tensors)
        save_file(tensors, folder / TENSORS)

    return damage


Q = "base_model.model.model.layers.0.self_attn.q_proj"


def moved(tensors: dict[str, torch.Tensor], module: str) -> dict[str, torch.Tensor]:
    return {f"{module}.lora_{which}.weight": tensors[f"{Q}.lora_{which}.weight"].clone() for which in "AB"}


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (_config({"use_dora": True}), "DoRA.*merge it into the model"),
        (_config({"modules_to_save": ["lm_head"]}), "lm_head.*no stage computes"),
        (_config({"bias": "all"}), "biases"),
        (_config({"peft_type": "LOHA"}), "'LOHA'"),
        (_config({"r": 5}), "rank 4 in .* and 5"),
        (_config({"r": "four"}), "cannot be read"),
        (_config({"alora_invocation_tokens": [1]}), "aLoRA"),
        (_tensor(lambda tensors: tensors.update({f"{Q}.lora_magnitude_vector": torch.ones(32)})), "lora_magnitude_vector"),
        (_tensor(lambda tensors: tensors.update({"base_model.model.lm_head.weight": torch.ones(2, 2)})), "lm_head.*merge it"),
        (_tensor(lambda tensors: tensors.pop(f"{Q}.lora_B.weight")), "lacks the other matrix"),
        (_tensor(lambda tensors: tensors.update({f"{Q}.lora_A.weight": torch.ones(4, 31)})), r"\[4, 31\].*\[32, 32\]"),
        (_tensor(lambda tensors: tensors.update({f"{Q}.lora_A.weight": torch.ones(4, 32).to(torch.int32)})), "I32"),
        (_tensor(lambda tensors: tensors.update(moved(tensors, f"{Q}_x"))), "another model"),
        (_tensor(lambda tensors: tensors.update(moved(tensors, Q.replace("0", "9")))), "6 layers"),
        (lambda folder: (folder / TENSORS).rename(folder / "adapter_model.bin"), "pickle"),
        (lambda folder: (folder / "adapter_config.json").unlink(), "has no adapter_config.json; name the folder that"),
    ],
)  # fmt: skip
def test_what_no_stage_computes_is_refused_before_anything_is_written(
    damage: Callable[[Path], None], reason: str, store: ObjectStore, tmp_path: Path
) -> None:
    damage(folder_of(tmp_path))
    before = [item.key for item in store.list("adapters/")]
    with pytest.raises(AdapterInvalid, match=reason):
        publish_adapter(store, "llama", "refused", tmp_path)
    assert [item.key for item in store.list("adapters/")] == before


@pytest.mark.parametrize(
    ("family", "targets", "reason"),
    [
        (
            "deepseek_v3",
            ["q_a_proj"],
            "q_a_proj is part of latent attention.*they add to mlp.down_proj, mlp.gate_proj, mlp.up_proj",
        ),
        ("deepseek_v3", ["o_proj"], "o_proj is part of latent attention"),
        ("lfm2", ["conv.in_proj"], "conv.in_proj is part of a recurrent mixer"),
        ("gemma3n_text", ["linear_left"], "part of the streams of hidden states.*mlp.up_proj, self_attn.k_proj"),
        ("gemma3n_text", ["per_layer_projection"], "part of the inputs that each layer gets from token ids"),
    ],
)
def test_matrices_to_which_layers_add_no_adapter_are_named(
    family: str, targets: list[str], reason: str, store: ObjectStore, tmp_path: Path
) -> None:
    """The refusal called them no linear modules, or parts of experts; adapters of o_proj were taken, and not computed."""
    tiny_models.whole_model(family).save_pretrained(tmp_path / "base")
    publish(tmp_path / "base", store, family, "float32")
    folder = folder_of(tmp_path / "adapter", family=family, target_modules=targets)
    with pytest.raises(AdapterInvalid, match=reason):
        publish_adapter(store, family, "refused", folder)


def test_rank_above_the_limit_is_refused(store: ObjectStore, tmp_path: Path) -> None:
    with pytest.raises(AdapterInvalid, match="at most 256"):
        publish_adapter(store, "llama", "large", folder_of(tmp_path, r=257))


def test_its_model_must_be_published(store: ObjectStore, tmp_path: Path) -> None:
    with pytest.raises(ModelNotPublished, match=r"'mistral' is not published \(published: .*llama"):
        publish_adapter(store, "mistral", "early", folder_of(tmp_path))


def test_an_altered_object_is_noticed(store: ObjectStore, settings: StoreSettings, tmp_path: Path) -> None:
    version = publish_adapter(store, "llama", "altered", folder_of(tmp_path, seed=9)).version
    stored = read_version(store, "llama", version).objects["from-00000"]
    data = bytearray(store.get(stored.key))
    data[-70] ^= 1
    store.put(stored.key, bytes(data))
    with pytest.raises(ChecksumMismatch):
        objects(settings, version)
    store.delete(stored.key)
    with pytest.raises(StorageError, match="from-00000"):
        objects(settings, version)
