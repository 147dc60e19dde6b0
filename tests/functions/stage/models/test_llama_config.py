"""Config.json in both spellings, and every rotation, against transformers' own reading."""

from typing import Any

import pytest
import torch
from transformers import AutoConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from functions.stage.models.llama.layer import Rope, rotate
from functions.stage.models.llama.rope import interleaved_rows
from storage.checkpoints.llama_config import LlamaConfig
from storage.checkpoints.llama_shaped import LLAMA_FAMILIES
from tests.support.storage import tiny_models

ROTATIONS: list[dict[str, Any]] = [
    {"rope_type": "default"},
    {"rope_type": "linear", "factor": 4.0},
    {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "attention_factor": 1.5},
    {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64, "mscale": 0.7, "mscale_all_dim": 1.0},
    {"rope_type": "yarn", "factor": 40.0, "beta_fast": 16, "beta_slow": 2, "truncate": False},
]


def rotated_by_transformers(config: dict[str, Any], heads: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    embedding = LlamaRotaryEmbedding(AutoConfig.for_model(**config))
    cos, sin = (part[0].unsqueeze(1) for part in embedding(heads, positions.unsqueeze(0)))
    first, second = heads.chunk(2, -1)
    return heads * cos + torch.cat((-second, first), -1) * sin


@pytest.mark.parametrize("parameters", ROTATIONS, ids=lambda parameters: "-".join(map(str, parameters.values())))
@pytest.mark.parametrize("old_spelling", [False, True])
def test_rotations_are_those_of_transformers(parameters: dict[str, Any], old_spelling: bool) -> None:
    config = tiny_models.tiny_config("llama", head_dim=32, rope_parameters={**parameters, "rope_theta": 50_000.0})
    given = dict(config)
    if old_spelling:
        del given["rope_parameters"]
        given |= {"rope_theta": 50_000.0, "rope_scaling": {"type": parameters["rope_type"], **parameters}}
        del given["rope_scaling"]["rope_type"]
    rope = Rope(LlamaConfig.from_dict(given).rope, 32, torch.device("cpu"))
    positions = torch.tensor([0, 1, 7, 63, 64, 200])
    heads = torch.randn(6, 3, 32, generator=torch.Generator().manual_seed(0))
    order = interleaved_rows(1, 32)
    ours = heads[..., order].contiguous()
    rotate(ours, rope.rotations(positions))
    torch.testing.assert_close(ours, rotated_by_transformers(config, heads, positions)[..., order], atol=2e-5, rtol=0)


SLIDING = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 3}


@pytest.mark.parametrize(
    ("name", "changes", "expected"),
    [
        ("llama", SLIDING | {"use_sliding_window": True}, [None] * 6),
        ("seed_oss", SLIDING | {"use_sliding_window": True}, [None] * 6),
        ("smollm3", SLIDING | {"use_sliding_window": False}, [8, None] * 3),
        ("smollm3", {"sliding_window": 8, "use_sliding_window": True, "layer_types": None}, [None, None, None, 8, None, None]),
        ("qwen2", SLIDING | {"use_sliding_window": True}, [8, None] * 3),
        ("ministral", {"sliding_window": 8, "layer_types": None}, [8] * 6),
    ],
)
def test_windows_are_read_as_each_family_reads_them(name: str, changes: dict[str, Any], expected: list[int | None]) -> None:
    """tests/functions/stage/models/test_fuzzed_configs.py compares with transformers."""
    assert list(LlamaConfig.from_dict(tiny_models.tiny_config(name) | changes).windows) == expected


@pytest.mark.parametrize("name", tiny_models.LLAMA_SHAPED)
def test_a_config_without_defaults_reads_the_same(name: str) -> None:
    full = tiny_models.tiny_config(name)
    lean = AutoConfig.for_model(**full).to_diff_dict()
    assert LlamaConfig.from_dict(lean) == LlamaConfig.from_dict(full)


@pytest.mark.parametrize("model_type", LLAMA_FAMILIES)
def test_family_defaults_are_those_of_transformers(model_type: str) -> None:
    sizes = {
        "model_type": model_type,
        "vocab_size": 8,
        "hidden_size": 64,
        "intermediate_size": 8,
        "num_hidden_layers": 32,
        "num_attention_heads": 8,
    }
    complete = AutoConfig.for_model(**sizes, num_key_value_heads=8).to_dict()
    assert LlamaConfig.from_dict({**sizes, "num_key_value_heads": 8}) == LlamaConfig.from_dict(complete)
