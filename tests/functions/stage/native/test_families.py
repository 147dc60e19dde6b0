"""Families in C, in every dtype: bits do not depend on chunks, other rows and threads, and weights are read right."""

import random
from functools import cache, partial
from typing import Any, Final

import numpy as np
import pytest
import torch

from functions.stage.models.floats import widened
from functions.stage.models.native.group import NativeGroup
from storage.checkpoints.checkpoint import SourceTensor
from storage.checkpoints.decoder import full_name, layer_shapes, outer_shapes
from storage.checkpoints.decoder_config import decoder_of
from storage.checkpoints.decoder_families import DECODER_FAMILIES
from storage.errors import ArchitectureUnsupported
from storage.loading.weight_loader import RawTensor
from storage.models import q4
from storage.models.blocks import FORMATS, floats_of, packing_of, unpack
from storage.models.checks import check_runnable
from storage.models.conversion import convert_tensor
from storage.models.model_repository import Dtype
from tests.support.functions.group_chain import GroupChain, by_plan, tokens_of
from tests.support.functions.native_models import error
from tests.support.functions.stage_pipeline import tensors as tensors_of
from tests.support.storage import tiny_models

DTYPES: Final[tuple[Dtype, ...]] = ("bfloat16", "int8", "q4")
NAMES: Final = tuple(name for name in tiny_models.NATIVE if name not in tiny_models.LLAMA_SHAPED)
CASES: Final = [
    (name, dtype) for name in NAMES for dtype in (*DTYPES, "float32") if dtype in ("bfloat16", "float32") or "gpt2" not in name
]
TEXTS: Final = {"a": tokens_of(1, 70), "b": tokens_of(2, 23), "c": tokens_of(3, 9)}


def rows_of(array: Any, first: int, last: int) -> memoryview:
    return memoryview(np.ascontiguousarray(array[first:last])).cast("B")


def config_of(name: str, certain: bool) -> dict[str, Any]:
    """certain: every token has all experts, so that rounding changes no choice. phimoe, whose tokens have two each, has two."""
    config = tiny_models.tiny_config(name)
    if not certain or not (experts := decoder_of(config).experts):
        return config
    if config["model_type"] == "phimoe":
        return tiny_models.tiny_config(name, num_local_experts=2, router_jitter_noise=0.0)
    router = experts[0].router
    groups = {"topk_group": router.groups} if router.groups > 1 else {}
    family = DECODER_FAMILIES[config["model_type"]].experts
    assert family is not None
    return config | {family.chosen: router.num_experts, **groups}


@cache
def published(name: str, dtype: Dtype, certain: bool = False) -> dict[str, RawTensor]:
    """The tensors of the tiny model as a stage reads them."""
    stored = {}
    tensors = tensors_of(name)
    if certain and config_of(name, certain)["model_type"] == "phimoe":
        model = tiny_models.whole_model(name, num_local_experts=2)
        tensors = tiny_models.as_published("phimoe", tiny_models.checkpoint_tensors(model))
    for key, tensor in tensors.items():
        source = SourceTensor("F32", tuple(tensor.shape), partial(rows_of, tensor.numpy().reshape(tensor.shape or (1,))))
        for target, made in convert_tensor(key, source, dtype).items():
            stored[target] = RawTensor(made.dtype, made.shape, memoryview(bytearray(b"".join(made.blocks()))))
    return stored


def plain(name: str, dtype: Dtype) -> dict[str, RawTensor]:
    """The same numbers in float32, of a model whose choices are certain."""
    stored, model = published(name, dtype, certain=True), decoder_of(config_of(name, certain=True))
    shapes = outer_shapes(model) | {
        f"{model.names.layers}.{number}.{key}": shape
        for number, layer in enumerate(model.layers)
        for key, shape in layer_shapes(model, layer).items()
    }
    wide = {}
    for key, raw in stored.items():
        if key.endswith((".weight_scale", ".weight_format")):
            continue
        if (packing := stored.get(f"{key}_format")) is not None:
            form = FORMATS[packing_of(packing.data).format]
            packed = np.frombuffer(raw.data, np.uint8).reshape(raw.shape)
            numbers = floats_of(form, unpack(form, packed, shapes[full_name(model, key)][0]))
        elif raw.dtype == "U8":
            numbers = q4.dequantize(np.frombuffer(raw.data, np.uint8).reshape(raw.shape), *shapes[full_name(model, key)])
        elif raw.dtype == "I8":
            scales = np.frombuffer(stored[f"{key}_scale"].data, np.float32)
            numbers = np.frombuffer(raw.data, np.int8).reshape(raw.shape).astype(np.float32) * scales[:, None]
        elif raw.dtype == "BF16":
            numbers = widened(np.frombuffer(raw.data, np.uint16), "BF16")
        else:
            numbers = np.frombuffer(raw.data, np.float32)
        shape = shapes[full_name(model, key)]
        wide[key] = RawTensor("F32", shape, memoryview(bytearray(np.ascontiguousarray(numbers, np.float32).tobytes())))
    return wide


def group_of(name: str, dtype: Dtype, tensors: dict[str, RawTensor], certain: bool = False) -> NativeGroup:
    group = NativeGroup(config_of(name, certain), 0, tiny_models.NUM_LAYERS, dtype, 2**22)
    group.place(dict(tensors))
    group.finish()
    return group


def logits_of(group: NativeGroup, texts: dict[str, list[int]], plan: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    chain = GroupChain([group])
    chain.reserve(*texts, tokens=100)
    logits = by_plan(chain.logits, texts, plan)
    for id in texts:
        chain.release(id)
    return logits


@pytest.mark.sampled
@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_bits_do_not_depend_on_chunks_other_rows_or_threads(name: str, dtype: Dtype) -> None:
    """They are the bits of the sequence alone, token by token, on one thread."""
    group = group_of(name, dtype, published(name, dtype))
    group.use_threads(1)
    alone = {id: logits_of(group, {id: text}, {id: (1,) * len(text)})[id] for id, text in TEXTS.items()}
    dice = random.Random(f"{name} {dtype}")
    for threads, chunk in ((1, 70), (2, 7), (3, 64)):
        group.use_threads(threads)
        plan = {}
        for id, text in TEXTS.items():
            chunks = [min(chunk, len(text) - first) for first in range(0, len(text), chunk)]
            plan[id] = tuple(dice.sample([*chunks, *([0] * (10 - len(chunks)))], 10))
        together = logits_of(group, TEXTS, plan)
        for id in TEXTS:
            assert torch.equal(together[id], alone[id]), (threads, plan)


@pytest.mark.sampled
@pytest.mark.parametrize(("name", "dtype"), [case for case in CASES if case[1] != "float32"])
def test_logits_are_near_those_of_float32_on_the_same_numbers(name: str, dtype: Dtype) -> None:
    """Two exchanged rows of a matrix, or scales of other rows, give an error near 1. So does another choice of experts.

    A delta rule with random decays amplifies rounding: 0.2 is usual for it, 0.1 is the most of other families.
    """
    plan = {"a": (70,)}
    exact = logits_of(group_of(name, "float32", plain(name, dtype), certain=True), {"a": TEXTS["a"]}, plan)["a"]
    found = logits_of(group_of(name, dtype, published(name, dtype, certain=True), certain=True), {"a": TEXTS["a"]}, plan)["a"]
    assert error(found, exact) < (0.4 if "linear_attention" in config_of(name, True).get("layer_types", ()) else 0.2)


@pytest.mark.parametrize("dtype", ["int8", "q4"])
def test_transposed_matrices_are_not_published_in_few_bits(dtype: str) -> None:
    with pytest.raises(ArchitectureUnsupported, match=f"a gpt2 is not read in {dtype}; publish it as bfloat16"):
        check_runnable(tiny_models.tiny_config("gpt2"), dtype)
