"""Config.json in both spellings, and every rotation, against transformers' own reading."""

import json
from typing import Any

import pytest
import torch
from transformers import AutoConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from functions.stage.models.llama.layer import Rope, rotate
from functions.stage.models.llama.rope import interleaved_rows
from storage.checkpoints.decoder import DECODER_KEY
from storage.checkpoints.decoder_config import decoder_of, with_description
from storage.checkpoints.decoder_families import DECODER_FAMILIES, UnsupportedConfig
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
    rope = Rope(decoder_of(given).ropes["all"].parameters, 32, torch.device("cpu"))
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
    assert list(decoder_of(tiny_models.tiny_config(name) | changes).windows) == expected


@pytest.mark.parametrize("name", tiny_models.NATIVE)
def test_a_config_without_defaults_reads_the_same(name: str) -> None:
    full = tiny_models.tiny_config(name)
    lean = AutoConfig.for_model(**full).to_diff_dict()
    assert decoder_of(lean) == decoder_of(full)


@pytest.mark.parametrize("model_type", DECODER_FAMILIES)
def test_family_defaults_are_those_of_transformers(model_type: str) -> None:
    sizes = {
        "model_type": model_type, "vocab_size": 8, "hidden_size": 64, "intermediate_size": 8, "num_hidden_layers": 32,
        "num_attention_heads": 8, "num_key_value_heads": 8,
    }  # fmt: skip
    needed = {
        "mamba2": {"num_heads": 2, "head_dim": 64},
        "gemma4_text": {"vocab_size_per_layer_input": 8},
        "nemotron_h": {"layers_block_type": ["linear_attention", "full_attention", "mlp", "moe"]},
    }.get(model_type, {})
    given = {DECODER_FAMILIES[model_type].keys.get(key, key): value for key, value in sizes.items()} | needed
    assert decoder_of(given) == decoder_of(AutoConfig.for_model(**given).to_dict())


@pytest.mark.parametrize("name", tiny_models.NATIVE)
def test_a_published_description_is_read_without_the_table(name: str) -> None:
    config = tiny_models.tiny_config(name)
    published = json.loads(json.dumps(with_description(config)))
    assert published.keys() - config.keys() == {DECODER_KEY}
    assert decoder_of({DECODER_KEY: published[DECODER_KEY]}) == decoder_of(config)


def test_a_description_with_an_unknown_field_is_refused() -> None:
    published = json.loads(json.dumps(with_description(tiny_models.tiny_config("llama"))))
    published[DECODER_KEY]["kinds"][0]["attention"]["soft_floor"] = 1.0
    with pytest.raises(UnsupportedConfig, match="soft_floor"):
        decoder_of(published)


@pytest.mark.parametrize(("key", "value"), [("attention_temperature", 0.5), ("new_gate", True), ("experts", [1])])
def test_an_unknown_key_is_refused_unless_it_says_nothing(key: str, value: object) -> None:
    config = tiny_models.tiny_config("llama")
    with pytest.raises(UnsupportedConfig, match=f"the keys {key}, which may change numbers"):
        decoder_of(config | {key: value})
    assert decoder_of(config | {key: None}) == decoder_of(config)


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("gpt_neox", {"head_dim": 16}, "head_dim 16"),  # the class does not read it, and its rotation does
        ("opt", {"do_layer_norm_before": False}, "do_layer_norm_before = False"),
        ("apertus", {"hidden_act": "mish"}, "activation 'mish'"),
        ("llama", {"hidden_act": "xielu"}, "activation 'xielu'"),
        ("phi3", {"partial_rotary_factor": 0.3, "rope_parameters": None, "head_dim": 10}, "rotation"),
        ("ministral3", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, "queries that grow by None"),
        ("gemma3_text", {"sliding_window": None}, "to which the config gives no window"),
    ],
)
def test_what_a_row_does_not_describe_is_refused(name: str, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UnsupportedConfig, match=words):
        decoder_of(tiny_models.tiny_config(name) | changes)
