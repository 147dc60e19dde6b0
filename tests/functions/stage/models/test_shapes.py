"""Shapes are checked against the config: no kernel sees a tensor of another shape, and the error names it."""

from typing import Any

import pytest
import torch

from functions.stage.models.build import GroupChoice, build_layer_group, choose, empty_group
from functions.stage.models.layer_group import MissingTensors
from functions.stage.models.llama.group import LlamaGroup
from functions.stage.models.llama.structure import WrongShape
from functions.stage.models.native.group import NativeGroup
from storage.checkpoints.decoder_families import DECODER_FAMILIES
from tests.support.functions.borders import raw
from tests.support.functions.int8_checkpoints import int8_checkpoint
from tests.support.functions.q4_checkpoints import q4_checkpoint
from tests.support.functions.stage_pipeline import tensors as tensors_of
from tests.support.storage import tiny_models

BUDGET_BYTES = 2**20


def empty(kind: Any, name: str, dtype: str) -> NativeGroup | LlamaGroup:
    config = tiny_models.tiny_config(name)
    return empty_group(GroupChoice(kind, "cpu"), config, 0, tiny_models.NUM_LAYERS, dtype, BUDGET_BYTES)


def test_every_family_of_the_table_has_a_model_that_runs_in_c() -> None:
    configs = [tiny_models.tiny_config(name) for name in {*tiny_models.ALL, *tiny_models.NATIVE_ONLY}]
    native = {config["model_type"] for config in configs if choose("auto", config, "float32", "cpu").kind == "native"}
    assert native == DECODER_FAMILIES.keys()


def wrong(shape: tuple[int, ...], seen: int) -> tuple[int, ...]:
    """Taller, wider, flat, and with one more dimension."""
    return [(shape[0] + 8, *shape[1:]), (*shape[:-1], shape[-1] + 8), (shape[0] * shape[-1],), (*shape, 1)][seen]


@pytest.mark.parametrize("kind", ["native", "llama"])
@pytest.mark.parametrize("seen", range(4))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_tensor_of_another_shape_is_refused_by_name(kind: Any, dtype: str, seen: int) -> None:
    group = empty(kind, "llama_biased", dtype)
    for name, tensor in tensors_of("llama_biased").items():
        shape = wrong(tuple(tensor.shape), seen)
        if shape == tuple(tensor.shape):
            continue
        with pytest.raises(WrongShape) as error:
            group.place(raw({name: torch.zeros(shape, dtype=getattr(torch, dtype))}))
        assert str(error.value) == f"{name} is {list(shape)}, and the config makes it {list(tensor.shape)}"


@pytest.mark.parametrize("kind", ["native", "llama"])
def test_scales_of_another_length_are_refused(kind: Any) -> None:
    config, tensors = tiny_models.tiny_config("llama"), int8_checkpoint(tensors_of("llama"))
    scale = next(name for name in tensors if name.endswith("_scale"))
    tensors[scale] = tensors[scale][:-1]
    with pytest.raises(WrongShape, match=scale):
        build_layer_group(kind, config, raw(tensors), 0, tiny_models.NUM_LAYERS, "int8", "cpu", BUDGET_BYTES)


def test_q4_tensors_that_are_not_packed_matrices_are_refused() -> None:
    tensors, group = q4_checkpoint(tensors_of("llama")), empty("native", "llama", "q4")
    name = "model.layers.2.mlp.up_proj.weight"
    right = tuple(tensors[name].shape)
    for wrong_shape in ((right[0] + 1, *right[1:]), (*right[:2], 319), (right[0], right[1] * right[2])):
        with pytest.raises(WrongShape, match="up_proj"):
            group.place(raw({name: torch.zeros(wrong_shape, dtype=torch.uint8)}))
    with pytest.raises(WrongShape, match="up_proj"):
        group.place(raw({name: torch.zeros(right)}))
    with pytest.raises(MissingTensors, match="which matrices alone are"):
        group.place(raw({"model.norm.weight": torch.zeros(32, dtype=torch.uint8)}))


@pytest.mark.parametrize("kind", ["native", "llama"])
@pytest.mark.parametrize("name", ["model.layers.1.self_attn.q_proj.bias", "model.layers.6.input_layernorm.weight"])
def test_a_tensor_that_the_config_does_not_have_is_refused(kind: Any, name: str) -> None:
    with pytest.raises(MissingTensors, match=rf"the config has no place for {name} \[32\]"):
        empty(kind, "llama", "float32").place(raw({name: torch.zeros(32)}))


@pytest.mark.parametrize("family", ["gemma", "gpt2"])
def test_other_families_name_the_tensor_and_both_shapes(family: str) -> None:
    tensors = dict(tensors_of(family))
    name = next(name for name, tensor in tensors.items() if ".3." in name and tensor.ndim == 2)
    tall = (tensors[name].shape[0] + 1, tensors[name].shape[1])
    expected = list(tensors[name].shape)
    tensors[name] = torch.zeros(tall)
    config = tiny_models.tiny_config(family)
    with pytest.raises(MissingTensors) as error:
        build_layer_group("transformers", config, raw(tensors), 0, tiny_models.NUM_LAYERS, "float32", "cpu", BUDGET_BYTES)
    assert str(error.value) == f"{family}: {name} is {list(tall)}, and the config makes it {expected}"
