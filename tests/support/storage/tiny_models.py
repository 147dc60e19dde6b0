"""Seeded tiny models of every served family: the oracle of the stage tests is the whole model in transformers.

Every parameter is redrawn, biases and norms included, with spreads that make a forgotten bias, a skipped norm or a
wrong position change the tokens. Six layers, so that any cut in three works; context 256; vocabulary 128.
"""

import copy
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar

import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedModel
from transformers.utils import logging

from storage.checkpoints.checkpoint import SourceTensor
from storage.checkpoints.families import part_of, with_shared_blocks
from storage.floats import as_bytes
from storage.models.expert_tensors import split_experts

Tensor = TypeVar("Tensor")
VOCAB_SIZE: Final = 128
NUM_LAYERS: Final = 6
CONTEXT: Final = 256
SLIDING_WINDOW: Final = 8

_COMMON: Final[dict[str, Any]] = {
    "vocab_size": VOCAB_SIZE, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": CONTEXT, "tie_word_embeddings": False,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_SLIDING_AND_FULL: Final = ["sliding_attention", "full_attention"] * (NUM_LAYERS // 2)
_ROPE: Final = {"rope_theta": 10_000.0, "rope_type": "default"}
_MOE: Final = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}

_ROUTED: Final = {"n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1, **_MOE}
_GRANITE: Final = {
    "embedding_multiplier": 3.0, "logits_scaling": 2.0, "residual_multiplier": 0.5, "attention_multiplier": 0.3,
    "num_local_experts": 4, "num_experts_per_tok": 2,
}  # fmt: skip


def _like_llama(model_type: str, **fields: Any) -> dict[str, Any]:
    return {"model_type": model_type, **_COMMON, **fields}


def _like_gpt2(model_type: str, **fields: Any) -> dict[str, Any]:
    sizes = {"vocab_size": VOCAB_SIZE, "n_positions": CONTEXT, "n_embd": 32, "n_layer": NUM_LAYERS, "n_head": 4}
    return {"model_type": model_type, **sizes, "bos_token_id": 1, "eos_token_id": 2, **fields}


_LLAMA_SHAPED: Final[dict[str, dict[str, Any]]] = {
    "llama": _like_llama("llama"),
    "llama_tied": _like_llama("llama", tie_word_embeddings=True),
    "llama_biased": _like_llama("llama", attention_bias=True, mlp_bias=True),
    "llama_wide_heads": _like_llama("llama", head_dim=16),
    "llama_rope_linear": _like_llama("llama", rope_parameters={**_ROPE, "rope_type": "linear", "factor": 4.0}),
    "llama_rope_llama3": _like_llama(
        "llama",
        rope_parameters={
            **_ROPE,
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    ),
    "llama_rope_yarn": _like_llama(
        "llama", rope_parameters={**_ROPE, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    ),
    "smollm3": _like_llama("smollm3", no_rope_layers=[1, 1, 1, 0, 1, 1]),
    "mistral": _like_llama("mistral", sliding_window=None),
    "mistral_sliding": _like_llama("mistral", sliding_window=SLIDING_WINDOW),
    "qwen2": _like_llama("qwen2"),
    "qwen2_sliding": _like_llama(
        "qwen2", use_sliding_window=True, sliding_window=SLIDING_WINDOW, max_window_layers=3, tie_word_embeddings=True
    ),
    "qwen3": _like_llama("qwen3", head_dim=16, tie_word_embeddings=True),
    "ministral": _like_llama("ministral", head_dim=16, sliding_window=SLIDING_WINDOW, layer_types=_SLIDING_AND_FULL),
    "seed_oss": _like_llama("seed_oss", head_dim=16),
    "seed_oss_biased": _like_llama("seed_oss", head_dim=8, attention_out_bias=True, mlp_bias=True),
    "cwm": _like_llama("cwm", head_dim=8, sliding_window=SLIDING_WINDOW),
    "internlm3": _like_llama("internlm3", head_dim=8, qkv_bias=True, bias=True),
    "iquestcoder": _like_llama("iquestcoder", head_dim=8),
}

_MLA: Final = {  # latent attention
    "num_key_value_heads": 4, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8,
    "q_lora_rank": 16,
}  # fmt: skip
_YARN: Final = {
    **_ROPE, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "mscale": 1.0, "mscale_all_dim": 0.8,
}  # fmt: skip

_OTHERS: Final[dict[str, dict[str, Any]]] = {
    "mixtral": _like_llama("mixtral", num_local_experts=4, num_experts_per_tok=2, sliding_window=None),
    "qwen2_moe": _like_llama(
        "qwen2_moe", num_experts=4, shared_expert_intermediate_size=48, decoder_sparse_step=1, mlp_only_layers=[1], **_MOE
    ),
    "olmoe": _like_llama("olmoe", num_key_value_heads=4, num_experts=8, num_experts_per_tok=3),
    "flex_olmo": _like_llama("flex_olmo", num_experts=4, num_experts_per_tok=2),
    "granitemoe": _like_llama("granitemoe", **_GRANITE),
    "phimoe": _like_llama("phimoe", num_local_experts=8, lm_head_bias=True, attention_bias=True, router_jitter_noise=0.2),
    "phimoe_longrope": _like_llama(
        "phimoe",
        num_local_experts=4,
        rope_parameters={
            "rope_theta": 10_000.0,
            "rope_type": "longrope",
            "short_factor": [1.0, 1.1, 1.2, 1.4],
            "long_factor": [2.0, 3.0, 4.0, 5.0],
            "short_mscale": 1.2,
            "long_mscale": 1.2,
            "original_max_position_embeddings": 16,
        },
    ),
    "granitemoeshared": _like_llama("granitemoeshared", shared_intermediate_size=24, **_GRANITE),
    "glm4_moe": _like_llama(
        "glm4_moe", head_dim=8, attention_bias=True, use_qk_norm=True, routed_scaling_factor=1.5, **_ROUTED
    ),
    "glm4_moe_groups": _like_llama("glm4_moe", head_dim=8, **_ROUTED | {"n_routed_experts": 8, "n_group": 4, "topk_group": 2}),
    "qwen3_moe": _like_llama("qwen3_moe", num_experts=4, head_dim=8, decoder_sparse_step=1, mlp_only_layers=[2], **_MOE),
    "qwen3_moe_every_other": _like_llama("qwen3_moe", num_experts=4, head_dim=8, decoder_sparse_step=2, **_MOE),
    "gemma": _like_llama("gemma", head_dim=16, tie_word_embeddings=True),
    "gemma2": _like_llama(
        "gemma2",
        head_dim=16,
        query_pre_attn_scalar=16,
        sliding_window=SLIDING_WINDOW,
        tie_word_embeddings=True,
        layer_types=_SLIDING_AND_FULL,
    ),
    "gemma3_text": _like_llama(
        "gemma3_text",
        head_dim=16,
        query_pre_attn_scalar=16,
        sliding_window=SLIDING_WINDOW,
        tie_word_embeddings=True,
        layer_types=["sliding_attention"] * 5 + ["full_attention"],
    ),
    "phi": _like_llama("phi", num_key_value_heads=4, qk_layernorm=True),
    "phi_tied": _like_llama("phi", num_key_value_heads=4, tie_word_embeddings=True),
    "phi3": _like_llama("phi3", sliding_window=None),
    "phi3_sliding": _like_llama("phi3", sliding_window=SLIDING_WINDOW, tie_word_embeddings=True),
    "phi3_partial": _like_llama("phi3", head_dim=8, sliding_window=None, partial_rotary_factor=0.5),
    "phi3_longrope": _like_llama(
        "phi3",
        sliding_window=None,
        original_max_position_embeddings=64,
        rope_parameters={
            "rope_theta": 10_000.0,
            "rope_type": "longrope",
            "short_factor": [1.0, 1.1, 1.2, 1.4],
            "long_factor": [2.0, 3.0, 4.0, 5.0],
        },
    ),
    "olmo2": _like_llama("olmo2"),
    "olmo3": _like_llama("olmo3", sliding_window=SLIDING_WINDOW),
    "granite": _like_llama(
        "granite", embedding_multiplier=3.0, logits_scaling=2.0, residual_multiplier=0.5, attention_multiplier=0.3
    ),
    "granite_swa": _like_llama(
        "granite_swa", sliding_window=SLIDING_WINDOW, layer_rope_theta=[0, 10_000.0, 10_000.0] * 2, attention_multiplier=0.3
    ),
    "qwen3_5_text_full": _like_llama("qwen3_5_text", head_dim=16, layer_types=["full_attention"] * NUM_LAYERS),
    "deepseek_v2": _like_llama("deepseek_v2", topk_method="greedy", routed_scaling_factor=1.5, **_MLA, **_ROUTED),
    "deepseek_v2_lite": _like_llama(
        "deepseek_v2",
        topk_method="group_limited_greedy",
        **_MLA | _ROUTED | {"q_lora_rank": None, "n_routed_experts": 8, "n_group": 4, "topk_group": 2},
    ),
    "deepseek_v3_yarn": _like_llama(
        "deepseek_v3", rope_parameters=_YARN, attention_bias=True, n_group=2, topk_group=1, **_MLA, **_ROUTED
    ),
    "glm4_moe_lite": _like_llama("glm4_moe_lite", n_group=1, topk_group=1, **_MLA | {"v_head_dim": 18}, **_ROUTED),
    "starcoder2": _like_llama("starcoder2", sliding_window=SLIDING_WINDOW, tie_word_embeddings=True),
    "gpt_neox": _like_llama("gpt_neox", use_parallel_residual=True),
    "gpt_neox_sequential": _like_llama("gpt_neox", use_parallel_residual=False),
    "gptj": _like_gpt2("gptj", rotary_dim=4, tie_word_embeddings=False),
    "cohere2": _like_llama("cohere2", sliding_window=SLIDING_WINDOW, tie_word_embeddings=True),
    "ministral3": _like_llama(
        "ministral3",
        head_dim=8,
        rope_parameters={
            **_ROPE,
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 16,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "llama_4_scaling_beta": 0.5,
        },
    ),
    "cohere": _like_llama("cohere", logit_scale=0.25, use_qk_norm=True, tie_word_embeddings=True),
    "stablelm": _like_llama("stablelm", use_qkv_bias=True),
    "stablelm_parallel": _like_llama("stablelm", use_parallel_residual=True, qk_layernorm=True),
    "falcon": _like_llama("falcon", multi_query=True, parallel_attn=True, bias=False, tie_word_embeddings=True),
    "falcon_grouped": _like_llama(
        "falcon", new_decoder_architecture=True, num_kv_heads=2, bias=False, tie_word_embeddings=True
    ),
    "falcon_alibi": _like_llama(
        "falcon", alibi=True, multi_query=False, parallel_attn=False, bias=True, tie_word_embeddings=True
    ),
    "nemotron": _like_llama("nemotron", head_dim=8),
    "glm4": _like_llama("glm4", head_dim=8, attention_bias=True),
    "glm": _like_llama("glm", head_dim=8, attention_bias=True, rms_norm_eps=1e-5),
    "arcee": _like_llama("arcee"),
    "helium": _like_llama("helium", head_dim=8),
    "hyperclovax": _like_llama("hyperclovax", embedding_multiplier=3.0, logits_scaling=0.5, residual_multiplier=0.5),
    "jais2": _like_llama("jais2", head_dim=8),
    "vaultgemma": _like_llama(
        "vaultgemma", head_dim=16, query_pre_attn_scalar=16, sliding_window=SLIDING_WINDOW, tie_word_embeddings=True
    ),
    "youtu": _like_llama("youtu", **_MLA),
    "gpt_oss": _like_llama(
        "gpt_oss",
        head_dim=8,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=SLIDING_WINDOW,
        rope_parameters=dict(_ROPE),
    ),
    "ernie4_5": _like_llama("ernie4_5", head_dim=8, tie_word_embeddings=True),
    "exaone": _like_llama("exaone", attention_bias=True, mlp_bias=True),
    "exaone4": _like_llama("exaone4", sliding_window=SLIDING_WINDOW, layer_types=_SLIDING_AND_FULL),
    "hunyuan_v1_dense": _like_llama("hunyuan_v1_dense", head_dim=8),
    "hunyuan_v1_dense_alpha": _like_llama(
        "hunyuan_v1_dense", head_dim=8, rope_parameters={**_ROPE, "rope_type": "dynamic", "alpha": 100.0, "factor": 1.0}
    ),
    "apertus": _like_llama("apertus", rope_parameters=dict(_ROPE)),
    "gpt2": _like_gpt2("gpt2"),
    "gpt2_scaled_by_layer": _like_gpt2("gpt2", scale_attn_by_inverse_layer_idx=True),
    "openai-gpt": _like_gpt2("openai-gpt", tie_word_embeddings=True),
    "opt": _like_llama("opt", ffn_dim=64, word_embed_proj_dim=32, tie_word_embeddings=True),
    "opt_projected": _like_llama(
        "opt", ffn_dim=64, word_embed_proj_dim=16, do_layer_norm_before=False, tie_word_embeddings=True
    ),
    "bloom": {
        "model_type": "bloom",
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "n_layer": NUM_LAYERS,
        "n_head": 4,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    },
    "deepseek_v3": _like_llama(
        "deepseek_v3",
        num_key_value_heads=4,
        first_k_dense_replace=3,
        n_routed_experts=4,
        n_shared_experts=1,
        n_group=2,
        topk_group=1,
        kv_lora_rank=8,
        q_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=4,
        v_head_dim=8,
        **_MOE,
    ),
}
# Models that GGUF files hold, of families that may not be served.
_STORED: Final[dict[str, dict[str, Any]]] = {
    "olmo": _like_llama("olmo", clip_qkv=0.5),
}  # fmt: skip
_LINEAR_AND_FULL: Final = ["linear_attention", "full_attention"] * (NUM_LAYERS // 2)
_DELTA_NET: Final = {
    "layer_types": _LINEAR_AND_FULL, "linear_conv_kernel_dim": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "head_dim": 16,
}  # fmt: skip
_DELTA_NET_MOE: Final = {**_DELTA_NET, **_MOE, "num_experts": 4, "shared_expert_intermediate_size": 16}
_MAMBA_2: Final = {
    "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 16, "mamba_n_groups": 2, "mamba_expand": 2, "mamba_chunk_size": 16,
}  # fmt: skip
_LINEAR_AND_HYBRID: Final = ["linear_attention", "hybrid"] * (NUM_LAYERS // 2)
_NEMOTRON: Final = {
    "mamba_num_heads": 8, "mamba_head_dim": 8, "ssm_state_size": 16, "n_groups": 2, "chunk_size": 16, "head_dim": 8,
}  # fmt: skip
FALCON_MULTIPLIERS: Final[dict[str, Any]] = {
    "embedding_multiplier": 3.0, "lm_head_multiplier": 0.5, "attention_in_multiplier": 1.25, "attention_out_multiplier": 0.75,
    "key_multiplier": 0.5, "mlp_multipliers": [0.5, 2.0], "ssm_in_multiplier": 0.8, "ssm_out_multiplier": 0.7,
    "ssm_multipliers": [0.5, 1.5, 2.0, 0.75, 1.25],
}  # fmt: skip
_CONV_AND_FULL: Final = ["conv", "full_attention", "conv", "conv", "full_attention", "conv"]

_RECURRENT: Final[dict[str, dict[str, Any]]] = {
    "lfm2": _like_llama("lfm2", layer_types=_CONV_AND_FULL, block_auto_adjust_ff_dim=False, tie_word_embeddings=True),
    "lfm2_moe": _like_llama("lfm2_moe", layer_types=_CONV_AND_FULL, num_experts=4, num_dense_layers=3, **_MOE),
    "qwen3_next": _like_llama("qwen3_next", **_DELTA_NET_MOE),
    "qwen3_5_text": _like_llama("qwen3_5_text", **_DELTA_NET),
    "qwen3_5_moe_text": _like_llama("qwen3_5_moe_text", **_DELTA_NET_MOE),
    "mamba": _like_llama("mamba", state_size=8),
    "falcon_mamba": _like_llama("falcon_mamba", state_size=8),
    "mamba2": _like_llama("mamba2", num_heads=8, head_dim=8, state_size=16, n_groups=2, chunk_size=16),
    "granitemoehybrid": _like_llama(
        "granitemoehybrid",
        layer_types=_LINEAR_AND_FULL,
        num_local_experts=4,
        num_experts_per_tok=2,
        shared_intermediate_size=32,
        embedding_multiplier=3.0,
        **_MAMBA_2,
    ),
    "granitemoehybrid_dense": _like_llama(
        "granitemoehybrid",
        layer_types=_LINEAR_AND_FULL,
        num_local_experts=0,
        shared_intermediate_size=32,
        embedding_multiplier=3.0,
        residual_multiplier=0.5,
        position_embedding_type="rope",
        **_MAMBA_2,
    ),
    "nemotron_h_dense": _like_llama(
        "nemotron_h",
        layers_block_type=["linear_attention", "mlp", "full_attention", "mlp", "linear_attention", "full_attention"],
        **_NEMOTRON,
    ),
    "falcon_h1": _like_llama("falcon_h1", mamba_d_ssm=64, **FALCON_MULTIPLIERS, **_MAMBA_2),
    "falcon_h1_normed": _like_llama(
        "falcon_h1",
        mamba_d_ssm=48,
        mamba_rms_norm=True,
        attention_bias=True,
        mlp_bias=True,
        **FALCON_MULTIPLIERS | {"attention_in_multiplier": 1.0},
        **_MAMBA_2 | {"mamba_d_head": "auto"},
    ),
    "bamba": _like_llama("bamba", attn_layer_indices=[1, 4], **_MAMBA_2),
    "nemotron_h": _like_llama(
        "nemotron_h",
        layers_block_type=["linear_attention", "moe", "full_attention", "mlp", "linear_attention", "full_attention"],
        **_NEMOTRON,
        n_routed_experts=4,
        moe_shared_expert_intermediate_size=16,
        **_MOE,
    ),
    "nemotron_h_latent": _like_llama(
        "nemotron_h",
        layers_block_type=["linear_attention", "moe", "full_attention", "moe", "mlp", "linear_attention"],
        **_NEMOTRON,
        n_routed_experts=8,
        n_group=2,
        moe_shared_expert_intermediate_size=24,
        moe_latent_size=20,
        mlp_bias=True,
        **_MOE,
    ),
    "jamba": _like_llama(
        "jamba",
        attn_layer_period=3,
        attn_layer_offset=1,
        num_experts=4,
        num_experts_per_tok=2,
        expert_layer_period=2,
        expert_layer_offset=1,
        mamba_d_state=8,
    ),
    "olmo_hybrid": _like_llama("olmo_hybrid", layer_types=_LINEAR_AND_FULL),
    "minimax": _like_llama("minimax", layer_types=_LINEAR_AND_FULL, num_local_experts=4, block_size=8),
    "recurrent_gemma": _like_llama("recurrent_gemma", attention_window_size=SLIDING_WINDOW, tie_word_embeddings=True),
    "rwkv": _like_llama("rwkv", rescale_every=0),  # the whole model would rescale the weights that tests publish
    "xlstm": _like_llama("xlstm", hidden_size=128, num_heads=4, autocast_kernel_dtype="float32"),
    "zamba": _like_llama(
        "zamba", layers_block_type=_LINEAR_AND_HYBRID, mamba_d_state=8, num_key_value_heads=4, tie_word_embeddings=True
    ),
}

_GEMMA: Final = {"head_dim": 16, "sliding_window": SLIDING_WINDOW, "tie_word_embeddings": True, "final_logit_softcapping": 4.0}
_GEMMA_4: Final = {**_GEMMA, "global_head_dim": 24, "vocab_size_per_layer_input": VOCAB_SIZE}
_SHARING_KV: Final = {  # the last layer reads the keys and values of the one before it
    "layer_types": [*_SLIDING_AND_FULL[:3], "sliding_attention", "full_attention", "full_attention"],
    "num_kv_shared_layers": 1,
    "hidden_size_per_layer_input": 8,
}
# Families that layers in C alone run.
_NATIVE_ONLY: Final[dict[str, dict[str, Any]]] = {
    "gemma3n_text": _like_llama(
        "gemma3n_text",
        intermediate_size=[64, 64, 48, 64, 40, 64],
        activation_sparsity_pattern=[0.9, 0.0, 0.3, 0.5, 0.0, 0.9],
        vocab_size_per_layer_input=VOCAB_SIZE - 8,
        laurel_rank=6,
        altup_num_inputs=3,
        **_SHARING_KV,
        **_GEMMA,
    ),
    "gemma4_text": _like_llama("gemma4_text", use_double_wide_mlp=True, **_SHARING_KV, **_GEMMA_4),
    "gemma4_text_experts": _like_llama(
        "gemma4_text",
        layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 2,
        hidden_size_per_layer_input=0,
        attention_k_eq_v=True,
        num_global_key_value_heads=1,
        enable_moe_block=True,
        num_experts=4,
        top_k_experts=2,
        moe_intermediate_size=16,
        **_GEMMA_4,
    ),
}

RECURRENT: Final = tuple(_RECURRENT)  # names of the tiny models with recurrent layers
LLAMA_SHAPED: Final = tuple(_LLAMA_SHAPED)  # names of the tiny models that the lean group must run
_BY_TRANSFORMERS: Final = frozenset((
    "gptj", "falcon", "falcon_grouped", "falcon_alibi", "openai-gpt", "opt_projected", "bloom",
))  # fmt: skip
NATIVE_RECURRENT: Final = (
    "lfm2",
    "qwen3_5_text",
    "mamba2",
    "granitemoehybrid_dense",
    "granitemoehybrid",
    "falcon_h1",
    "falcon_h1_normed",
    "bamba",
    "nemotron_h_dense",
    "nemotron_h",
    "nemotron_h_latent",
    "qwen3_next",
    "qwen3_5_moe_text",
    "lfm2_moe",
)  # names of those of them that run in C
NATIVE_ONLY: Final = tuple(_NATIVE_ONLY)
NATIVE: Final = (
    *_LLAMA_SHAPED, *(name for name in _OTHERS if name not in _BY_TRANSFORMERS), *NATIVE_RECURRENT, *NATIVE_ONLY,
)  # fmt: skip
"""Names of those that run in C."""
ATTENTION: Final = (*_LLAMA_SHAPED, *_OTHERS)  # names of those with attention in all layers
ALL: Final = (*ATTENTION, *_RECURRENT)  # names of all tiny models; several may be of one family


def given_fields(name: str) -> dict[str, Any]:
    """The keys of a tiny model's `config.json` that differ from the defaults of its family."""
    return copy.deepcopy({**_LLAMA_SHAPED, **_OTHERS, **_RECURRENT, **_NATIVE_ONLY, **_STORED}[name])


def tiny_config(name: str, **changes: Any) -> dict[str, Any]:
    """The `config.json` of a tiny model, as a checkpoint has it."""
    fields = given_fields(name) | changes
    config: dict[str, Any] = AutoConfig.for_model(**fields).to_dict()
    config["dtype"] = "float32"
    return config


def whole_model(name: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> PreTrainedModel:
    """The whole model in transformers, in eval mode, never stopping at an end token in `generate`."""
    config = AutoConfig.for_model(**tiny_config(name, **changes))
    attention = "eager" if config.model_type in ("gemma2", "vaultgemma") else None
    model = random_model(config, seed, attention)
    if dtype != torch.float32:
        # Not `.to`: that would round the rotary frequencies too, which a model that is loaded keeps in float32.
        model = type(model).from_pretrained(
            None, config=config, state_dict=model.state_dict(), dtype=dtype, attn_implementation=attention
        )
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.eval()


def random_model(config: Any, seed: int, attention: str | None) -> PreTrainedModel:
    """A model with seeded weights. attention: the implementation; None: transformers' choice."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # `redraw` adds to vectors, which some families draw at random (A_log of a delta rule)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    redraw(model, seed)
    return model


@torch.no_grad()
def redraw(model: PreTrainedModel, seed: int) -> None:
    """Draws all parameters anew, with spreads that make what is forgotten or misplaced change the logits."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim >= 2:
            is_embedding = parameter.shape[0] == VOCAB_SIZE
            parameter.copy_(noise * (0.1 if is_embedding else 2 / parameter.shape[-1] ** 0.5))
        else:
            parameter.add_(noise * 0.1)
    for name, buffer in model.named_buffers():
        if name.endswith(("correction_bias", "expert_bias", "layer_scalar")):
            buffer.add_(torch.randn(buffer.shape, generator=generator) * 0.1)


def checkpoint_tensors(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Tensors by the names that `save_pretrained` gives them; tied matrices appear once."""
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return load_file(Path(folder) / "model.safetensors")


def as_published(model_type: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint in float32 as a publication has them: all that a layer runs, and a matrix for an expert."""
    tensors = with_shared_blocks(tensors)

    def rows(name: str, first: int, last: int) -> memoryview:
        return as_bytes(tensors[name][first:last].numpy())

    sources = {name: SourceTensor("F32", tuple(tensor.shape), partial(rows, name)) for name, tensor in tensors.items()}
    return {
        name: tensors[name]
        if name in tensors
        else torch.frombuffer(source.read_rows(0, source.rows), dtype=torch.float32).view(source.shape)
        for name, source in split_experts(model_type, sources).items()
    }


def stage_tensors(
    tensors: Mapping[str, Tensor], first_layer: int, last_layer: int, num_layers: int = NUM_LAYERS
) -> dict[str, Tensor]:
    """Tensors of a stage [first_layer, last_layer): its layers, and at either end every tensor that belongs to no layer.

    Both ends get the tensors before and after the layers, since this file cannot tell them apart; a tied embedding needs
    that anyway, and so do all stages if layers get inputs of their own.
    """
    is_end = first_layer == 0 or last_layer == num_layers or any("embed_tokens_per_layer" in name for name in tensors)
    chosen = {}
    for name, tensor in tensors.items():
        part = part_of(name)
        if first_layer <= part < last_layer if isinstance(part, int) else is_end:
            chosen[name] = tensor
    return chosen


@torch.inference_mode()
def greedy(model: PreTrainedModel, prompt: Sequence[int], new_tokens: int) -> list[int]:
    """The oracle: greedy continuation by `generate`."""
    ids = torch.tensor([list(prompt)])
    output = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new_tokens)
    continuation: list[int] = output[0, len(prompt) :].tolist()
    return continuation


@torch.inference_mode()
def all_logits(model: PreTrainedModel, token_ids: Sequence[int]) -> torch.Tensor:
    """The oracle: float32 logits [len(token_ids), vocab] of one full forward pass without a cache."""
    logits: torch.Tensor = model(input_ids=torch.tensor([list(token_ids)]), use_cache=False).logits[0]
    return logits.float()


@torch.inference_mode()
def recurrent_logits(model: PreTrainedModel, token_ids: Sequence[int]) -> torch.Tensor:
    """The oracle of models with recurrent layers: float32 logits [len(token_ids), vocab] of the whole model, token by token.

    With a single token transformers' modules take their recurrent path. For longer inputs they have another one, in chunks,
    whose rounding differs.
    """
    if model.config.model_type in ("minimax", "recurrent_gemma", "rwkv", "xlstm"):  # their states are in no cache
        return all_logits(model, token_ids)
    cache = DynamicCache(config=model.config)
    takes_positions = model.config.model_type not in ("mamba", "mamba2", "falcon_mamba")
    logits = []
    for position, token in enumerate(token_ids):
        positions = {"position_ids": torch.tensor([[position]])} if takes_positions else {}
        logits.append(model(input_ids=torch.tensor([[token]]), cache=cache, use_cache=True, **positions).logits[0])
    return torch.cat(logits).float()
