"""Lamina's own layers, in C and by torch's operators, against the whole model: every family, cut in three, chunks and steps.

In int8, torch's operators give exact products and independent rows, whatever matrix is kept wide.
"""

from collections.abc import Collection, Sequence
from typing import Final

import pytest
import torch

from functions.stage.models.build import GroupChoice, Kind, build_layer_group, choose, empty_group
from functions.stage.models.layer_group import LayerGroup, MissingTensors, Segment
from functions.stage.models.llama.group import LlamaGroup
from functions.stage.models.llama.linear import Int8Linear, Matrix, linear
from functions.stage.models.native.group import NativeGroup
from functions.stage.native.library import library
from functions.stage.native.limits import padded_head
from storage.checkpoints.decoder_config import decoder_of
from storage.checkpoints.decoder_families import UnsupportedConfig
from storage.errors import ArchitectureUnsupported
from storage.models.checks import check_runnable
from tests.support.functions.borders import forwarded, logits_of, raw
from tests.support.functions.group_chain import GroupChain, by_plan, tokens_of
from tests.support.functions.int8_checkpoints import MATRICES, int8_checkpoint, quantized
from tests.support.functions.native_models import finished
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


def group(name: str, keep_wide: Collection[str] = ()) -> LlamaGroup:
    tensors = tiny_models.checkpoint_tensors(tiny_models.whole_model(name))
    return finished(LlamaGroup(tiny_models.tiny_config(name), 0, 6, "int8", "cpu", 2**20), int8_checkpoint(tensors, keep_wide))


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("rows", [1, 3, 16, 70])
def test_products_are_those_of_the_quantized_operands(rows: int, biased: bool) -> None:
    weight, scale = quantized(random(96, 200))
    bias = random(96, seed=1) if biased else None
    x = random(rows, 200, seed=2) * torch.logspace(-3, 3, rows).unsqueeze(1)
    row_scale = x.abs().amax(1, keepdim=True) / 127
    steps = (x / row_scale * 127).double()
    # float64 holds the integers and their sums exactly, as the kernel's int32 does
    exact = (steps.trunc() / 127 @ weight.double().T) * scale * row_scale + (0 if bias is None else bias)
    # A value on the border between two steps may fall on either side: one step of a few weights.
    assert ((Int8Linear(weight, scale, bias)(x) - exact).abs() <= 2 * scale * row_scale + 1e-5).all()


def test_rows_of_zeros_or_infinities_do_not_affect_others() -> None:
    layer = Int8Linear(*quantized(random(32, 64)), None)
    x = random(4, 64, seed=3)
    alone = layer(x[3:])
    x[0] = 0
    x[1, 5] = float("inf")
    x[2, 7] = float("nan")
    together = layer(x)
    assert together[0].eq(0).all()
    assert torch.equal(together[3:], alone)


def test_residual_silu_and_product_are_those_of_the_plain_result() -> None:
    layer = Int8Linear(*quantized(random(48, 48)), random(48, seed=4))
    x, other = random(5, 48, seed=5), random(5, 48, seed=6)
    plain = layer(x)
    torch.testing.assert_close(layer.add_to(other, x), plain + other)
    torch.testing.assert_close(layer.silu(x), torch.nn.functional.silu(plain))
    torch.testing.assert_close(layer.times(x, other), plain * other)


def test_stacked_matrices_of_different_dtypes_are_concatenated() -> None:
    wide, narrow = random(16, 32), random(24, 32, seed=1)
    weight, scale = quantized(narrow)
    x = random(3, 32, seed=2)
    stacked = linear([Matrix(wide.bfloat16()), Matrix(weight, scale)], torch.float32)(x)
    assert stacked.dtype == torch.float32
    torch.testing.assert_close(stacked, torch.cat((x @ wide.T, x @ narrow.T), 1), atol=0.2, rtol=0)


@pytest.mark.parametrize("name", ["llama_tied", "llama_biased", "qwen2", "qwen3", "smollm3"])
def test_a_sequences_bits_are_the_same_alone_and_among_eight(name: str) -> None:
    """Matrices are exact whatever stands beside a row; so is attention, which reads each sequence by itself."""
    whole = group(name)
    texts = [torch.randint(128, (9 + 3 * index,), generator=torch.Generator().manual_seed(index)) for index in range(8)]
    alone = [chunk_and_steps(whole, [text])[0] for text in texts]
    together = chunk_and_steps(whole, texts)
    for one, other in zip(alone, together, strict=True):
        assert torch.equal(one, other)


def chunk_and_steps(whole: LlamaGroup, texts: list[torch.Tensor]) -> list[torch.Tensor]:
    """The hidden states of each text: all but its last 4 tokens as one chunk, then token by token."""
    handles = [whole.kv.reserve(len(text)) for text in texts]
    given = [0] * len(texts)
    hidden: list[list[torch.Tensor]] = [[] for _ in texts]
    for step in range(5):
        lengths = [len(text) - 4 if step == 0 else 1 for text in texts]
        inputs = torch.cat([text[at : at + length] for text, at, length in zip(texts, given, lengths, strict=True)])
        segments = [Segment(*segment) for segment in zip(handles, given, lengths, strict=True)]
        for index, part in enumerate(forwarded(whole, inputs, segments).split(lengths)):
            hidden[index].append(part)
            given[index] += lengths[index]
    for handle in handles:
        whole.kv.release(handle)
    return [torch.cat(parts) for parts in hidden]


@pytest.mark.parametrize("keep_wide", [(), ("down_proj", "lm_head"), ("v_proj", "up_proj"), MATRICES])
def test_int8_stays_near_the_model_whichever_matrices_are_kept_wide(keep_wide: Collection[str]) -> None:
    """Its error is under a quarter of how much logits differ among themselves."""
    whole = group("llama", keep_wide)
    text = list(range(40))
    handle = whole.kv.reserve(len(text))
    logits = logits_of(whole, forwarded(whole, text, [Segment(handle, 0, len(text))]))
    exact = tiny_models.all_logits(tiny_models.whole_model("llama"), text)
    assert (logits - exact).square().mean().sqrt() < exact.std() / 4


def test_int8_is_declined_where_its_kernel_does_not_run() -> None:
    with pytest.raises(ValueError, match="int8 runs on CPUs"):
        LlamaGroup(tiny_models.tiny_config("llama"), 0, 6, "int8", "cuda", 2**20)
