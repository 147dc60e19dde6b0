"""Random changes of every served family's config.json: a cut model equals transformers' own, loaded from the folder.

A case draws a tiny model and changes one to three keys that its config class reads, or leaves them out, in old and new
spellings. Publication may refuse it with a reason, also that of its self-test, but a stage may not refuse what was published.
What transformers cannot load does not count. `make fuzz CASES=500` runs more of them.
With LAMINA_FUZZ_MODEL all cases change the tiny model of this name.
"""

import json
import os
import random
from collections.abc import Callable, Mapping
from itertools import pairwise, zip_longest
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from functions.stage.models.build import build_layer_group, check_cut
from functions.stage.models.layer_group import LayerGroup, Segment
from storage.checkpoints.decoder_config import decoder_of
from storage.checkpoints.decoder_families import UnsupportedConfig
from storage.checkpoints.families import layers_key, with_shared_blocks
from storage.checkpoints.model_description import describe_model
from storage.checkpoints.model_source import open_checkpoint
from storage.errors import ArchitectureUnsupported, CheckpointInvalid
from storage.loading.weight_loader import RawTensor
from storage.models.checks import check_runnable, check_shapes
from storage.models.expert_tensors import split_experts
from storage.models.placement import place_tensors
from tests.support.functions.generic_families import GENERIC, default_config
from tests.support.storage import tiny_models

CASES: Final = range(int(os.environ["LAMINA_FUZZ_CASES"])) if os.environ.get("LAMINA_FUZZ_CASES") else range(0, 96, 3)
PARTS: Final = 4  # tests, which workers share
_TINY: Final = (*tiny_models.ALL, *tiny_models.NATIVE_ONLY)
_OTHERS: Final = [name for name in GENERIC if name not in _TINY]
_ALL: Final = [*(name for pair in zip_longest(tiny_models.ALL, _OTHERS) for name in pair if name), *tiny_models.NATIVE_ONLY]
NAMES: Final = [name for name in _ALL if name == os.environ.get("LAMINA_FUZZ_MODEL", name)]
TOKENS: Final = 44  # more than any window or original context drawn below
SMALL_CONTEXT: Final = 24

# Keys that do not change logits, or that only generation reads.
IGNORED: Final = frozenset((
    "transformers_version", "architectures", "dtype", "torch_dtype", "model_type", "use_cache", "initializer_range",
    "return_dict", "is_decoder", "output_hidden_states", "output_attentions", "output_router_logits", "router_aux_loss_coef",
    "chunk_size_feed_forward", "problem_type", "id2label", "label2id", "is_encoder_decoder", "cross_attention_hidden_size",
    "add_cross_attention", "pruned_heads", "_name_or_path", "bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id",
    "decoder_start_token_id", "pretraining_tp", "gradient_checkpointing", "num_hidden_layers", "num_layers", "n_layer",
    "vocab_size",
    "hidden_size", "n_embd", "num_attention_heads", "n_head", "max_position_embeddings", "n_positions", "intermediate_size",
    "ffn_dim", "n_inner", "num_local_experts", "num_experts", "n_routed_experts", "num_experts_per_tok", "kv_lora_rank",
    "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "n_group", "topk_group", "moe_intermediate_size",
    "word_embed_proj_dim", "layerdrop", "use_bfloat16", "tokenizer_class", "prefix", "attention_dropout", "hidden_dropout",
    "embd_pdrop", "attn_pdrop", "resid_pdrop", "dropout", "activation_dropout", "classifier_dropout", "residual_dropout",
    "summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels", "summary_first_dropout",
    "reorder_and_upcast_attn", "embedding_dropout", "ffn_dropout", "attention_probs_dropout_prob", "first_k_dense_replace",
    "qk_head_dim", "decoder_sparse_step", "mlp_only_layers", "quantization_config", "slow_but_exact",
    "apply_residual_connection_post_layernorm", "hidden_dropout_prob",
))  # fmt: skip
ACTIVATIONS: Final = ("silu", "gelu", "gelu_pytorch_tanh", "relu")
LONG: Final = {"short_factor": [1.0, 1.1, 1.2, 1.4], "long_factor": [2.0, 3.0, 4.0, 5.0]}
ROPES: Final[tuple[dict[str, Any], ...]] = (
    {"rope_type": "default"},
    {"rope_type": "default", "factor": 3.0},
    {"rope_type": "linear", "factor": 3.0},
    {"rope_type": "dynamic", "factor": 2.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": SMALL_CONTEXT},
    {"rope_type": "yarn", "factor": 4.0},
    {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    {"rope_type": "longrope", "factor": 4.0, "original_max_position_embeddings": SMALL_CONTEXT, **LONG},
    {"rope_type": "proportional", "partial_rotary_factor": 0.5},
)


def changed(name: str, dice: random.Random) -> dict[str, Any]:
    """The config of a tiny model with one to three keys changed."""
    if name not in _TINY:
        known = default_config(name)
        full, layers = known.to_dict(), getattr(known, layers_key(name))
        given = {key: value for key, value in full.items() if key != "rope_parameters"}
    else:
        full, layers = tiny_models.tiny_config(name), tiny_models.NUM_LAYERS
        given = tiny_models.given_fields(name)
    config = full if dice.random() < 0.5 else given
    defaults = AutoConfig.for_model(full["model_type"]).to_dict()
    keys = sorted((defaults.keys() | {"layer_types", "sliding_window", "head_dim", "attention_bias", "rope"}) - IGNORED)
    for key in dice.sample(keys, dice.randint(1, 3)):
        if key in {"rope", "rope_parameters", "rope_scaling", "rope_theta"}:
            change_rope(config, dice)
        elif key in config and dice.random() < 0.15:
            del config[key]
        else:
            config[key] = drawn(key, config.get(key, defaults.get(key)), layers, dice)
    return config


def change_rope(config: dict[str, Any], dice: random.Random) -> None:
    """Draws position embeddings, in the spelling of transformers 5 or of 4."""
    parameters = dict(dice.choice(ROPES))
    theta = dice.choice((10_000.0, 500.0))
    for key in ("rope_parameters", "rope_scaling", "rope_theta"):
        config.pop(key, None)
    if dice.random() < 0.5:
        config["rope_parameters"] = {**parameters, "rope_theta": theta}
        return
    config["rope_theta"] = theta
    if parameters["rope_type"] != "default":
        kind = parameters.pop("rope_type")
        config["rope_scaling"] = {**parameters, dice.choice(("type", "rope_type")): kind}
        if dice.random() < 0.3:
            config["rope_scaling"] = {**parameters, "type": kind, "rope_type": kind}


def drawn(key: str, value: object, layers: int, dice: random.Random) -> object:
    match key:
        case "layer_types":
            kinds = ["full_attention", "sliding_attention"]
            return dice.choice([None, [dice.choice(kinds) for _ in range(layers)], kinds * (layers // 2)])
        case "sliding_window":
            return dice.choice([None, 3, 8, 300])
        case "max_window_layers":
            return dice.choice([0, 2, layers, 28])
        case "no_rope_layers":
            return dice.choice([None, [dice.choice([0, 1]) for _ in range(layers)]])
        case "head_dim":
            return dice.choice([None, 4, 6, 16])
        case "num_key_value_heads" | "num_kv_heads":
            return dice.choice([None, 1, 2, 4])
        case "hidden_act" | "hidden_activation" | "activation_function":
            return dice.choice(ACTIVATIONS)
        case "partial_rotary_factor" | "rotary_pct":
            return dice.choice([0.25, 0.5, 1.0])
    if isinstance(value, bool) or (value is None and key.startswith(("use_", "tie_", "attention_bias", "mlp_bias"))):
        return not value
    if isinstance(value, float):
        return dice.choice([value * 0.5, value * 2, 1.0]) if "eps" not in key else dice.choice([1e-3, 1e-6])
    return value


def loaded_by_transformers(config: Mapping[str, Any], folder: Path, seed: int) -> PreTrainedModel | None:
    """Saves a random model of the config in the folder, and loads it from there; None if transformers cannot."""
    path = folder / "config.json"
    path.write_text(json.dumps(config))
    try:
        known = AutoConfig.from_pretrained(folder)
        attention = "eager" if getattr(known, "attn_logit_softcapping", None) else None
        model = tiny_models.random_model(known, seed, attention)
        model.save_pretrained(folder)
        path.write_text(json.dumps(config))
        whole: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation=attention
        ).eval()
        return whole if bool(tiny_models.all_logits(whole, [1, 2, 3] * 15).isfinite().all()) else None
    except Exception:  # noqa: BLE001  whatever transformers raises for a config that it does not run
        return None


def published_groups(folder: Path, cut: tuple[int, ...]) -> list[LayerGroup]:
    """The stages of the folder's model, after the checks of publication, which may raise CheckpointInvalid."""
    checkpoint = open_checkpoint(folder)
    check_runnable(checkpoint.config, "float32")
    sources = with_shared_blocks(split_experts(checkpoint.config["model_type"], checkpoint.tensors))
    placed = place_tensors(sources, describe_model(checkpoint.config))
    shapes = {name: each.shape for members in placed.values() for name, each in members.items()}
    check_shapes(checkpoint.config, shapes, "float32")
    tensors = {
        name: RawTensor(each.dtype, each.shape, memoryview(bytearray(b"".join(each.blocks()))))
        for name, each in sources.items()
    }
    config = json.loads(checkpoint.files["config.json"])
    try:
        return [
            build_layer_group(
                "auto", config, tiny_models.stage_tensors(tensors, first, last, cut[-1]), first, last, "float32", "cpu", 2**27
            )
            for first, last in pairwise(cut)
        ]
    except Exception as error:
        raise AssertionError(f"refused by a stage, after publication: {error!r}") from error


def logits_of_stages(groups: list[LayerGroup], token_ids: list[int], split: int) -> Any:
    handles = [group.kv.reserve(len(token_ids)) for group in groups]
    found = []
    for first, last in ((0, split), (split, len(token_ids))):
        hidden: Any = np.array(token_ids[first:last])
        for group, handle in zip(groups, handles, strict=True):
            is_long = group.short_context is not None and len(token_ids) > group.short_context
            segment = Segment(handle, first, last - first, is_long, token_ids=np.array(token_ids[first:last]))
            hidden = group.forward(hidden, [segment])
        found.append(groups[-1].logits(hidden))
    return np.concatenate(found)


def outcome(case: int, folder: Path) -> str | None:
    """Runs a case: 'equal', 'refused: …', or None if it does not count. Raises AssertionError for a wrong answer."""
    dice = random.Random(case)
    name = NAMES[case % len(NAMES)]
    config = changed(name, dice)
    whole = loaded_by_transformers(config, folder, case)
    if whole is None:
        return None
    try:
        return answer(whole, folder, dice)
    except CheckpointInvalid as error:
        return f"refused: {error}"
    except AssertionError as error:
        if refusal := refused_by_the_self_test(config):
            return f"refused: {refusal}"
        raise error


def answer(whole: PreTrainedModel, folder: Path, dice: random.Random) -> str:
    kinds = set(getattr(whole.config, "layer_types", None) or ())
    is_hybrid = not kinds.isdisjoint(("linear_attention", "conv", "hybrid")) and bool(kinds - {"linear_attention", "conv"})
    oracle = tiny_models.recurrent_logits if is_hybrid else tiny_models.all_logits
    layers = getattr(whole.config, layers_key(whole.config.model_type))
    bounds = sorted(dice.sample(range(1, layers), min(layers - 1, dice.randint(0, 2))))
    cut = (0, *(bound for bound in bounds if can_begin_with(bound, folder)), layers)
    token_ids = [dice.randrange(5, tiny_models.VOCAB_SIZE) for _ in range(TOKENS)]
    split = dice.randint(1, TOKENS - 1)
    expected = oracle(whole, token_ids).numpy()
    found = logits_of_stages(published_groups(folder, cut), token_ids, split)
    difference = np.abs(found - expected).max() / np.abs(expected).max()
    if difference >= 1e-4:  # some configs amplify rounding, and a router's choice can change
        most = 4 * amplified_rounding(whole, lambda: oracle(whole, token_ids))
        assert difference < most, f"logits differ by {difference:.2g} of the greatest; cut {cut}, {split} tokens first"
    return "equal"


@torch.no_grad()
def amplified_rounding(whole: PreTrainedModel, logits: Callable[[], torch.Tensor]) -> float:
    """How much logits change, of the greatest, if the last bits of the embeddings do."""
    embedding, generator = whole.get_input_embeddings().weight, torch.Generator().manual_seed(0)
    kept, before, change = embedding.clone(), logits(), 0.0
    for _ in range(4):
        embedding.copy_(kept * (1 + torch.randint(-1, 2, kept.shape, generator=generator) * 2.0**-23))
        change = max(change, float((logits() - before).abs().max() / before.abs().max()))
    embedding.copy_(kept)
    return change


def can_begin_with(layer: int, folder: Path) -> bool:
    """Whether a stage of the folder's model can begin with this layer."""
    try:
        return decoder_of(json.loads((folder / "config.json").read_text())).obstacle_to_cut(layer) is None
    except ArchitectureUnsupported:
        return True


def refused_by_the_self_test(config: Mapping[str, Any]) -> str | None:
    """The reason for which publication refuses the config, if it is not one that Lamina's own layers run."""
    try:
        decoder_of(config)
    except UnsupportedConfig:
        try:
            check_cut(config)
        except ArchitectureUnsupported as error:
            return str(error)
    return None


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("part", range(PARTS))
def test_a_changed_config_gives_transformers_logits_or_is_refused(part: int, tmp_path: Path) -> None:
    outcomes = []
    for case in CASES[part::PARTS]:
        folder = tmp_path / str(case)
        folder.mkdir()
        try:
            outcomes.append(outcome(case, folder))
        except AssertionError as error:
            raise AssertionError(f"case {case}: {(folder / 'config.json').read_text()}\n{error}") from error
    print("\n".join(f"{outcomes.count(each):4} {each}" for each in sorted(set(map(str, outcomes)))))
    assert outcomes.count("equal") > len(outcomes) / 4
