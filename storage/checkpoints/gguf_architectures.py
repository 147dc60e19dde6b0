"""A table of the GGUF architectures that can be read: the class of each in transformers, and how its names translate.

Architectures with recurrent layers are in `gguf_recurrent`.

Names and transformations are those of llama.cpp's converter (conversion/*.py). Tests compare with the files that it writes.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Merge:
    """Says how a tensor of a layer is computed from tensors of the file.

    The file has it in several tensors, with other values, or with its dimensions in another order.
    """

    parts: tuple[str, ...]  # names in the file, without the layer
    join: Callable[..., NDArray[Any]]  # from the parts as arrays to the tensor


@dataclass(frozen=True, slots=True)
class Stack:
    """Says which tensors of the file contain the rows of one tensor of a layer."""

    parts: tuple[str, ...]  # names in the file, without the layer
    # Numbers of the rows in all parts one after another, from the config; None: in this order.
    order: Callable[[Mapping[str, Any]], NDArray[np.intp]] | None = None


SIZES: Final[Mapping[str, str]] = {
    "block_count": "num_hidden_layers", "embedding_length": "hidden_size", "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads", "attention.head_count_kv": "num_key_value_heads",
    "context_length": "max_position_embeddings",
}  # fmt: skip
"""GGUF keys that every file of a model with attention has, and their config keys."""


@dataclass(frozen=True, slots=True)
class Architecture:
    """Says how a GGUF file of one architecture is translated to a checkpoint of transformers."""

    model_type: str
    class_name: str
    # Modules with other names than in MODULES. A key with `.weight` or `.bias` names a whole tensor, and so does its value.
    # {} stands for the number of an expert. Between several names is a |: the rows of each expert are those of all of them.
    modules: Mapping[str, str] = field(default_factory=dict)
    layers: str = "model.layers"  # what holds the layers
    # Tensors of a layer that are several in the file, or have other values or another order of dimensions there.
    merges: Mapping[str, Merge | Stack] = field(default_factory=dict)
    # Tensors of a layer with another order of rows (or columns) in the file → numbers there, from the config.
    rows: Mapping[str, Callable[[Mapping[str, Any]], NDArray[np.intp]]] = field(default_factory=dict)
    columns: Mapping[str, Callable[[Mapping[str, Any]], NDArray[np.intp]]] = field(default_factory=dict)
    # Lists in the metadata with a number for each layer → tensors of a layer with that number, and their shapes.
    numbers: Mapping[str, tuple[str, tuple[int, ...]]] = field(default_factory=dict)
    keys: Mapping[str, str] = field(default_factory=dict)  # further GGUF keys, without the architecture → config keys
    sizes: Mapping[str, str] = field(default_factory=lambda: SIZES)  # GGUF keys that every file has → config keys
    own_names: Mapping[str, str] = field(default_factory=dict)  # config keys of `sizes` → the family's names for them
    quotients: Mapping[str, tuple[str, str]] = field(default_factory=dict)  # config key → two GGUF keys whose quotient it is
    layer_types: Mapping[str, str] = field(default_factory=dict)  # tensor that only layers of a type have → that type
    layer_types_key: str = "layer_types"  # config key of the list of types
    flags: Mapping[str, str] = field(default_factory=dict)  # config keys that are true if a layer has this tensor
    config: Mapping[str, Any] = field(default_factory=lambda: {"hidden_act": "silu"})  # values that the architecture implies
    norm: str = "rms_norm_eps"  # config key of the norms' epsilon
    permuted: bool = False  # rows of queries and keys are interleaved for llama.cpp's rotation
    norm_plus_one: bool = False  # norms are stored with one added
    grouped_qkv: bool = False  # attn_qkv has queries, key and value of each KV head; the file has all queries first
    partial_rotation: bool = False  # heads may be rotated in part
    implied: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)  # GGUF keys → the values that they may have
    ignored: tuple[str, ...] = ()  # GGUF keys that say nothing about this model
    sliding: bool = False  # attention.sliding_window is honoured
    unsaid: str | None = None  # what the converter does not write, and the file's model may have had


def _keys_and_values(keys: NDArray[Any], values: NDArray[Any]) -> NDArray[Any]:
    """Joins keys [heads, rank, key width] and values [heads, value width, rank] to the matrix kv_b_proj."""
    return np.concatenate((keys.swapaxes(1, 2), values), axis=1).reshape(-1, values.shape[2])


# Tables, in which a row takes few lines: ruff would give each field a line of its own.
# fmt: off
MODULES: Final[Mapping[str, str]] = {
    "token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head", "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm", "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}
_NORMS_AFTER: Final = {"post_attention_norm": "post_attention_layernorm", "post_ffw_norm": "post_feedforward_layernorm"}
_NORMS_AROUND: Final = {**_NORMS_AFTER, "ffn_norm": "pre_feedforward_layernorm"}
BIAS: Final = {"attention_bias": "attn_q.bias"}
_LLAMA_BIASES: Final = {**BIAS, "mlp_bias": "ffn_down.bias"}
_GELU: Final = {"hidden_activation": "gelu_pytorch_tanh"}
EXPERTS: Final = {
    "ffn_gate_inp": "mlp.gate", "ffn_gate_exps": "mlp.experts.{}.gate_proj", "ffn_up_exps": "mlp.experts.{}.up_proj",
    "ffn_down_exps": "mlp.experts.{}.down_proj",
}
EXPERTS_WITH_SHARED: Final = {
    **EXPERTS, **{f"ffn_{name}_shexp": f"mlp.shared_expert.{name}_proj" for name in ("gate", "up", "down")},
}
SHARED_GATE: Final[Mapping[str, Merge | Stack]] = {
    "mlp.shared_expert_gate.weight": Merge(("ffn_gate_inp_shexp.weight",), np.atleast_2d),
}
_SHARED_EXPERTS: Final = {f"ffn_{name}_shexp": f"mlp.shared_experts.{name}_proj" for name in ("gate", "up", "down")} | {
    "exp_probs_b.bias": "mlp.gate.e_score_correction_bias",
}
EXPERT_KEYS: Final = {
    "expert_count": "num_experts", "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
}
EXPERT_KEYS_WITH_SHARED: Final = {**EXPERT_KEYS, "expert_shared_feed_forward_length": "shared_expert_intermediate_size"}
_ROUTED_KEYS: Final = {
    "expert_count": "n_routed_experts", "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size", "expert_shared_count": "n_shared_experts",
    "expert_group_count": "n_group", "expert_group_used_count": "topk_group", "expert_weights_scale": "routed_scaling_factor",
    "expert_weights_norm": "norm_topk_prob", "leading_dense_block_count": "first_k_dense_replace",
}
SOFTMAX, SIGMOID = 1, 2  # values of expert_gating_func
_LAYER_INPUTS: Final = {
    "per_layer_token_embd": "model.embed_tokens_per_layer", "per_layer_model_proj": "model.per_layer_model_projection",
    "per_layer_proj_norm": "model.per_layer_projection_norm", "inp_gate": "per_layer_input_gate",
    "proj": "per_layer_projection", "post_norm": "post_per_layer_input_norm",
}
_LAYER_INPUT_KEYS: Final = {
    "final_logit_softcapping": "final_logit_softcapping", "attention.shared_kv_layers": "num_kv_shared_layers",
    "embedding_length_per_layer_input": "hidden_size_per_layer_input",
}
GRANITE_KEYS: Final = {
    "attention.scale": "attention_multiplier", "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier", "logit_scale": "logits_scaling",
}
_LATENT: Final = {
    "attn_q_a": "self_attn.q_a_proj", "attn_q_a_norm": "self_attn.q_a_layernorm", "attn_q_b": "self_attn.q_b_proj",
    "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa", "attn_kv_a_norm": "self_attn.kv_a_layernorm",
    "attn_kv_b": "self_attn.kv_b_proj",  # of files of before 2025-04; later ones have it in two
    **EXPERTS, **_SHARED_EXPERTS,
}
_GPT2_MATRICES: Final = {
    "attn_qkv": "attn.c_attn", "attn_output": "attn.c_proj", "ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj",
}
_LATENT_MERGES: Final = {"self_attn.kv_b_proj.weight": Merge(("attn_k_b.weight", "attn_v_b.weight"), _keys_and_values)}
SHARED_IN_GRANITE: Final[Mapping[str, Merge | Stack]] = {
    "shared_mlp.input_linear.weight": Stack(("ffn_gate_shexp.weight", "ffn_up_shexp.weight")),
}
GRANITE_EXPERTS: Final = {
    **{key: name.replace("mlp.", "block_sparse_moe.", 1) for key, name in EXPERTS.items()},
    "ffn_gate_inp": "block_sparse_moe.router.layer", "ffn_down_shexp": "shared_mlp.output_linear",
}
ATTENTION: Final[Mapping[str, Architecture]] = {
    "llama": Architecture("llama", "LlamaForCausalLM", flags=_LLAMA_BIASES, permuted=True),
    "qwen2": Architecture("qwen2", "Qwen2ForCausalLM", flags=BIAS),
    "qwen3": Architecture("qwen3", "Qwen3ForCausalLM", flags=BIAS),
    "qwen2moe": Architecture(
        "qwen2_moe", "Qwen2MoeForCausalLM", modules=EXPERTS_WITH_SHARED, merges=SHARED_GATE, keys=EXPERT_KEYS_WITH_SHARED,
        config={"hidden_act": "silu", "norm_topk_prob": False, "decoder_sparse_step": 1, "mlp_only_layers": []},
    ),
    "qwen3moe": Architecture(
        "qwen3_moe", "Qwen3MoeForCausalLM", modules=EXPERTS, keys=EXPERT_KEYS, flags=BIAS,
        config={"hidden_act": "silu", "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []},
    ),
    "mistral3": Architecture("ministral3", "Ministral3ForCausalLM", permuted=True),
    "arcee": Architecture("arcee", "ArceeForCausalLM", flags=_LLAMA_BIASES, config={"hidden_act": "relu2"}, permuted=True),
    "smollm3": Architecture("smollm3", "SmolLM3ForCausalLM", flags=_LLAMA_BIASES, permuted=True),
    "seed_oss": Architecture(
        "seed_oss", "SeedOssForCausalLM", modules={"post_attention_norm": "post_attention_layernorm"},
        flags={**_LLAMA_BIASES, "attention_out_bias": "attn_output.bias"},
    ),
    "gemma": Architecture("gemma", "GemmaForCausalLM", config=_GELU, norm_plus_one=True),
    "gemma2": Architecture(
        "gemma2", "Gemma2ForCausalLM", modules=_NORMS_AROUND,
        keys={"attn_logit_softcapping": "attn_logit_softcapping", "final_logit_softcapping": "final_logit_softcapping"},
        config=_GELU, norm_plus_one=True, sliding=True,
    ),
    "gemma3": Architecture(
        "gemma3_text", "Gemma3ForCausalLM", modules=_NORMS_AROUND, keys={"final_logit_softcapping": "final_logit_softcapping"},
        config=_GELU, norm_plus_one=True, sliding=True,
    ),
    "gemma3n": Architecture(
        "gemma3n_text", "Gemma3nForCausalLM",
        modules={
            **_NORMS_AROUND, **_LAYER_INPUTS, "altup_proj": "model.altup_projections.{}",
            "altup_unembd_proj": "model.altup_unembed_projections.{}", "altup_router": "altup.modality_router",
            "altup_router_norm": "altup.router_norm", "altup_predict_coef": "altup.prediction_coefs",
            "altup_correct_coef": "altup.correction_coefs", "altup_correct_scale.weight": "altup.correct_output_scale",
            "laurel_l": "laurel.linear_left", "laurel_r": "laurel.linear_right", "laurel_post_norm": "laurel.post_laurel_norm",
        },
        keys={**_LAYER_INPUT_KEYS, "altup.num_inputs": "altup_num_inputs"},
        sizes={key: name for key, name in SIZES.items() if key != "feed_forward_length"},  # each layer has its own
        config=_GELU, sliding=True, implied={"altup.active_idx": (0,)},
    ),
    "gemma4": Architecture(
        "gemma4_text", "Gemma4ForCausalLM",
        modules={
            **_NORMS_AROUND, **_LAYER_INPUTS, "layer_output_scale.weight": "layer_scalar", "ffn_gate_inp": "router.proj",
            "ffn_gate_inp.scale.weight": "router.scale",
            "ffn_gate_up_exps.weight": "experts.{}.gate_proj.weight|experts.{}.up_proj.weight",
            "ffn_down_exps": "experts.{}.down_proj", "ffn_down_exps.scale.weight": "router.per_expert_scale",
            "pre_ffw_norm_2": "pre_feedforward_layernorm_2", "post_ffw_norm_1": "post_feedforward_layernorm_1",
            "post_ffw_norm_2": "post_feedforward_layernorm_2",
        },
        keys={
            **_LAYER_INPUT_KEYS, "expert_count": "num_experts", "expert_used_count": "top_k_experts",
            "expert_feed_forward_length": "moe_intermediate_size",
        },
        # Layers have their own sizes of feed-forwards, and numbers of KV heads.
        sizes={key: name for key, name in SIZES.items() if key not in ("feed_forward_length", "attention.head_count_kv")},
        flags={"enable_moe_block": "ffn_gate_up_exps.weight"}, config=_GELU, sliding=True,
    ),
    "phi2": Architecture(
        "phi", "PhiForCausalLM",
        modules={
            "output_norm": "model.final_layernorm", "attn_output": "self_attn.dense", "ffn_up": "mlp.fc1",
            "ffn_down": "mlp.fc2",
        },
        config={"hidden_act": "gelu_new", "qk_layernorm": False}, norm="layer_norm_eps", partial_rotation=True,
    ),
    "phi3": Architecture(
        "phi3", "Phi3ForCausalLM", modules={"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"},
        keys={"rope.scaling.original_context_length": "original_max_position_embeddings"}, partial_rotation=True, sliding=True,
    ),
    "olmo2": Architecture("olmo2", "Olmo2ForCausalLM", modules=_NORMS_AFTER, flags=BIAS, sliding=True),
    "olmo": Architecture(
        "olmo", "OlmoForCausalLM", keys={"attention.clamp_kqv": "clip_qkv"}, norm="layer_norm_eps", permuted=True,
    ),
    "olmoe": Architecture(
        "olmoe", "OlmoeForCausalLM", modules=EXPERTS,
        keys={"expert_count": "num_experts", "expert_used_count": "num_experts_per_tok"},
        config={"hidden_act": "silu", "norm_topk_prob": False},
    ),
    "exaone4": Architecture("exaone4", "Exaone4ForCausalLM", modules=_NORMS_AFTER, sliding=True),
    "granite": Architecture("granite", "GraniteForCausalLM", keys=GRANITE_KEYS, flags=_LLAMA_BIASES, permuted=True),
    "granitemoe": Architecture(
        "granitemoe", "GraniteMoeForCausalLM", modules=GRANITE_EXPERTS, merges=SHARED_IN_GRANITE,
        keys={
            **GRANITE_KEYS, "expert_count": "num_local_experts", "expert_used_count": "num_experts_per_tok",
            "expert_shared_feed_forward_length": "shared_intermediate_size",
        },
        flags=BIAS, permuted=True,
    ),
    "starcoder2": Architecture(
        "starcoder2", "Starcoder2ForCausalLM", modules={"ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"},
        flags={"use_bias": "attn_q.bias"}, config={"hidden_act": "gelu_pytorch_tanh"}, norm="norm_epsilon", sliding=True,
        unsaid="a sliding window: attention reads all tokens, as in llama.cpp",
    ),
    "stablelm": Architecture(
        "stablelm", "StableLmForCausalLM", keys={"use_parallel_residual": "use_parallel_residual"},
        flags={"use_qkv_bias": "attn_q.bias"}, norm="layer_norm_eps", partial_rotation=True,
    ),
    "command-r": Architecture(
        "cohere", "CohereForCausalLM", keys={"logit_scale": "logit_scale"}, flags={**BIAS, "use_qk_norm": "attn_q_norm.weight"},
        norm="layer_norm_eps",
    ),
    "cohere2": Architecture(
        "cohere2", "Cohere2ForCausalLM", keys={"logit_scale": "logit_scale"}, flags=BIAS, norm="layer_norm_eps", sliding=True,
    ),
    "nemotron": Architecture(
        "nemotron", "NemotronForCausalLM", flags=_LLAMA_BIASES, config={"hidden_act": "relu2"}, norm="norm_eps",
        norm_plus_one=True, partial_rotation=True,
    ),
    "glm4": Architecture(
        "glm4", "Glm4ForCausalLM",
        modules={
            "ffn_up": "mlp.gate_up_proj", "post_attention_norm": "post_self_attn_layernorm",
            "post_ffw_norm": "post_mlp_layernorm",
        },
        flags=BIAS, partial_rotation=True,
    ),
    "chatglm": Architecture("glm", "GlmForCausalLM", modules={"ffn_up": "mlp.gate_up_proj"}, flags=BIAS, partial_rotation=True),
    "glm4moe": Architecture(
        "glm4_moe", "Glm4MoeForCausalLM",
        modules={"post_attention_norm": "post_attention_layernorm", **EXPERTS, **_SHARED_EXPERTS}, keys=_ROUTED_KEYS,
        flags={**BIAS, "use_qk_norm": "attn_q_norm.weight"}, partial_rotation=True, implied={"expert_gating_func": (SIGMOID,)},
    ),
    "deepseek2": Architecture(
        "deepseek_v2", "DeepseekV2ForCausalLM", modules=_LATENT, merges=_LATENT_MERGES,
        keys={key: name for key, name in _ROUTED_KEYS.items() if key != "expert_weights_norm"},
        implied={"expert_gating_func": (SOFTMAX,), "expert_weights_norm": (False,)},
    ),
    "gpt-oss": Architecture(
        "gpt_oss", "GptOssForCausalLM",
        modules={
            "post_attention_norm": "post_attention_layernorm", "attn_sinks.weight": "self_attn.sinks", **EXPERTS,
            "ffn_gate_inp": "mlp.router",
        },
        keys={
            "expert_count": "num_local_experts", "expert_used_count": "num_experts_per_tok",
            "expert_feed_forward_length": "intermediate_size",
        },
        config={"hidden_act": "silu", "attention_bias": True}, sliding=True,
    ),
    "falcon": Architecture(
        "falcon", "FalconForCausalLM",
        modules={
            "token_embd": "transformer.word_embeddings", "output_norm": "transformer.ln_f", "attn_norm": "input_layernorm",
            "attn_qkv": "self_attention.query_key_value", "attn_output": "self_attention.dense", "ffn_up": "mlp.dense_h_to_4h",
            "ffn_down": "mlp.dense_4h_to_h",
        },
        layers="transformer.h", keys={"feed_forward_length": "ffn_hidden_size"},
        config={"activation": "gelu", "alibi": False, "bias": False, "multi_query": True, "parallel_attn": True},
        norm="layer_norm_epsilon", grouped_qkv=True, implied={"tensor_data_layout": ("jploski",)},
    ),
    "gptneox": Architecture(
        "gpt_neox", "GPTNeoXForCausalLM",
        modules={
            "token_embd": "gpt_neox.embed_in", "output_norm": "gpt_neox.final_layer_norm", "output": "embed_out",
            "attn_qkv": "attention.query_key_value", "attn_output": "attention.dense", "ffn_up": "mlp.dense_h_to_4h",
            "ffn_down": "mlp.dense_4h_to_h",
        },
        layers="gpt_neox.layers", keys={"use_parallel_residual": "use_parallel_residual"}, config={"hidden_act": "gelu"},
        norm="layer_norm_eps", grouped_qkv=True, partial_rotation=True,
    ),
    "gpt2": Architecture(
        "gpt2", "GPT2LMHeadModel",
        modules={
            "token_embd": "transformer.wte", "position_embd": "transformer.wpe", "output_norm": "transformer.ln_f",
            "attn_norm": "ln_1", "ffn_norm": "ln_2",
            **{f"{name}.bias": f"{module}.bias" for name, module in _GPT2_MATRICES.items()},
        },
        layers="transformer.h",
        merges={f"{module}.weight": Merge((f"{name}.weight",), np.transpose) for name, module in _GPT2_MATRICES.items()},
        own_names={
            "num_hidden_layers": "n_layer", "hidden_size": "n_embd", "intermediate_size": "n_inner",
            "num_attention_heads": "n_head", "max_position_embeddings": "n_positions",
        },
        config={"activation_function": "gelu_new"}, norm="layer_norm_epsilon",
    ),
    "apertus": Architecture(
        "apertus", "ApertusForCausalLM", modules={"attn_norm": "attention_layernorm", "ffn_norm": "feedforward_layernorm"},
        numbers={
            "xielu.alpha_n": ("mlp.act_fn.alpha_n", (1,)), "xielu.alpha_p": ("mlp.act_fn.alpha_p", (1,)),
            "xielu.beta": ("mlp.act_fn.beta", ()), "xielu.eps": ("mlp.act_fn.eps", ()),
        },
        flags=BIAS, config={"hidden_act": "xielu"},
    ),
    "ernie4_5": Architecture("ernie4_5", "Ernie4_5ForCausalLM", flags={"use_bias": "attn_q.bias"}),
    "hunyuan-dense": Architecture(
        "hunyuan_v1_dense", "HunYuanDenseV1ForCausalLM",
        modules={"attn_q_norm": "self_attn.query_layernorm", "attn_k_norm": "self_attn.key_layernorm"}, flags=BIAS,
    ),
}
MIXTRAL: Final = Architecture(
    "mixtral", "MixtralForCausalLM",
    modules={
        "ffn_gate_inp": "block_sparse_moe.gate", "ffn_gate_exps": "block_sparse_moe.experts.{}.w1",
        "ffn_down_exps": "block_sparse_moe.experts.{}.w2", "ffn_up_exps": "block_sparse_moe.experts.{}.w3",
    },
    keys={"expert_count": "num_local_experts", "expert_used_count": "num_experts_per_tok"},
    config={"hidden_act": "silu", "sliding_window": None}, permuted=True,
)
"""The variant of the architecture `llama` with experts."""
OLMO3: Final = Architecture("olmo3", "Olmo3ForCausalLM", modules=_NORMS_AFTER, flags=BIAS, sliding=True)
"""The variant of the architecture `olmo2` with a sliding window."""
MISTRAL: Final = Architecture("mistral", "MistralForCausalLM", permuted=True, sliding=True)
"""The variant of the architecture `llama` with a sliding window, and of `mistral3` without scaled queries."""
GRANITE_SHARED: Final = replace(
    ATTENTION["granitemoe"], model_type="granitemoeshared", class_name="GraniteMoeSharedForCausalLM",
)
"""The variant of the architecture `granitemoe` with a shared expert."""
DEEPSEEK3: Final = Architecture(
    "deepseek_v3", "DeepseekV3ForCausalLM", modules=_LATENT, merges=_LATENT_MERGES, keys=_ROUTED_KEYS,
    implied={"expert_gating_func": (SIGMOID,)},
)
"""The variant of the architecture `deepseek2` whose router is a sigmoid with a bias."""
FALCON_GROUPED: Final = replace(
    ATTENTION["falcon"], modules={**ATTENTION["falcon"].modules, "attn_norm": "ln_mlp", "attn_norm_2": "ln_attn"},
)
"""The variant of the architecture `falcon` that has separate norms for attention and feed-forward."""
