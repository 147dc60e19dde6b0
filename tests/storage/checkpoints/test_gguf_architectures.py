"""GGUF files that llama.cpp's own converter wrote of tiny models: the same tensors and logits as their folders."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from storage.checkpoints.gguf_architectures import ARCHITECTURES
from storage.checkpoints.gguf_checkpoint import open_gguf
from storage.checkpoints.gguf_format import read_header
from tests.support.storage import convert_to_gguf, llama_cpp, tiny_models
from tests.support.storage.torch_tensors import checkpoint_floats, folder_tensors

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 64}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [1.5, 2.0, 3.0, 4.0],
    "original_max_position_embeddings": 64,
}
# Name of the case → tiny model, and changes to it. What a GGUF file cannot say is left out of the models.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in (
        "llama", "llama_tied", "llama_biased", "llama_wide_heads", "llama_rope_linear", "llama_rope_llama3", "llama_rope_yarn",
        "smollm3", "mistral", "qwen2", "qwen3", "seed_oss", "seed_oss_biased", "mixtral", "gemma", "gemma2", "gemma3_text",
        "phi3", "olmo2", "olmo3", "granite", "cohere", "stablelm", "nemotron", "glm4", "ernie4_5", "exaone4",
        "hunyuan_v1_dense",
    )},
    "llama3_wide": ("llama", {"head_dim": 64, "rope_parameters": LLAMA3}),
    "qwen3_yarn": ("qwen3", {"rope_parameters": YARN}),
    "qwen3_moe": ("qwen3_moe", {"mlp_only_layers": [], "norm_topk_prob": True}),
    "starcoder2": ("starcoder2", {"sliding_window": None}),
    "phi3_sliding": ("phi3_sliding", {}),
    "phi3_long": ("phi3", {"rope_parameters": LONG, "original_max_position_embeddings": 64}),
    "cohere_plain": ("cohere", {"use_qk_norm": False}),
    "stablelm_alone": ("stablelm", {"use_parallel_residual": True, "use_qkv_bias": False}),
}  # fmt: skip


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the folder of every case, and its GGUF file beside it."""
    root = tmp_path_factory.mktemp("converted")
    sources = llama_cpp.sources().resolve()
    for case, (name, changes) in CASES.items():
        tiny_models.whole_model(name, **changes).save_pretrained(root / case)
    folders = [root / case for case in CASES]
    subprocess.run([sys.executable, convert_to_gguf.__file__, sources, *folders], check=True, capture_output=True)
    return root


@pytest.mark.llamacpp
@pytest.mark.parametrize("case", CASES)
def test_a_converted_model_is_the_one_that_it_was(case: str, converted: Path, tmp_path: Path) -> None:
    checkpoint = open_gguf(converted / f"{case}.gguf", tokenizer={})
    tensors, theirs = checkpoint_floats(checkpoint), folder_tensors(converted / case)
    assert tensors.keys() == theirs.keys()
    for name, tensor in theirs.items():
        # A norm that is stored with one added has lost its last bits.
        torch.testing.assert_close(tensors[name], tensor, rtol=0, atol=2e-7 if name.endswith("norm.weight") else 0)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(dict(checkpoint.config)))
    attention = "eager" if case == "gemma2" else None
    first, second = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=attention).eval()
        for folder in (converted / case, tmp_path)
    )
    prompt = list(range(3, 100))
    torch.testing.assert_close(tiny_models.all_logits(second, prompt), tiny_models.all_logits(first, prompt), rtol=0, atol=2e-4)


@pytest.mark.llamacpp
def test_every_architecture_is_compared(converted: Path) -> None:
    seen = {read_header(converted / f"{case}.gguf").fields["general.architecture"] for case in CASES}
    assert seen == ARCHITECTURES.keys()
