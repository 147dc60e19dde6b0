"""Rows of several adapters in one pass: tokens as peft has them, and bits that depend on nothing but the sequence."""

import random
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers.pytorch_utils import Conv1D

from functions.stage.models.adapters import WrongAdapter
from functions.stage.models.layer_group import LayerGroup
from functions.stage.native.library import library
from storage.checkpoints.families import part_of
from storage.models.model_repository import Dtype
from tests.functions.stage.native.test_families import TEXTS, group_of, plain, published
from tests.support.functions.borders import raw
from tests.support.functions.group_chain import GroupChain, by_plan, tokens_of
from tests.support.functions.stage_pipeline import build_groups
from tests.support.storage import tiny_models
from tests.support.storage.adapters import adapted, stored_tensors

CUT = ((0, 2), (2, 6))
ADAPTERS: Mapping[int, dict[str, Any]] = {
    1: {"r": 4},
    2: {"r": 16, "use_rslora": True, "rank_pattern": {"layers.1.self_attn.q_proj": 5}},
    3: {"r": 37, "lora_alpha": 5},
}
MIXTURES = ("mixtral", "qwen3_moe", "deepseek_v3")  # of experts, whose matrices are no linear modules
GEMMAS = ("gemma3n_text", "gemma4_text", "gemma4_text_experts")
# Parts of the names of the modules that are adapted, if these are not all linear ones.
ADAPTED = dict.fromkeys(MIXTURES, ("attn",)) | dict.fromkeys(GEMMAS, (".self_attn.", ".mlp."))
PROMPT = tokens_of(5, 9)
# Separate and fused matrices, by head, transposed, without gate, with norms after the products, in parallel, with biases.
FAMILIES = ("llama", "qwen2_sliding", "phi3", "gpt_neox", "gpt2", "starcoder2", "gemma2", "cohere2", "granite")


@cache
def oracle(family: str, number: int) -> PeftModel:
    config = dict(ADAPTERS[number])
    if family not in ("llama", "llama_biased"):
        config.pop("rank_pattern", None)
    if family == "gpt2":
        config["fan_in_fan_out"] = True
    model = tiny_models.whole_model(family)
    modules = [name for name, each in model.named_modules() if isinstance(each, nn.Linear | Conv1D) and name != "lm_head"]
    if family in ADAPTED:
        config["target_modules"] = [name for name in modules if any(part in name for part in ADAPTED[family])]
    elif number == 3:  # some layers only, and in each some modules only
        config["target_modules"] = [name for name in modules if part_of(f"{name}.weight") in (1, 3, 4)][::2]
    return adapted(model, number, **config)


def share(family: str, number: int, first: int, last: int) -> dict[str, torch.Tensor]:
    return tiny_models.stage_tensors(stored_tensors(oracle(family, number)), first, last)


def with_adapters(group: LayerGroup, family: str, numbers: Sequence[int] = (1, 2, 3)) -> LayerGroup:
    for number in numbers:
        own = raw(share(family, number, group.first_layer, group.last_layer))
        group.place_adapter(number, group.prepare_adapter(own))
    return group


def greedy_together(groups: Sequence[LayerGroup], adapters: Mapping[str, int], new_tokens: int) -> dict[str, list[int]]:
    chain = GroupChain(groups)
    chain.adapters = dict(adapters)
    chain.reserve(*adapters)
    tokens, given = {id: list(PROMPT) for id in adapters}, 0
    for _ in range(new_tokens):
        logits = chain.logits({id: (given, own[given:]) for id, own in tokens.items()})
        given = len(tokens[next(iter(tokens))])
        for id, own in logits.items():
            tokens[id].append(int(own[-1].argmax()))
    return {id: own[len(PROMPT) :] for id, own in tokens.items()}


def groups_of(kind: Any, family: str, adapters: Sequence[int] = (1, 2, 3)) -> list[LayerGroup]:
    groups = build_groups(family, CUT, kind, kv_budget_bytes=2**22)
    return [with_adapters(group, family, adapters) for group in groups]


@pytest.mark.parametrize(
    ("kind", "family"),
    [
        *(("native", family) for family in (*FAMILIES, *GEMMAS)),
        ("llama", "llama_biased"),
        ("llama", "mistral_sliding"),
        *(("transformers", family) for family in ("llama", "gpt2", "bloom", "jamba", *MIXTURES)),
    ],
)
def test_tokens_are_those_of_peft(kind: str, family: str) -> None:
    found = greedy_together(groups_of(kind, family), {"base": 0, "a": 1, "b": 2, "c": 3, "d": 1}, 12)
    wanted = {number: tiny_models.greedy(oracle(family, number), PROMPT, 12) for number in ADAPTERS}
    wanted[0] = tiny_models.greedy(tiny_models.whole_model(family), PROMPT, 12)
    assert found == {"base": wanted[0], "a": wanted[1], "b": wanted[2], "c": wanted[3], "d": wanted[1]}
    assert len({tuple(tokens) for tokens in wanted.values()}) == 4


@pytest.mark.sampled
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "q4"])
@pytest.mark.parametrize("family", ["llama", "phi3", "starcoder2", "gemma2"])
def test_bits_in_c_do_not_depend_on_company_chunks_or_threads(family: str, dtype: Dtype) -> None:
    """They are the bits of the sequence alone, token by token, on one thread; those of the base model are its own."""
    adapters = {"a": 1, "b": 2, "c": 3, "a2": 1, "base": 0}
    texts = {id: TEXTS["a" if id == "base" else id[0]] for id in adapters}
    without = group_of(family, dtype, published(family, dtype))
    group = with_adapters(group_of(family, dtype, published(family, dtype)), family)

    def logits(group: LayerGroup, ids: Sequence[str], plan: Mapping[str, Sequence[int]]) -> dict[str, torch.Tensor]:
        chain = GroupChain([group])
        chain.adapters = dict(adapters)
        chain.reserve(*ids, tokens=100)
        found = by_plan(chain.logits, {id: texts[id] for id in ids}, plan)
        for id in ids:
            chain.release(id)
        return found

    group.use_threads(1)
    alone = {id: logits(group, [id], {id: (1,) * len(texts[id])})[id] for id in texts}
    assert torch.equal(alone["base"], logits(without, ["base"], {"base": (1,) * 70})["base"])
    assert not torch.equal(alone["base"], alone["a"])
    dice = random.Random(f"{family} {dtype}")
    for threads, chunk in ((1, 70), (2, 7), (3, 64)):
        group.use_threads(threads)
        plan = {}
        for id, text in texts.items():
            chunks = [min(chunk, len(text) - first) for first in range(0, len(text), chunk)]
            plan[id] = tuple(dice.sample([*chunks, *([0] * (10 - len(chunks)))], 10))
        together = logits(group, list(texts), plan)
        for id in texts:
            assert torch.equal(together[id], alone[id]), (id, threads, plan)


@pytest.mark.sampled
@pytest.mark.parametrize("level", library().levels)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "q4"])
def test_company_changes_no_bits_on_any_level(dtype: Dtype, level: str) -> None:
    best = library().level
    library().use_level(level)
    try:
        group = with_adapters(group_of("llama", dtype, published("llama", dtype)), "llama")
        adapters = {"a": 1, "b": 2, "c": 0}
        chain = GroupChain([group])
        chain.adapters = adapters
        chain.reserve(*adapters, tokens=100)
        together = by_plan(chain.logits, TEXTS, {"a": (1, 69), "b": (3, 20), "c": (9, 0)})
        for id, text in TEXTS.items():
            assert torch.equal(chain.logits({id: (0, text)})[id], together[id]), id
    finally:
        library().use_level(best)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8", "q4"])
def test_an_adapter_of_a_quantized_model_is_near_that_of_the_same_numbers_in_float32(dtype: Dtype) -> None:
    def of(group: LayerGroup) -> torch.Tensor:
        chain = GroupChain([with_adapters(group, "llama", [2])])
        chain.adapters["a"] = 2
        chain.reserve("a", tokens=100)
        return by_plan(chain.logits, {"a": TEXTS["a"]}, {"a": (70,)})["a"]

    exact = of(group_of("llama", "float32", plain("llama", dtype)))
    found = of(group_of("llama", dtype, published("llama", dtype)))
    assert float((found - exact).norm() / exact.norm()) < 0.2


@pytest.mark.parametrize("kind", ["native", "llama", "transformers"])
def test_an_adapter_of_other_stages_layers_changes_nothing_here(kind: Any) -> None:
    """Its rows ended the process of a stage in C that had no other adapter."""
    groups = groups_of(kind, "llama", adapters=())
    for group in groups:
        group.place_adapter(1, group.prepare_adapter({}))
    base = tiny_models.greedy(tiny_models.whole_model("llama"), PROMPT, 4)
    assert greedy_together(groups, {"a": 1, "base": 0}, 4) == {"a": base, "base": base}


def test_a_number_takes_another_adapter_and_none() -> None:
    (group,) = [with_adapters(group_of("llama", "float32", published("llama", "float32")), "llama")]

    def tokens(number: int) -> list[int]:
        chain = GroupChain([group])
        chain.adapters["a"] = number
        chain.reserve("a")
        found = chain.greedy("a", PROMPT, 8)
        chain.release("a")
        return found

    own = {number: tokens(number) for number in (0, 1, 2)}
    group.place_adapter(1, group.prepare_adapter(raw(share("llama", 2, 0, 6))))
    assert tokens(1) == own[2] != own[1]
    group.place_adapter(1, None)
    assert tokens(1) == own[0]


def square(module: str) -> dict[str, torch.Tensor]:
    name = f"model.layers.0.{module}"
    return {f"{name}.lora_A": torch.ones(4, 4), f"{name}.lora_B": torch.ones(4, 4), f"{name}.lora_scale": torch.ones(())}


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        ({"model.layers.0.self_attn.q_proj.lora_A": torch.ones(4, 32)}, "lacks .*lora_B"),
        (square("x"), "changes x"),
        (square("self_attn.q_proj"), r"\[4, 4\].*\[32, 32\]"),
        (square("mlp.up_proj") | {"x": torch.ones(1)}, "4 tensors for 1 modules"),
    ],
)
def test_an_adapter_of_another_model_is_refused(tensors: dict[str, torch.Tensor], reason: str) -> None:
    group = group_of("llama", "float32", published("llama", "float32"))
    with pytest.raises(WrongAdapter, match=reason):
        group.prepare_adapter(raw(tensors))


def test_layers_in_c_do_not_pass_over_an_adapter_of_latent_attention() -> None:
    """Its addition to o_proj was left out, and the answer was the model's own."""
    group = group_of("deepseek_v3", "float32", published("deepseek_v3", "float32"))
    with pytest.raises(WrongAdapter, match=r"changes self_attn\.o_proj, to which"):
        group.prepare_adapter(raw(square("self_attn.o_proj")))
