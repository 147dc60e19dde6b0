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

from functions.stage.models.packed_tensors import join_experts
from functions.stage.models.torch_border import weight_tensor
from storage.checkpoints.families import REFUSED
from storage.checkpoints.gguf_checkpoint import open_gguf
from storage.checkpoints.gguf_config import ARCHITECTURES
from storage.checkpoints.gguf_format import read_header
from storage.models.publisher import plan_publication
from tests.support.functions.borders import raw
from tests.support.storage import convert_to_gguf, llama_cpp, tiny_models
from tests.support.storage.tiny_models import as_published
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
DEEPSEEK_YARN = {**YARN, "mscale": 0.707, "mscale_all_dim": 0.707, "beta_fast": 32.0, "beta_slow": 1.0}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [1.5, 2.0, 3.0, 4.0],
    "original_max_position_embeddings": 64,
}
DENSE_GRANITE = {"num_local_experts": 0, "num_experts_per_tok": 0, "shared_intermediate_size": 64}
NEMOTRON = ["linear_attention", "mlp", "full_attention", "mlp", "linear_attention", "mlp"]
NEMOTRON_MOE = ["linear_attention", "moe", "full_attention", "moe", "linear_attention", "moe"]
FALCON_PLAIN = {
    key: [1.0] * len(value) if isinstance(value, list) else 1.0 for key, value in tiny_models.FALCON_MULTIPLIERS.items()
}
# Name of the case → tiny model, and changes to it. What a GGUF file cannot say is left out of the models.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in (
        "llama", "llama_tied", "llama_biased", "llama_wide_heads", "llama_rope_linear", "llama_rope_llama3", "llama_rope_yarn",
        "smollm3", "mistral", "qwen2", "qwen3", "seed_oss", "seed_oss_biased", "mixtral", "gemma", "gemma2", "gemma3_text",
        "phi3", "olmo2", "olmo3", "granite", "cohere", "stablelm", "nemotron", "glm4", "ernie4_5", "exaone4",
        "hunyuan_v1_dense", "granitemoe", "granitemoeshared", "olmo", "olmoe", "cohere2", "glm", "glm4_moe",
        "deepseek_v2", "deepseek_v3", "ministral3", "arcee", "gpt_oss", "falcon", "falcon_grouped", "apertus",
        "gpt_neox", "gpt_neox_sequential", "gpt2", "gemma4_text", "gemma4_text_experts",
        "qwen3_next", "lfm2", "granitemoehybrid", "mamba2", "mamba", "falcon_mamba",
    )},
    "qwen3_5_text": ("qwen3_5_text", {"head_dim": 64}),
    "qwen3_5_moe_text": ("qwen3_5_moe_text", {"head_dim": 64}),
    "qwen3_5_ungrouped": ("qwen3_5_text", {"head_dim": 64, "linear_num_value_heads": 2}),
    "lfm2_moe": ("lfm2_moe", {"tie_word_embeddings": True}),
    "granite_hybrid_dense": ("granitemoehybrid", DENSE_GRANITE),
    "bamba": ("bamba", {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 1.0}}),
    "bamba_partial": ("bamba", {}),
    "nemotron_h": ("nemotron_h", {"layers_block_type": NEMOTRON}),
    "nemotron_h_moe": ("nemotron_h", {"layers_block_type": NEMOTRON_MOE}),
    "falcon_h1": ("falcon_h1", {"head_dim": 8, **FALCON_PLAIN}),
    "falcon_h1_multiplied": ("falcon_h1", {"head_dim": 8}),
    "falcon_h1_normed": ("falcon_h1", {"head_dim": 8, **FALCON_PLAIN, "mamba_rms_norm": True, "mamba_norm_before_gate": False}),

    "gemma3n_text": ("gemma3n_text", {"altup_num_inputs": 4, "vocab_size_per_layer_input": tiny_models.VOCAB_SIZE}),
    "llama3_wide": ("llama", {"head_dim": 64, "rope_parameters": LLAMA3}),
    "qwen3_yarn": ("qwen3", {"rope_parameters": YARN}),
    "qwen2_moe": ("qwen2_moe", {"mlp_only_layers": []}),
    "qwen3_moe": ("qwen3_moe", {"mlp_only_layers": [], "norm_topk_prob": True}),
    "qwen2_fused": ("qwen2", {}),
    "llama_fused": ("llama", {}),
    "starcoder2": ("starcoder2", {"sliding_window": None}),
    "phi": ("phi", {"qk_layernorm": False, "intermediate_size": 128}),
    "glm4_moe_alone": ("glm4_moe", {"num_nextn_predict_layers": 0}),
    "deepseek_v2_lite": ("deepseek_v2", {"q_lora_rank": None, "rope_parameters": DEEPSEEK_YARN}),
    "deepseek_v3_yarn": ("deepseek_v3", {"rope_parameters": DEEPSEEK_YARN}),
    "gpt_oss_yarn": ("gpt_oss", {"rope_parameters": {**YARN, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False}}),
    "phi3_sliding": ("phi3_sliding", {}),
    "phi3_long": ("phi3", {"rope_parameters": LONG, "original_max_position_embeddings": 64}),
    "cohere_plain": ("cohere", {"use_qk_norm": False}),
    "stablelm_alone": ("stablelm", {"use_parallel_residual": True, "use_qkv_bias": False}),
}  # fmt: skip
# What the converter reads instead of transformers' config, None: nothing; and options of the converter.
OTHER_KEYS = {
    "qwen2_fused": {"fuse_qkv": True},
    "llama_fused": {"fuse_qkv": True},
    "gpt_neox": {"rotary_pct": 0.25},
    "gpt_neox_sequential": {"rotary_pct": 0.25},
    "gpt2": {"n_ctx": 256},
    "gemma4_text": {"moe_intermediate_size": 0},
    "falcon": {"num_kv_heads": 1},
    "deepseek_v3": {"scoring_func": "sigmoid"},
    "deepseek_v3_yarn": {"scoring_func": "sigmoid"},
    "cohere2": {"rotary_pct": 1.0},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 3},
    "granite_hybrid_dense": {"layer_types": ["mamba", "attention"] * 3},
    "bamba_partial": {"attn_rotary_emb": 4},
    "nemotron_h": {
        "hybrid_override_pattern": "M-*-M-",
        "rms_norm_eps": 1e-5,
        "num_experts_per_tok": None,
        "n_routed_experts": None,
        "n_group": None,
        "topk_group": None,
    },
    "nemotron_h_moe": {"rms_norm_eps": 1e-5},
}
MULTIPLIED = ("falcon_h1_multiplied",)  # the converter multiplies their tensors by numbers of the config
# Cases that llama.cpp does not load, or computes in another way than transformers, and why.
NOT_BY_LLAMA_CPP = {
    "bamba_partial": "it exchanges rows of whole heads, of which it rotates a part",
    "cohere": "it expects norms of queries and keys in models of 64 layers and more only",
    "deepseek_v2_lite": "it expects models without q_lora_rank to have 26 or 27 layers",
    "exaone4": "it expects windows in models of 64 layers only",
    "gemma3n_text": "it expects 30 or 35 layers, of which the first 10 are sparse, and a rank of 64",
    "glm4_moe": "the file counts a layer for further tokens that it does not have",
    "phi3_sliding": "it ignores the window",
    "seed_oss_biased": "it has no bias of the output",
}


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the folder of every case, and its GGUF file beside it."""
    root = tmp_path_factory.mktemp("converted")
    sources = llama_cpp.sources().resolve()
    for case, (name, changes) in CASES.items():
        model = tiny_models.whole_model(name, **changes)
        for buffer_name, buffer in model.named_buffers():
            if buffer_name.endswith(("e_score_correction_bias", "expert_bias")):
                buffer.copy_(torch.linspace(-0.1, 0.1, len(buffer)))
        model.save_pretrained(root / case)
        (root / case / convert_to_gguf.CHANGES).write_text(json.dumps(OTHER_KEYS.get(case, {})))
    folders = [root / case for case in CASES]
    command = [sys.executable, convert_to_gguf.__file__, sources, *folders]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return root


@pytest.mark.llamacpp
@pytest.mark.parametrize("case", CASES)
def test_a_converted_model_is_the_one_that_it_was(case: str, converted: Path, tmp_path: Path) -> None:
    checkpoint = open_gguf(converted / f"{case}.gguf", tokenizer={})
    model_type = checkpoint.config["model_type"]
    tensors, theirs = checkpoint_floats(checkpoint), as_published(model_type, folder_tensors(converted / case))
    assert tensors.keys() == theirs.keys()
    for name, tensor in theirs.items():
        # A norm that is stored with one added has lost its last bits, and so has a decay that is stored as its exponential.
        rounded = name.endswith(("norm.weight", "A_log"))
        if case not in MULTIPLIED:
            torch.testing.assert_close(tensors[name], tensor, rtol=0, atol=2e-7 if rounded else 0)
    if checkpoint.config["model_type"] not in REFUSED:
        ours, same = (
            plan_publication(path, "float32", tokenizer=converted / case)
            for path in (converted / f"{case}.gguf", converted / case)
        )
        stored, expected = (
            {each.name: {name: (tensor.dtype, tensor.shape) for name, tensor in each.tensors.items()} for each in plan.objects}
            for plan in (ours, same)
        )
        assert stored == expected
    whole = raw(tensors)
    join_experts(model_type, whole)
    save_file(
        {name: weight_tensor(tensor).clone() for name, tensor in whole.items()},
        tmp_path / "model.safetensors",
        metadata={"format": "pt"},
    )
    (tmp_path / "config.json").write_text(json.dumps(dict(checkpoint.config)))
    attention = "eager" if case == "gemma2" else None
    first, second = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=attention).eval()
        for folder in (converted / case, tmp_path)
    )
    prompt = list(range(3, 100))
    # Qwen3.5's delta rule amplifies the lost bits of its decay; docs/log.md has how much.
    most = 1e-3 if model_type.startswith("qwen3_5") else 2e-4
    torch.testing.assert_close(tiny_models.all_logits(second, prompt), tiny_models.all_logits(first, prompt), rtol=0, atol=most)


@pytest.mark.llamacpp
@pytest.mark.parametrize("case", [case for case in CASES if case not in NOT_BY_LLAMA_CPP])
def test_llama_cpp_computes_the_same(case: str, converted: Path) -> None:
    prompt = list(range(3, 100))
    theirs = torch.from_numpy(llama_cpp.logits(converted / f"{case}.gguf", prompt))
    model = AutoModelForCausalLM.from_pretrained(converted / case, dtype=torch.float32, attn_implementation="eager").eval()
    ours = tiny_models.all_logits(model, prompt)
    # The median, since a router that is nearly undecided takes another expert if its input is off by one bit.
    assert (ours - theirs).abs().median() < 0.02 * ours.std()


@pytest.mark.llamacpp
def test_every_architecture_is_compared(converted: Path) -> None:
    seen = {read_header(converted / f"{case}.gguf").fields["general.architecture"] for case in CASES}
    assert seen == ARCHITECTURES.keys()
