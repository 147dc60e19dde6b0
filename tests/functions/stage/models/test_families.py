"""Every family, cut in three, is held to the whole model in transformers, token for token."""

from typing import Any

import pytest
import torch

from functions.stage.models.build import UnsupportedDtype, build_layer_group
from functions.stage.models.kv_cache import KVCacheFull
from functions.stage.models.layer_group import MissingTensors, Segment
from functions.stage.models.transformers.group import TransformersGroup
from storage.checkpoints.model_description import describe_model
from storage.errors import ArchitectureUnsupported
from storage.models.model_repository import layer_object
from storage.models.placement import head_matrix, place_tensors
from tests.support.functions.borders import forwarded, logits_of, raw
from tests.support.functions.stage_pipeline import CUT, GroupPipeline, build_groups, tensors, whole_model
from tests.support.storage import tiny_models

PROMPT = [5, 9, 33, 7, 100, 3, 8, 1, 20, 50, 60, 4, 17]
"""Longer than the tiny models' sliding window."""
NEW_TOKENS = 16


@pytest.mark.parametrize("name", tiny_models.ATTENTION)
def test_a_family_cut_in_three_gives_the_whole_models_tokens(name: str) -> None:
    expected = tiny_models.greedy(whole_model(name), PROMPT, NEW_TOKENS)
    published = {key: tensor.clone() for key, tensor in tensors(name).items()}
    pipeline = GroupPipeline(build_groups(name))
    changed = [key for key, tensor in published.items() if not torch.equal(tensor, tensors(name)[key])]
    assert not changed, "a class of transformers that sets weights anew, as Youtu's does with the padding token's embedding"
    token_ids = list(PROMPT)
    logits = [pipeline.logits(token_ids[first:last], first) for first, last in ((0, 5), (5, 9), (9, 13))]
    for _ in range(NEW_TOKENS):
        token_ids.append(int(logits[-1][-1].argmax()))
        if len(token_ids) == len(PROMPT) + NEW_TOKENS // 2:
            # A wrong step, then a rollback to an earlier position: neither may affect what follows.
            pipeline.logits([1, 2, 3], len(token_ids) - 1)
            pipeline.logits(token_ids[6:-1], 6)
        logits.append(pipeline.logits(token_ids[-1:], len(token_ids) - 1))

    assert token_ids[len(PROMPT) :] == expected
    whole = tiny_models.all_logits(whole_model(name), token_ids)
    torch.testing.assert_close(torch.cat(logits), whole, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", tiny_models.ALL)
def test_the_objects_of_a_publication_give_the_whole_models_logits_to_the_bit(name: str) -> None:
    """A whole prompt through stages that got exactly the objects that the model repository would give them.

    Recurrent layers run token by token here, and by a formula for many tokens in the whole model, whose rounding differs.
    """
    model = describe_model(tiny_models.tiny_config(name))
    sources: Any = tensors(name)  # placing looks at their names and shapes alone
    placed = place_tensors(sources, model)
    groups = []
    for first, last in CUT:
        objects = [layer_object(number) for number in range(first, last)]
        if first == 0:
            objects.append("embedding")
        if last == model.num_layers:
            objects += ["head"] if head_matrix(placed) else ["head", "embedding"]
        stage = {tensor: tensors(name)[tensor] for object_ in objects for tensor in placed[object_]}
        groups.append(build(name, stage, first, last))
    logits, whole = GroupPipeline(groups).logits(PROMPT, 0), tiny_models.all_logits(whole_model(name), PROMPT)
    rounds_otherwise = (*tiny_models.RECURRENT, "qwen2_moe")  # whose shared expert's gate is a product with one row
    assert torch.equal(logits, whole) or (name in rounds_otherwise and torch.allclose(logits, whole, atol=5e-3, rtol=1e-3))


@pytest.mark.sampled
@pytest.mark.parametrize("name", ["gpt2", "gemma2", "deepseek_v3", "bloom", "granite", "gpt_oss"])
@pytest.mark.parametrize("cut", [((0, 6),), ((0, 1), (1, 6)), tuple((n, n + 1) for n in range(6))], ids=["1", "2", "6"])
def test_any_cut_gives_the_same_logits(name: str, cut: tuple[tuple[int, int], ...]) -> None:
    logits = GroupPipeline(build_groups(name, cut)).logits(PROMPT, 0)
    assert torch.equal(logits, tiny_models.all_logits(whole_model(name), PROMPT))


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3_text", "mixtral"])
def test_bfloat16_is_the_whole_models_bfloat16(name: str) -> None:
    groups = build_groups(name, dtype="bfloat16")
    assert groups[0].hidden_dtype == "BF16"
    whole = tiny_models.whole_model(name, dtype=torch.bfloat16)
    assert torch.equal(GroupPipeline(groups).logits(PROMPT, 0), tiny_models.all_logits(whole, PROMPT))


def test_names_of_a_checkpoint_without_a_head_are_understood() -> None:
    """Published GPT-2 and BLOOM checkpoints were saved without the causal model's prefix."""
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors("gpt2").items()}
    groups = [build("gpt2", tiny_models.stage_tensors(bare, first, last), first, last) for first, last in CUT]
    logits = GroupPipeline(groups).logits(PROMPT, 0)
    assert torch.equal(logits, tiny_models.all_logits(whole_model("gpt2"), PROMPT))


def test_sequences_of_one_pass_do_not_touch_each_other() -> None:
    """Except for rounding: the kernel and its order of sums depend on the number of rows."""
    (group,) = build_groups("qwen3_moe", ((0, 6),))
    texts = [PROMPT[:3], PROMPT[3:10], PROMPT[::-1]]
    alone = [GroupPipeline([group]).logits(text, 0) for text in texts]
    segments = [Segment(group.kv.reserve(20), 0, len(text)) for text in texts]
    together = logits_of(group, forwarded(group, [token for text in texts for token in text], segments))
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-4, rtol=1e-4)


def test_weights_are_used_in_place() -> None:
    stage = tiny_models.stage_tensors(tensors("llama"), 2, 4)
    group = build("llama", stage, 2, 4)
    (matrix,) = [p for n, p in group._slice.base.named_parameters() if n == "layers.3.mlp.up_proj.weight"]
    assert matrix.data_ptr() == stage["model.layers.3.mlp.up_proj.weight"].data_ptr()


def test_a_stage_has_no_modules_of_other_stages() -> None:
    group = build("gpt2", tiny_models.stage_tensors(tensors("gpt2"), 2, 3), 2, 3)
    names = [name for name, _ in group._slice.base.named_parameters()]
    assert names
    assert all(name.startswith("h.2.") for name in names)
    assert not [name for name, _ in group._head.named_parameters()]


def test_kv_memory_is_as_planned() -> None:
    group = build("llama", tiny_models.stage_tensors(tensors("llama"), 0, 2), 0, 2, kv_budget=64 * 512)
    bytes_per_token = 2 * 2 * 2 * 8 * 4  # layers, keys and values, KV heads, head size, float32
    assert group.kv.capacity_tokens == 64 * 512 // bytes_per_token
    pipeline = GroupPipeline([group], reserve_tokens=group.kv.capacity_tokens)
    with pytest.raises(KVCacheFull):
        group.kv.reserve(1)
    forwarded(group, PROMPT, [Segment(pipeline.handles[0], 0, len(PROMPT))])
    layers = group.kv.cache(pipeline.handles[0]).own
    assert sum(layer.keys.nbytes + layer.values.nbytes for layer in layers) == 64 * 512
    group.kv.release(pipeline.handles[0])
    assert group.kv.free_tokens == group.kv.capacity_tokens


def test_an_unsupported_architecture_is_named() -> None:
    with pytest.raises(ArchitectureUnsupported, match=r"'xlnet' is not supported: it is no decoder-only text model"):
        build_layer_group("auto", {"model_type": "xlnet"}, {}, 0, 1, "float32", "cpu", 1000)


def test_int8_is_refused() -> None:
    with pytest.raises(UnsupportedDtype, match="gpt2 in int8"):
        build_layer_group("auto", tiny_models.tiny_config("gpt2"), {}, 0, 1, "int8", "cpu", 1000)


@pytest.mark.parametrize(
    ("module", "tensor", "why"),
    [
        ("up_proj", None, r"missing tensors: .*layers.3.mlp.up_proj.weight"),
        ("up_proj", torch.zeros(3, 3), r"layers.3.mlp.up_proj.weight is \[3, 3\], and the config makes it \[64, 32\]"),
        ("router", torch.zeros(3, 3), r"unexpected tensors: .*layers.3.mlp.router.weight"),
    ],
    ids=["missing", "another shape", "another architecture"],
)
def test_a_tensor_that_does_not_fit_is_named(module: str, tensor: torch.Tensor | None, why: str) -> None:
    stage = tiny_models.stage_tensors(tensors("llama"), 2, 4)
    name = f"model.layers.3.mlp.{module}.weight"
    if tensor is None:
        del stage[name]
    else:
        stage[name] = tensor
    with pytest.raises(MissingTensors, match=why):
        build("llama", stage, 2, 4)


def build(name: str, stage: dict[str, torch.Tensor], first: int, last: int, kv_budget: int = 2**20) -> TransformersGroup:
    return TransformersGroup.build(tiny_models.tiny_config(name), raw(stage), first, last, "float32", "cpu", kv_budget)
