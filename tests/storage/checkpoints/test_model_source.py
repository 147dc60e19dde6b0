"""Sources of checkpoints: the hub through its local cache, and the detection of changes."""

import os
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from storage.checkpoints.model_source import checkpoint_fingerprint, checkpoint_state, locate, open_checkpoint
from storage.errors import CheckpointInvalid
from tests.support.storage import tiny_models

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny_models.whole_model("llama").save_pretrained(folder)
    return folder


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's cache on this machine, and no network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return tmp_path


def test_a_hub_id_is_fetched(hub: Path, folder: Path) -> None:
    repository = hub / "models--owner--tiny-llama"
    snapshot = shutil.copytree(folder, repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    assert locate("owner/tiny-llama") == snapshot
    assert locate(f"owner/tiny-llama@{COMMIT}") == snapshot
    assert open_checkpoint(snapshot).tensors.keys() == load_file(folder / "model.safetensors").keys()


def test_a_hub_id_that_cannot_be_fetched_is_named(hub: Path) -> None:
    with pytest.raises(CheckpointInvalid, match="'owner/missing' is no file or folder here, and the hub does not give it"):
        locate("owner/missing")


@pytest.mark.parametrize("source", ["missing", "a/b/c", "https://example.com/model", "owner/"])
def test_an_invalid_source_is_refused(source: str) -> None:
    with pytest.raises(CheckpointInvalid, match="neither a folder, nor a file, nor a hub id"):
        locate(source)


def test_a_fingerprint_stays_until_something_changes(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    first = checkpoint_fingerprint(copy)
    (copy / "notes.md").write_text("of no account")
    assert checkpoint_fingerprint(copy) == first
    os.utime(copy / "config.json", (1, 1))
    assert checkpoint_fingerprint(copy) == first
    (copy / "config.json").write_text((copy / "config.json").read_text() + " ")
    second = checkpoint_fingerprint(copy)
    assert second != first
    weights = copy / "model.safetensors"
    save_file({name: tensor + 1 for name, tensor in load_file(weights).items()}, weights, {"format": "pt"})
    assert checkpoint_fingerprint(copy) not in (first, second)


def test_the_fingerprint_depends_on_contents_not_on_size_and_time(folder: Path, tmp_path: Path) -> None:
    """In a large file, too, and wherever the byte lies."""
    copy = shutil.copytree(folder, tmp_path / "copy")
    shard = copy / "model-extra.safetensors"
    with shard.open("wb") as file:
        file.truncate(2**27 + 2**20)
    os.utime(shard, (1, 1))
    first, before = checkpoint_fingerprint(copy), checkpoint_state(copy)
    with shard.open("r+b") as file:
        file.seek(2**26 + 12345)
        file.write(b"x")
    os.utime(shard, (1, 1))
    assert checkpoint_fingerprint(copy) != first
    assert checkpoint_state(copy) != before


def test_one_file_of_a_checkpoint_is_refused(folder: Path) -> None:
    with pytest.raises(CheckpointInvalid, match="give its folder"):
        open_checkpoint(folder / "model.safetensors")
