"""The table of families against transformers' own classes: sizes, defaults, names and shapes of tensors."""

from importlib import import_module
from typing import Any, Final

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.core_model_loading import revert_weight_conversion

from storage.checkpoints.checkpoint import SourceTensor
from storage.checkpoints.decoder import layer_shapes, outer_shapes
from storage.checkpoints.decoder_config import decoder_of
from storage.checkpoints.decoder_families import DECODER_FAMILIES
from storage.checkpoints.model_description import describe_by_transformers, describe_model
from storage.errors import ArchitectureUnsupported
from storage.models.expert_tensors import split_experts
from tests.support.storage import tiny_models

BARE: Final[dict[str, Any]] = {
    "vocab_size": 48,
    "hidden_size": 256,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 32,
    "pad_token_id": 0,
}  # what every config.json says; a family has a default for everything else
NEEDED: Final[dict[str, dict[str, Any]]] = {
    "ministral": {"head_dim": 4},
    "helium": {"num_key_value_heads": 32, "head_dim": 8},
    "hunyuan_v1_dense": {"head_dim": 8},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gemma4_text": {"vocab_size_per_layer_input": BARE["vocab_size"]},
    "nemotron": {"num_key_value_heads": 32},
    "qwen3_5_text": {"layer_types": ["linear_attention", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "nemotron_h": {"layers_block_type": ["linear_attention", "full_attention", "moe"]},
}


def bare_config(family: str) -> dict[str, Any]:
    """Without its keys transformers does not build the family's model."""
    names = DECODER_FAMILIES[family].keys
    return {"model_type": family, **{names.get(key, key): value for key, value in BARE.items()}, **NEEDED.get(family, {})}


CONFIGS: Final = (
    *(tiny_models.tiny_config(name) for name in tiny_models.NATIVE),
    *map(bare_config, DECODER_FAMILIES),
    *({"model_type": family, **BARE, "num_key_value_heads": None} for family in ("llama", "qwen2", "smollm3")),
    {"model_type": "llama", **BARE, "head_dim": None},
    {"model_type": "llama", **BARE, "num_nextn_predict_layers": 1, "architectures": ["LlamaForCausalLM"]},
)


@pytest.mark.parametrize(
    "config",
    # Their layers differ in heads, or get inputs of their own.
    [config for config in CONFIGS if config["model_type"] not in ("gemma3n_text", "gemma4_text")],
    ids=lambda config: str(config["model_type"]),
)
def test_a_manifest_describes_a_model_as_transformers_does(config: dict[str, Any]) -> None:
    if "num_key_value_heads" in DECODER_FAMILIES[config["model_type"]].keys:  # the class does not read it
        config = {key: value for key, value in config.items() if key != "num_key_value_heads"}
    assert describe_model(config) == describe_by_transformers(config, config["model_type"])


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: str(config["model_type"]))
def test_tensors_are_those_of_the_model(config: dict[str, Any]) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    described = decoder_of(config)
    ours = outer_shapes(described)
    for number, layer in enumerate(described.layers):
        ours |= {f"{described.names.layers}.{number}.{name}": shape for name, shape in layer_shapes(described, layer).items()}
    saved = revert_weight_conversion(model, model.state_dict())
    sources = {
        name: SourceTensor("F32", tuple(tensor.shape), lambda first, last: memoryview(b"")) for name, tensor in saved.items()
    }
    assert ours == {name: tensor.shape for name, tensor in split_experts(config["model_type"], sources).items()}


@pytest.mark.parametrize("family", DECODER_FAMILIES)
def test_a_key_is_read_by_its_other_names(family: str) -> None:
    """Checkpoints of EXAONE say num_layers, for example. transformers writes the first name into every config that it saves."""
    known = AutoConfig.for_model(**bare_config(family))
    values = known.to_dict()
    config = bare_config(family) | {key: values[key] for key in known.attribute_map.values() if key in values}
    for other, key in known.attribute_map.items():
        renamed = {other if name == key else name: value for name, value in config.items()}
        assert decoder_of(renamed) == decoder_of(config), f"{key} as {other}"


@pytest.mark.parametrize("family", DECODER_FAMILIES)
def test_a_row_names_the_class_that_it_describes(family: str) -> None:
    module, _, name = DECODER_FAMILIES[family].source.partition(":")
    assert issubclass(getattr(import_module(f"transformers.models.{module}"), name), torch.nn.Module)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hidden_size": "128"}, "config.json has hidden_size = '128'; a 'llama' has a number of at least 1 there"),
        ({"num_hidden_layers": 0}, "has num_hidden_layers = '0'"),
        ({"vocab_size": True}, "has vocab_size = 'True'"),
        ({"attention_bias": 1}, "has attention_bias = '1'; a 'llama' has true or false there"),
        ({"intermediate_size": None}, "has intermediate_size = 'None'"),
        ({"hidden_size": ...}, "config.json lacks hidden_size; a 'llama' has a number of at least 1"),
    ],
)
def test_an_invalid_or_missing_size_is_named(change: dict[str, Any], words: str) -> None:
    """In `change`, `...` takes a size away."""
    config = {name: value for name, value in (BARE | change).items() if value is not ...}
    with pytest.raises(ArchitectureUnsupported, match=words):
        describe_model({"model_type": "llama", **config})
