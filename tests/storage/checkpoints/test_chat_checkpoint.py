"""A small Hugging Face folder is read as it was written, without torch."""

import json
from pathlib import Path

import numpy as np
import pytest

from storage.checkpoints.model_source import checkpoint_fingerprint, open_checkpoint
from storage.errors import CheckpointInvalid
from tests.support.storage.published import VOCAB_SIZE, checkpoint_tensors, save_checkpoint


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_checkpoint(tmp_path)
    return tmp_path


def test_every_tensor_is_read_by_rows(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    expected = checkpoint_tensors()
    assert checkpoint.config["vocab_size"] == VOCAB_SIZE
    assert checkpoint.tensors.keys() == expected.keys()
    for name, tensor in checkpoint.tensors.items():
        assert (tensor.dtype, tensor.shape) == ("F32", expected[name].shape)
        assert b"".join(tensor.blocks()) == expected[name].tobytes()
        assert np.frombuffer(tensor.read_rows(1, 3), np.float32).tobytes() == expected[name][1:3].tobytes()


def test_files_beside_the_tensors_are_published_too(folder: Path) -> None:
    files = open_checkpoint(folder).files
    assert {"config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"} <= set(
        files
    )


def test_another_content_has_another_fingerprint(folder: Path) -> None:
    before = checkpoint_fingerprint(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-5}))
    assert checkpoint_fingerprint(folder) != before


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_folder_without_one_of_its_parts_is_refused(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(CheckpointInvalid):
        open_checkpoint(folder)
