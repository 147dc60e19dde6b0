"""Lamina's own layers, in C and by torch's operators, against the whole model: every family, cut in three, chunks and steps."""

from collections.abc import Sequence
from typing import Final

import pytest
import torch

from functions.stage.models.build import GroupChoice, Kind, build_layer_group, choose, empty_group
from functions.stage.models.layer_group import LayerGroup, MissingTensors, Segment
from functions.stage.models.llama.group import LlamaGroup
from functions.stage.models.native.group import NativeGroup
from functions.stage.native.library import library
from functions.stage.native.limits import padded_head
from storage.checkpoints.decoder_config import decoder_of
from storage.checkpoints.decoder_families import UnsupportedConfig
from storage.errors import ArchitectureUnsupported
from storage.models.checks import check_runnable
from tests.support.functions.borders import forwarded, raw
from tests.support.functions.group_chain import GroupChain, by_plan, tokens_of
from tests.support.functions.stage_pipeline import stage_tensors, tensors, whole_model
from tests.support.storage import tiny_models

CUT: Final = ((0, 2), (2, 4), (4, 6))
TOLERANCE: Final = 1e-4
KINDS: Final[tuple[Kind, ...]] = ("native", "llama")
KINDS_AND_NAMES: Final[list[tuple[Kind, str]]] = [
    *(("native", name) for name in tiny_models.NATIVE),
    *(("llama", name) for name in tiny_models.LLAMA_SHAPED),
]


def build(
    kind: Kind, name: str, cut: Sequence[tuple[int, int]] = CUT, dtype: str = "float32", tokens: int = 200
) -> list[LayerGroup]:
    """Of a model with recurrent layers each stage has more memory: a sequence takes whole pages there."""
    config = tiny_models.tiny_config(name)
    attention = decoder_of(config).attention
    budget = tokens * 2 * 2 * attention.num_kv_heads * padded_head(attention.head_dim) * 4
    budget = 2**22 if name in tiny_models.RECURRENT else budget
    return [
        build_layer_group(kind, config, stage_tensors(name, first, last), first, last, dtype, "cpu", budget)
        for first, last in cut
    ]


@pytest.mark.parametrize(("kind", "name"), KINDS_AND_NAMES)
def test_chunks_and_steps_of_ragged_sequences_in_one_pass_give_the_whole_models_logits(kind: Kind, name: str) -> None:
    stages = GroupChain(build(kind, name))
    texts = {"a": tokens_of(1, 40), "b": tokens_of(2, 30), "c": tokens_of(3, 25)}
    stages.reserve(*texts)
    # Each column is a pass: whole prompts beside nothing, chunks beside steps, steps alone.
    plan = {"a": (7, 1, 9, 1, 1, 21), "b": (0, 5, 20, 1, 1, 3), "c": (0, 0, 1, 1, 10, 13)}
    logits = by_plan(stages.logits, texts, plan)
    is_recurrent = name in tiny_models.RECURRENT
    oracle = tiny_models.recurrent_logits if is_recurrent else tiny_models.all_logits
    for id, text in texts.items():
        torch.testing.assert_close(
            logits[id], oracle(whole_model(name), text), atol=5e-3 if is_recurrent else TOLERANCE, rtol=0
        )


@pytest.mark.parametrize(("kind", "name"), KINDS_AND_NAMES)
def test_greedy_tokens_are_those_of_generate(kind: Kind, name: str) -> None:
    stages = GroupChain(build(kind, name))
    stages.reserve("a")
    prompt = tokens_of(4, 20)
    assert stages.greedy("a", prompt, 20) == tiny_models.greedy(whole_model(name), prompt, 20)


@pytest.mark.parametrize("cut", [((0, 6),), ((0, 1), (1, 6)), ((0, 5), (5, 6))])
@pytest.mark.parametrize(
    ("kind", "name"),
    [
        *((kind, name) for kind in KINDS for name in ("llama_tied", "smollm3", "qwen2_sliding")),
        *(("native", name) for name in ("gemma3_text", "gpt2_scaled_by_layer", "opt", "cohere2", "gpt_neox", "phi3_longrope")),
    ],
)
def test_any_cut_gives_the_same_tokens(kind: Kind, name: str, cut: Sequence[tuple[int, int]]) -> None:
    stages = GroupChain(build(kind, name, cut, tokens=600))
    stages.reserve("a")
    prompt = tokens_of(5, 12)
    assert stages.greedy("a", prompt, 12) == tiny_models.greedy(whole_model(name), prompt, 12)


@pytest.mark.parametrize("name", ["llama", "mistral_sliding"])
@pytest.mark.parametrize("kind", KINDS)
def test_tokens_after_a_position_are_dropped(kind: Kind, name: str) -> None:
    stages = GroupChain(build(kind, name))
    stages.reserve("a")
    text = tokens_of(6, 30)
    stages.logits({"a": (0, tokens_of(7, 25))})
    stages.logits({"a": (0, text[:10])})
    stages.logits({"a": (10, tokens_of(8, 15))})
    logits = stages.logits({"a": (10, text[10:])})["a"]
    torch.testing.assert_close(logits, tiny_models.all_logits(whole_model(name), text)[10:], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_sequence_whose_blocks_are_no_neighbours_is_computed_as_any_other(kind: Kind) -> None:
    stages = GroupChain(build(kind, "llama", tokens=320))
    texts = {id: tokens_of(seed, 30) for seed, id in enumerate("abc")} | {"d": tokens_of(4, 100)}
    stages.reserve("a", "b", "c", tokens=64)
    stages.logits({id: (0, texts[id][:20]) for id in "abc"})
    stages.release("a")
    stages.reserve("e", tokens=64)
    stages.release("b")
    stages.reserve("d", tokens=192)  # 192 are free, but in two holes
    logits = stages.logits({"c": (20, texts["c"][20:]), "d": (0, texts["d"])})
    for id, part in logits.items():
        expected = tiny_models.all_logits(whole_model("llama"), texts[id])[-len(part) :]
        torch.testing.assert_close(part, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_is_as_close_as_transformers_in_bfloat16(kind: Kind) -> None:
    stages = GroupChain(build(kind, "llama", dtype="bfloat16"))
    assert stages.groups[0].hidden_dtype == "BF16"
    stages.reserve("a")
    text = tokens_of(9, 40)
    exact = tiny_models.all_logits(whole_model("llama"), text)
    library = tiny_models.all_logits(tiny_models.whole_model("llama", dtype=torch.bfloat16), text)
    ours = stages.logits({"a": (0, text)})["a"]
    assert (ours - exact).abs().mean() < 1.2 * (library - exact).abs().mean()


@pytest.mark.parametrize("kind", KINDS)
def test_layers_can_be_placed_one_by_one_in_any_order(kind: Kind) -> None:
    config = tiny_models.tiny_config("llama_tied")
    group = empty_group(GroupChoice(kind, "cpu"), config, 0, 6, "float32", 2**20)
    named = raw(tensors("llama_tied"))
    for layer in (5, 0, 3, 1, 4, 2):
        part = {name: tensor for name, tensor in named.items() if name.startswith(f"model.layers.{layer}.")}
        group.place(part)
        assert not part, "sources must be given up as they are used"
    with pytest.raises(MissingTensors, match=r"model\.embed_tokens\.weight, model\.norm\.weight"):
        group.finish()
    group.place({name: tensor for name, tensor in named.items() if "layers" not in name})
    group.finish()
    stages = GroupChain([group])
    stages.reserve("a")
    prompt = tokens_of(10, 10)
    assert stages.greedy("a", prompt, 5) == tiny_models.greedy(whole_model("llama_tied"), prompt, 5)


@pytest.mark.parametrize("kind", KINDS)
def test_an_incomplete_layer_is_refused_and_the_missing_tensor_named(kind: Kind) -> None:
    part = {name: tensor for name, tensor in raw(tensors("llama")).items() if "layers.1" in name and "up_proj" not in name}
    group = empty_group(GroupChoice(kind, "cpu"), tiny_models.tiny_config("llama"), 0, 2, "float32", 2**20)
    with pytest.raises(MissingTensors, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        group.place(part)


@pytest.mark.parametrize(
    "segments",
    [[], [Segment(0, 1, 5)], [Segment(0, 0, 61)], [Segment(0, 0, 0)], [Segment(0, 0, 2), Segment(0, 0, 3)], [Segment(0, 0, 6)]],
)
@pytest.mark.parametrize("kind", KINDS)
def test_segments_that_do_not_fit_the_cache_are_refused_and_change_nothing(kind: Kind, segments: list[Segment]) -> None:
    group = build(kind, "llama", ((0, 2),))[0]
    handle = group.kv.reserve(60)
    rows = 5 if len(segments) != 1 or segments[0].length == 6 else segments[0].length
    with pytest.raises(ValueError, match=r"segments|follow|rows"):
        forwarded(group, [0] * rows, segments)
    assert group.kv.length(handle) == 0


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "gptj"},
        {"hidden_act": "mish"},
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
        {"quantization_config": {"quant_method": "awq"}},
        {"architectures": ["LlamaForSequenceClassification"]},
        {"num_key_value_heads": 3},
    ],
)
def test_configs_that_cannot_be_run_exactly_are_declined(changes: dict[str, object]) -> None:
    config = {**tiny_models.tiny_config("llama"), **changes}
    with pytest.raises(UnsupportedConfig):
        LlamaGroup(config, 0, 6, "float32", "cpu", 2**20)
    with pytest.raises(ArchitectureUnsupported, match="no stage would run it in int8: "):
        check_runnable(config, "int8")
    check_runnable(config, "bfloat16")
    with pytest.raises(UnsupportedConfig):
        NativeGroup(config, 0, 6, "float32", 2**20)


@pytest.mark.parametrize(
    ("head_dim", "dtype", "why"),
    [
        (1026, "int8", "head_dim 1026 is over 1024"),
        (2000, "bfloat16", "head_dim 2000 is over 1024"),
        (8, "float16", "float16 is not float32, bfloat16, int8, q4 or kept"),
    ],
)
def test_the_group_says_why_it_is_not_native(head_dim: int, dtype: str, why: str, caplog: pytest.LogCaptureFixture) -> None:
    config = tiny_models.tiny_config("llama", head_dim=head_dim)
    group = empty_group(choose("auto", config, dtype, "cpu"), config, 0, 6, dtype, 2**22)
    assert group.runs_by == f"torch's operators: {why}"
    assert [record.getMessage() for record in caplog.records] == (
        [] if dtype == "float16" else [f"layers run by torch's operators, which is slower: {why}"]
    )


def test_the_group_says_that_layers_run_in_c(caplog: pytest.LogCaptureFixture) -> None:
    config = tiny_models.tiny_config("llama", hidden_size=64, head_dim=32)
    group = empty_group(choose("auto", config, "int8", "cpu"), config, 0, 6, "int8", 2**20)
    assert (group.runs_by, caplog.records) == (f"C, {library().level}", [])
