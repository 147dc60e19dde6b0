"""Every kind of position embedding, far beyond a model's original context, against the whole model."""

from typing import Any

import pytest
import torch

from functions.stage.models.build import build_layer_group, choose
from functions.stage.models.layer_group import LayerGroup, Segment
from functions.stage.models.transformers.long_rope import LongRope, UnsupportedRope
from storage.checkpoints.decoder_config import decoder_of
from storage.checkpoints.decoder_families import UnsupportedConfig
from tests.support.functions.borders import forwarded, raw
from tests.support.functions.group_chain import GroupChain, by_plan, tokens_of
from tests.support.storage import tiny_models

ORIGINAL = 32
_THETA = {"rope_theta": 10_000.0}
_LONGROPE = {"rope_type": "longrope", "original_max_position_embeddings": ORIGINAL, **_THETA}
_LONG_OF_3 = {**_LONGROPE, "short_factor": [1.0, 1.1, 1.3], "long_factor": [1.0, 2.5, 9.0]}
_LONG_OF_4 = {**_LONGROPE, "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.0, 2.0, 5.0, 9.0]}
_PHI4_MINI = {"partial_rotary_factor": 0.75, "original_max_position_embeddings": ORIGINAL}
LONG: dict[str, tuple[str, dict[str, Any]]] = {
    "Phi-3": ("phi3", {"rope_parameters": _LONG_OF_4, "original_max_position_embeddings": ORIGINAL}),
    "Phi-4-mini": ("phi3", {"rope_parameters": {**_LONG_OF_3, "partial_rotary_factor": 0.75}, **_PHI4_MINI}),
    "Phi-3 in the old spelling": (
        "phi3",
        {
            "rope_parameters": None,
            "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [1.0, 2.0, 5.0, 9.0]},
            "original_max_position_embeddings": ORIGINAL,
        },
    ),
    "with an attention factor": (
        "phi3",
        {"rope_parameters": {**_LONG_OF_4, "attention_factor": 1.7}, "original_max_position_embeddings": ORIGINAL},
    ),
    "Llama": ("llama", {"rope_parameters": {**_LONG_OF_4, "factor": 8.0}}),
}
_YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": ORIGINAL, **_THETA}
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "default": ("llama", {}),
    "linear": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, **_THETA}}),
    "llama3": ("llama_rope_llama3", {}),
    "yarn": ("llama", {"rope_parameters": _YARN}),
    "yarn, all keys": (
        "qwen2",
        {
            "rope_parameters": {
                **_YARN,
                "beta_fast": 16,
                "beta_slow": 2,
                "mscale": 0.7,
                "mscale_all_dim": 1.1,
                "truncate": False,
            }
        },
    ),
    "dynamic": ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, **_THETA}}),
    "yarn in DeepSeek": ("deepseek_v3", {"rope_parameters": {**_YARN, "mscale": 0.7, "mscale_all_dim": 1.1}}),
    "yarn in gpt-oss": ("gpt_oss", {"rope_parameters": {**_YARN, "truncate": False}}),
    "partial in Phi": ("phi", {"partial_rotary_factor": 0.5}),
    "partial in StableLM": ("stablelm", {"partial_rotary_factor": 0.25}),
    "partial in GPT-NeoX": ("gpt_neox", {"rotary_pct": 0.5}),
    "proportional in Qwen3.5": (
        "qwen3_5_text_full",
        {"rope_parameters": {"rope_type": "proportional", "partial_rotary_factor": 0.5, **_THETA}},
    ),
    "by kind of layer in Gemma 3": ("gemma3_text", {}),
    "without rotation in some layers": ("smollm3", {}),
}


def chain(name: str, changes: dict[str, Any]) -> tuple[GroupChain, Any]:
    """Stages as `auto` builds them, and the whole model."""
    model = tiny_models.whole_model(name, **changes)
    config, tensors = tiny_models.tiny_config(name, **changes), tiny_models.checkpoint_tensors(model)
    tensors = tiny_models.as_published(config["model_type"], tensors)
    groups: list[LayerGroup] = [
        build_layer_group(
            "auto", config, raw(tiny_models.stage_tensors(tensors, first, last)), first, last, "float32", "cpu", 2**21
        )
        for first, last in ((0, 2), (2, 6))
    ]
    return GroupChain(groups), model


@pytest.mark.parametrize(("name", "changes"), [*OTHERS.values(), *LONG.values()], ids=[*OTHERS, *LONG])
def test_positions_beyond_the_first_context_are_the_whole_models(name: str, changes: dict[str, Any]) -> None:
    stages, model = chain(name, changes)
    text = tokens_of(1, 200)
    stages.reserve("a", tokens=200)
    logits = by_plan(stages.logits, {"a": text}, {"a": (20, 1, 70, 1, 107, 1)})["a"]
    torch.testing.assert_close(logits, tiny_models.all_logits(model, text), atol=3e-4, rtol=1e-3)


@pytest.mark.parametrize(("name", "changes"), LONG.values(), ids=LONG)
def test_the_known_length_chooses_for_each_sequence(name: str, changes: dict[str, Any]) -> None:
    stages, model = chain(name, changes)
    texts = {"short": tokens_of(2, 30), "long": tokens_of(3, 60), "at the limit": tokens_of(4, ORIGINAL)}
    for id, text in texts.items():
        stages.reserve(id, tokens=len(text))
    plan = {"short": (10, 1, 1, 18), "long": (10, 20, 25, 5), "at the limit": (30, 1, 1, 0)}
    logits = by_plan(stages.logits, texts, plan)
    for id, text in texts.items():
        expected = tiny_models.all_logits(model, text)
        torch.testing.assert_close(logits[id], expected, atol=3e-4, rtol=1e-3)
    short = tiny_models.all_logits(model, texts["long"][:20])
    assert (logits["long"][:20] - short).abs().max() > 0.01, "both sets of frequencies are the same"


def test_dynamic_rope_ends_where_the_library_would_change_frequencies() -> None:
    stages, _ = chain(*OTHERS["dynamic"])
    assert {group.max_positions for group in stages.groups} == {tiny_models.CONTEXT}


@pytest.mark.parametrize(
    "parameters",
    [
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "finetuned": True},
        {"rope_type": "linear", "factor": 4.0, "beta_fast": 3},
        {"rope_type": "linear", "factor": "4"},
        {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0},
        {"rope_type": "default", "mrope_section": [1, 1, 2]},
        {"full_attention": {"rope_type": "linear", "factor": 2.0}, "sliding_attention": {"rope_type": "default"}},
        {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [2.0]},
        {"rope_type": ["yarn"]},
        ["yarn"],
    ],
    ids=str,
)
def test_keys_that_the_lean_group_does_not_read_are_declined(parameters: Any) -> None:
    config = {**tiny_models.tiny_config("llama"), "rope_parameters": parameters}
    with pytest.raises(UnsupportedConfig, match="rotation"):
        decoder_of(config)
    assert choose("auto", config, "float32", "cpu").kind == "transformers"


def test_longrope_in_some_kinds_of_layers_is_refused() -> None:
    module = torch.nn.Module()
    module.rope_type = {"full_attention": "longrope", "sliding_attention": "default"}  # type: ignore[assignment]
    with pytest.raises(UnsupportedRope, match="kinds of layers"):
        LongRope(torch.nn.Sequential(module))


def test_frequencies_are_chosen_again_in_each_pass() -> None:
    """A short sequence is not affected by a long one in the same pass."""
    stages, _ = chain(*LONG["Phi-3"])
    group = stages.groups[0]
    text = tokens_of(5, 20)
    handles = {tokens: group.kv.reserve(tokens) for tokens in (20, 100)}
    alone = forwarded(group, text, [Segment(handles[20], 0, 20)])
    group.kv.truncate(handles[20], 0)
    together = forwarded(group, [*text, *text], [Segment(handles[100], 0, 20, is_long=True), Segment(handles[20], 0, 20)])
    assert not torch.equal(together[:20], alone)
    assert torch.equal(together[20:], alone)
