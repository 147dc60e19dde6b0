"""The architectures of GGUF files with recurrent layers, as rows of the same table as `gguf_architectures`.

llama.cpp's converter stores -exp(A_log) in place of A_log, convolutions without their dimension of size 1, and some vectors as
matrices. It also stores the value heads of Qwen3.5 in another order.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from storage.checkpoints.gguf_architectures import (
    BIAS,
    EXPERT_KEYS,
    EXPERT_KEYS_WITH_SHARED,
    EXPERTS_WITH_SHARED,
    GRANITE_EXPERTS,
    GRANITE_KEYS,
    SHARED_GATE,
    SHARED_IN_GRANITE,
    SIGMOID,
    SIZES,
    Architecture,
    Merge,
    Stack,
)


def _logarithm(decay: NDArray[Any]) -> NDArray[Any]:
    logarithm: NDArray[Any] = np.log(-decay)
    return logarithm


def _with_channels(convolution: NDArray[Any]) -> NDArray[Any]:
    return convolution[:, None, :]


def _heads_apart(config: Mapping[str, Any]) -> NDArray[np.intp]:
    """The number in the file of each row of in_proj_qkvz.

    The matrix has query, key, values and gates of one key head, then those of the next. The file has all queries first.
    """
    keys, values = config["linear_num_key_heads"], config["linear_num_value_heads"]
    key_rows, value_rows = keys * config["linear_key_head_dim"], values * config["linear_value_head_dim"]
    ends = np.cumsum([key_rows, key_rows, value_rows, value_rows])
    parts = np.split(np.arange(ends[-1]), ends[:-1])
    return np.concatenate([part.reshape(keys, -1) for part in parts], axis=1).reshape(-1)


def _tiled(config: Mapping[str, Any], width: int = 1) -> NDArray[np.intp]:
    """The number in the file of each row of the value heads.

    The file does not put the value heads of one key head side by side. width: rows of a head.
    """
    keys, values = config["linear_num_key_heads"], config["linear_num_value_heads"]
    heads = np.arange(values).reshape(-1, keys).T.reshape(-1)
    return (heads[:, None] * width + np.arange(width)).reshape(-1)


def _tiled_values(config: Mapping[str, Any]) -> NDArray[np.intp]:
    return _tiled(config, config["linear_value_head_dim"])


def _tiled_after_keys(config: Mapping[str, Any]) -> NDArray[np.intp]:
    """The number in the file of each row of queries, keys and values. Only rows of values are in another order there."""
    first = 2 * config["linear_num_key_heads"] * config["linear_key_head_dim"]
    return np.concatenate([np.arange(first), first + _tiled_values(config)])


def _mamba_modules(prefix: str) -> dict[str, str]:
    return {
        "ssm_in": f"{prefix}.in_proj",
        "ssm_out": f"{prefix}.out_proj",
        "ssm_conv1d.bias": f"{prefix}.conv1d.bias",
        "ssm_dt.bias": f"{prefix}.dt_bias",
    }


def _mamba_merges(prefix: str) -> dict[str, Merge | Stack]:
    return {
        f"{prefix}.A_log": Merge(("ssm_a",), lambda decay: _logarithm(decay[:, 0])),  # a matrix of one column in the file
        f"{prefix}.D": Merge(("ssm_d",), np.ravel),
        f"{prefix}.conv1d.weight": Merge(("ssm_conv1d.weight",), _with_channels),
        f"{prefix}.norm.weight": Merge(("ssm_norm.weight",), np.ravel),
    }


# Tables, in which a row takes few lines: ruff would give each field a line of its own.
# fmt: off
_STATE_SPACE_SIZES: Final = {key: SIZES[key] for key in ("block_count", "embedding_length", "context_length")}
_MAMBA_KEYS: Final = {
    "ssm.conv_kernel": "mamba_d_conv", "ssm.state_size": "mamba_d_state", "ssm.group_count": "mamba_n_groups",
    "ssm.time_step_rank": "mamba_n_heads",
}
_NO_ATTENTION: Final = {"feed_forward_length": (0,), "attention.head_count": (0,)}
_BACKBONE: Final = {"token_embd": "backbone.embeddings", "output_norm": "backbone.norm_f", "attn_norm": "norm"}

_SHORT_CONVOLUTION: Final = Architecture(
    "lfm2", "Lfm2ForCausalLM",
    modules={
        "token_embd_norm": "model.embedding_norm", "attn_norm": "operator_norm", "attn_output": "self_attn.out_proj",
        "attn_q_norm": "self_attn.q_layernorm", "attn_k_norm": "self_attn.k_layernorm", "shortconv.in_proj": "conv.in_proj",
        "shortconv.out_proj": "conv.out_proj", "ffn_norm": "ffn_norm", "ffn_gate": "feed_forward.w1",
        "ffn_down": "feed_forward.w2", "ffn_up": "feed_forward.w3",
    },
    merges={"conv.conv.weight": Merge(("shortconv.conv.weight",), _with_channels)}, keys={"shortconv.l_cache": "conv_L_cache"},
    layer_types={"shortconv.in_proj.weight": "conv", "attn_q.weight": "full_attention"},
    flags={"conv_bias": "shortconv.in_proj.bias"}, config={"block_auto_adjust_ff_dim": False}, norm="norm_eps",
)

_DELTA_NET: Final = Architecture(
    "qwen3_5_text", "Qwen3_5ForCausalLM",
    modules={
        "attn_qkv": "linear_attn.in_proj_qkv", "attn_gate": "linear_attn.in_proj_z", "ssm_alpha": "linear_attn.in_proj_a",
        "ssm_beta": "linear_attn.in_proj_b", "ssm_dt.bias": "linear_attn.dt_bias", "ssm_norm": "linear_attn.norm",
        "ssm_out": "linear_attn.out_proj", "post_attention_norm": "post_attention_layernorm",
    },
    merges={
        "linear_attn.A_log": Merge(("ssm_a",), _logarithm),
        "linear_attn.conv1d.weight": Merge(("ssm_conv1d.weight",), _with_channels),
    },
    rows={
        "attn_qkv.weight": _tiled_after_keys, "ssm_conv1d.weight": _tiled_after_keys, "attn_gate.weight": _tiled_values,
        "ssm_alpha.weight": _tiled, "ssm_beta.weight": _tiled, "ssm_a": _tiled, "ssm_dt.bias": _tiled,
    },
    columns={"ssm_out.weight": _tiled_values},
    keys={
        "ssm.conv_kernel": "linear_conv_kernel_dim", "ssm.state_size": "linear_key_head_dim",
        "ssm.group_count": "linear_num_key_heads", "ssm.time_step_rank": "linear_num_value_heads",
    },
    quotients={"linear_value_head_dim": ("ssm.inner_size", "ssm.time_step_rank")},
    layer_types={"ssm_conv1d.weight": "linear_attention", "attn_q.weight": "full_attention"}, flags=BIAS, norm_plus_one=True,
    partial_rotation=True, ignored=("full_attention_interval", "rope.dimension_sections"),
)
_DELTA_NET_EXPERTS: Final = replace(
    _DELTA_NET, model_type="qwen3_5_moe_text", class_name="Qwen3_5MoeForCausalLM",
    modules={**_DELTA_NET.modules, **EXPERTS_WITH_SHARED}, merges={**_DELTA_NET.merges, **SHARED_GATE},
    keys={**_DELTA_NET.keys, **EXPERT_KEYS_WITH_SHARED},
)

_GRANITE: Final = Architecture(
    "granitemoehybrid", "GraniteMoeHybridForCausalLM", modules={**_mamba_modules("mamba"), **GRANITE_EXPERTS},
    merges={**_mamba_merges("mamba"), **SHARED_IN_GRANITE},
    keys={
        **GRANITE_KEYS, **_MAMBA_KEYS, "expert_count": "num_local_experts", "expert_used_count": "num_experts_per_tok",
        "expert_shared_feed_forward_length": "shared_intermediate_size",
    },
    quotients={
        "mamba_d_head": ("ssm.inner_size", "ssm.time_step_rank"), "mamba_expand": ("ssm.inner_size", "embedding_length"),
    },
    layer_types={"ssm_in.weight": "linear_attention", "attn_q.weight": "full_attention"},
    flags={**BIAS, "mamba_conv_bias": "ssm_conv1d.bias", "mamba_proj_bias": "ssm_in.bias"},
    config={"hidden_act": "silu", "position_embedding_type": None}, permuted=True,
)

GRANITE_DENSE: Final = replace(
    _GRANITE, modules={**_mamba_modules("mamba"), "ffn_down": "shared_mlp.output_linear"},
    merges={**_mamba_merges("mamba"), "shared_mlp.input_linear.weight": Stack(("ffn_gate.weight", "ffn_up.weight"))},
    keys={**GRANITE_KEYS, **_MAMBA_KEYS, "expert_shared_feed_forward_length": "shared_intermediate_size"},
    config={**_GRANITE.config, "num_local_experts": 0},
)
"""The variant of the architecture `granitehybrid` without experts."""

BAMBA: Final = replace(
    _GRANITE, model_type="bamba", class_name="BambaForCausalLM",
    modules={
        **_mamba_modules("mamba"), "output_norm": "model.final_layernorm", "ffn_norm": "pre_ff_layernorm",
        **{f"ffn_{name}": f"feed_forward.{name}_proj" for name in ("gate", "up", "down")},
    },
    merges=_mamba_merges("mamba"), keys=_MAMBA_KEYS, layer_types_key="attn_layer_indices", config={"hidden_act": "silu"},
    partial_rotation=True,
)
"""The variant of the architecture `granitehybrid` that rotates queries and keys."""

_NEMOTRON: Final = Architecture(
    "nemotron_h", "NemotronHForCausalLM",
    modules={
        **_BACKBONE, **_mamba_modules("mixer"), **{f"attn_{name}": f"mixer.{name}_proj" for name in ("q", "k", "v")},
        "attn_output": "mixer.o_proj", **{f"ffn_{name}": f"mixer.{name}_proj" for name in ("up", "down")},
        **{f"ffn_{name}_exps": f"mixer.experts.{{}}.{name}_proj" for name in ("up", "down")},
        **{f"ffn_{name}_shexp": f"mixer.shared_experts.{name}_proj" for name in ("up", "down")}, "ffn_gate_inp": "mixer.gate",
        "exp_probs_b.bias": "mixer.gate.e_score_correction_bias",
    },
    layers="backbone.layers", merges=_mamba_merges("mixer"),
    keys={
        "ssm.conv_kernel": "conv_kernel", "ssm.state_size": "ssm_state_size", "ssm.group_count": "n_groups",
        "ssm.time_step_rank": "mamba_num_heads", "expert_count": "n_routed_experts", "expert_used_count": "num_experts_per_tok",
        "expert_feed_forward_length": "moe_intermediate_size",
        "expert_shared_feed_forward_length": "moe_shared_expert_intermediate_size", "expert_shared_count": "n_shared_experts",
        "expert_group_count": "n_group", "expert_group_used_count": "topk_group", "expert_weights_norm": "norm_topk_prob",
        "expert_weights_scale": "routed_scaling_factor",
    },
    quotients={"mamba_head_dim": ("ssm.inner_size", "ssm.time_step_rank")},
    layer_types={
        "ssm_in.weight": "linear_attention", "attn_q.weight": "full_attention", "ffn_up.weight": "mlp",
        "ffn_up_exps.weight": "moe",
    },
    layer_types_key="layers_block_type",
    flags={**BIAS, "use_conv_bias": "ssm_conv1d.bias", "mamba_proj_bias": "ssm_in.bias", "mlp_bias": "ffn_up.bias"},
    config={"mlp_hidden_act": "relu2"}, norm="layer_norm_epsilon", permuted=True,
    ignored=("rope.dimension_count", "rope.freq_base"),  # nothing is rotated
)

_FALCON: Final = Architecture(
    "falcon_h1", "FalconH1ForCausalLM",
    modules={**_mamba_modules("mamba"), "output_norm": "model.final_layernorm", "ffn_norm": "pre_ff_layernorm"}
    | {f"ffn_{name}": f"feed_forward.{name}_proj" for name in ("gate", "up", "down")},
    merges=_mamba_merges("mamba"), keys={**_MAMBA_KEYS, "ssm.inner_size": "mamba_d_ssm"},
    quotients={"mamba_d_head": ("ssm.inner_size", "ssm.time_step_rank")},
    flags={
        **BIAS, "mamba_conv_bias": "ssm_conv1d.bias", "mamba_proj_bias": "ssm_in.bias", "mamba_rms_norm": "ssm_norm.weight",
        "mlp_bias": "ffn_up.bias",
    },
    # The file's matrices are multiplied already.
    config={
        **{f"{part}_multiplier": 1.0 for part in ("attention_in", "attention_out", "embedding", "key", "lm_head")},
        "ssm_in_multiplier": 1.0, "ssm_out_multiplier": 1.0, "ssm_multipliers": [1.0] * 5, "mlp_multipliers": [1.0] * 2,
        "mamba_norm_before_gate": False, "hidden_act": "silu",
    },
)

_MAMBA_2: Final = Architecture(
    "mamba2", "Mamba2ForCausalLM", modules={**_BACKBONE, **_mamba_modules("mixer")}, layers="backbone.layers",
    merges=_mamba_merges("mixer"), sizes=_STATE_SPACE_SIZES,
    keys={
        "ssm.conv_kernel": "conv_kernel", "ssm.state_size": "state_size", "ssm.group_count": "n_groups",
        "ssm.time_step_rank": "num_heads",
    },
    quotients={"head_dim": ("ssm.inner_size", "ssm.time_step_rank"), "expand": ("ssm.inner_size", "embedding_length")},
    flags={"use_conv_bias": "ssm_conv1d.bias", "use_bias": "ssm_in.bias"}, config={"hidden_act": "silu"},
    norm="layer_norm_epsilon", implied=_NO_ATTENTION,
)

_MAMBA: Final = Architecture(
    "mamba", "MambaForCausalLM",
    modules={**_mamba_modules("mixer"), **_BACKBONE, "ssm_dt": "mixer.dt_proj", "ssm_x": "mixer.x_proj"} | {
        "ssm_dt.bias": "mixer.dt_proj.bias",
    },
    layers="backbone.layers",
    merges={
        "mixer.A_log": Merge(("ssm_a",), _logarithm), "mixer.D": Merge(("ssm_d",), np.ravel),
        "mixer.conv1d.weight": Merge(("ssm_conv1d.weight",), _with_channels),
    },
    sizes=_STATE_SPACE_SIZES,
    keys={
        "ssm.conv_kernel": "conv_kernel", "ssm.state_size": "state_size", "ssm.time_step_rank": "time_step_rank",
        "ssm.inner_size": "intermediate_size",
    },
    quotients={"expand": ("ssm.inner_size", "embedding_length")},
    flags={"use_conv_bias": "ssm_conv1d.bias", "use_bias": "ssm_in.bias"}, config={"hidden_act": "silu"},
    norm="layer_norm_epsilon", implied={**_NO_ATTENTION, "ssm.dt_b_c_rms": (False,)},
)

FALCON_MAMBA: Final = replace(
    _MAMBA, model_type="falcon_mamba", class_name="FalconMambaForCausalLM",
    implied={**_NO_ATTENTION, "ssm.dt_b_c_rms": (True,)},
)
"""The variant of the architecture `mamba` that normalizes dt, B and C, which it computes from its inputs."""

RECURRENT: Final[Mapping[str, Architecture]] = {
    "qwen3next": replace(
        _DELTA_NET_EXPERTS, model_type="qwen3_next", class_name="Qwen3NextForCausalLM",
        modules={**_DELTA_NET_EXPERTS.modules, "ssm_ba": "linear_attn.in_proj_ba", "ssm_in": "linear_attn.in_proj_qkvz"},
        merges={
            **_DELTA_NET_EXPERTS.merges,
            "linear_attn.in_proj_qkvz.weight": Stack(("attn_qkv.weight", "attn_gate.weight"), _heads_apart),
        },
        rows={}, columns={},
        config={"hidden_act": "silu", "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []},
    ),
    "qwen35": _DELTA_NET, "qwen35moe": _DELTA_NET_EXPERTS, "lfm2": _SHORT_CONVOLUTION,
    "lfm2moe": replace(
        _SHORT_CONVOLUTION, model_type="lfm2_moe", class_name="Lfm2MoeForCausalLM",
        modules={
            **_SHORT_CONVOLUTION.modules, "ffn_gate_inp": "feed_forward.gate", "exp_probs_b.bias": "feed_forward.expert_bias",
            "ffn_gate_exps": "feed_forward.experts.{}.w1", "ffn_down_exps": "feed_forward.experts.{}.w2",
            "ffn_up_exps": "feed_forward.experts.{}.w3",
        },
        keys={**_SHORT_CONVOLUTION.keys, **EXPERT_KEYS, "leading_dense_block_count": "num_dense_layers"},
        flags={**_SHORT_CONVOLUTION.flags, "use_expert_bias": "exp_probs_b.bias"},
        config={"norm_topk_prob": True, "routed_scaling_factor": 1.0}, implied={"expert_gating_func": (SIGMOID,)},
    ),
    "granitehybrid": _GRANITE, "nemotron_h": _NEMOTRON, "nemotron_h_moe": _NEMOTRON, "falcon-h1": _FALCON, "mamba2": _MAMBA_2,
    "mamba": _MAMBA,
}
"""The rows, by the architecture's name in the file."""
