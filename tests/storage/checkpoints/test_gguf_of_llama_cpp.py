"""GGUF files that llama.cpp's converter wrote are read as the models that they were made of. test_gguf_architectures.py has all
architectures, and needs llama.cpp."""

import pytest
import torch

from storage.checkpoints.gguf_checkpoint import open_gguf
from tests.support.storage import tiny_models
from tests.support.storage.files_of_llama_cpp import CASES, FOLDER
from tests.support.storage.torch_tensors import checkpoint_floats


@pytest.mark.parametrize("name", CASES)
def test_a_converted_file_has_the_models_tensors(name: str) -> None:
    checkpoint = open_gguf(FOLDER / f"{name}.gguf", tokenizer={})
    model = tiny_models.whole_model(name, **CASES[name])
    stored = tiny_models.checkpoint_tensors(model)
    found, expected = checkpoint_floats(checkpoint), tiny_models.as_published(model.config.model_type, stored)
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        rounded = name == "gemma3_text" and key.endswith("norm.weight")  # stored with one added
        torch.testing.assert_close(found[key], tensor, rtol=0, atol=2e-7 if rounded else 0)
    config = tiny_models.AutoConfig.for_model(**checkpoint.config)
    for key in ("model_type", "num_hidden_layers", "hidden_size", "tie_word_embeddings"):
        assert getattr(config, key) == getattr(model.config, key)
