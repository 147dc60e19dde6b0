"""The architectures of GGUF files that are read, as a table: which model of transformers each is, and how its names translate.

Names and transformations are those of llama.cpp's converter (conversion/*.py); tests compare with what it writes.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final


@dataclass(frozen=True, slots=True)
class Architecture:
    """How a GGUF architecture becomes a checkpoint of transformers."""

    model_type: str
    class_name: str
    modules: Mapping[str, str] = field(default_factory=dict)  # tensors that have other names than in MODULES
    keys: Mapping[str, str] = field(default_factory=dict)  # further GGUF keys, without the architecture → config keys
    flags: Mapping[str, str] = field(default_factory=dict)  # config keys that are true if this tensor of layer 0 is there
    config: Mapping[str, Any] = field(default_factory=lambda: {"hidden_act": "silu"})  # values that the architecture implies
    norm: str = "rms_norm_eps"  # config key of the norms' epsilon
    permuted: bool = False  # rows of queries and keys are interleaved for llama.cpp's rotation
    norm_plus_one: bool = False  # norms are stored with one added
    partial_rotation: bool = False  # heads may be rotated in part
    sliding: bool = False  # attention.sliding_window is honoured


MODULES: Final[Mapping[str, str]] = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_NORMS_AFTER: Final = {"post_attention_norm": "post_attention_layernorm", "post_ffw_norm": "post_feedforward_layernorm"}
_NORMS_AROUND: Final = {**_NORMS_AFTER, "ffn_norm": "pre_feedforward_layernorm"}
_BIAS: Final = {"attention_bias": "attn_q.bias"}
_LLAMA_BIASES: Final = {**_BIAS, "mlp_bias": "ffn_down.bias"}
_GELU: Final = {"hidden_activation": "gelu_pytorch_tanh"}

ARCHITECTURES: Final[Mapping[str, Architecture]] = {
    "llama": Architecture("llama", "LlamaForCausalLM", flags=_LLAMA_BIASES, permuted=True),
    "qwen2": Architecture("qwen2", "Qwen2ForCausalLM", flags=_BIAS),
    "qwen3": Architecture("qwen3", "Qwen3ForCausalLM", flags=_BIAS),
    "qwen3moe": Architecture(
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        modules={
            "ffn_gate_inp": "mlp.gate",
            "ffn_gate_exps": "mlp.experts.{}.gate_proj",
            "ffn_up_exps": "mlp.experts.{}.up_proj",
            "ffn_down_exps": "mlp.experts.{}.down_proj",
        },
        keys={
            "expert_count": "num_experts",
            "expert_used_count": "num_experts_per_tok",
            "expert_feed_forward_length": "moe_intermediate_size",
        },
        flags=_BIAS,
        config={"hidden_act": "silu", "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []},
    ),
    "smollm3": Architecture("smollm3", "SmolLM3ForCausalLM", flags=_LLAMA_BIASES, permuted=True),
    "seed_oss": Architecture(
        "seed_oss",
        "SeedOssForCausalLM",
        modules={"post_attention_norm": "post_attention_layernorm"},
        flags={**_LLAMA_BIASES, "attention_out_bias": "attn_output.bias"},
    ),
    "gemma": Architecture("gemma", "GemmaForCausalLM", config=_GELU, norm_plus_one=True),
    "gemma2": Architecture(
        "gemma2",
        "Gemma2ForCausalLM",
        modules=_NORMS_AROUND,
        keys={"attn_logit_softcapping": "attn_logit_softcapping", "final_logit_softcapping": "final_logit_softcapping"},
        config=_GELU,
        norm_plus_one=True,
        sliding=True,
    ),
    "gemma3": Architecture(
        "gemma3_text",
        "Gemma3ForCausalLM",
        modules=_NORMS_AROUND,
        keys={"final_logit_softcapping": "final_logit_softcapping"},
        config=_GELU,
        norm_plus_one=True,
        sliding=True,
    ),
    "phi3": Architecture(
        "phi3",
        "Phi3ForCausalLM",
        modules={"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"},
        keys={"rope.scaling.original_context_length": "original_max_position_embeddings"},
        partial_rotation=True,
        sliding=True,
    ),
    "olmo2": Architecture("olmo2", "Olmo2ForCausalLM", modules=_NORMS_AFTER, flags=_BIAS, sliding=True),
    "exaone4": Architecture("exaone4", "Exaone4ForCausalLM", modules=_NORMS_AFTER, sliding=True),
    "granite": Architecture(
        "granite",
        "GraniteForCausalLM",
        keys={
            "attention.scale": "attention_multiplier",
            "embedding_scale": "embedding_multiplier",
            "residual_scale": "residual_multiplier",
            "logit_scale": "logits_scaling",
        },
        flags=_LLAMA_BIASES,
        permuted=True,
    ),
    "starcoder2": Architecture(
        "starcoder2",
        "Starcoder2ForCausalLM",
        modules={"ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"},
        flags={"use_bias": "attn_q.bias"},
        config={"hidden_act": "gelu_pytorch_tanh", "sliding_window": None},
        norm="norm_epsilon",
    ),
    "stablelm": Architecture(
        "stablelm",
        "StableLmForCausalLM",
        keys={"use_parallel_residual": "use_parallel_residual"},
        flags={"use_qkv_bias": "attn_q.bias"},
        norm="layer_norm_eps",
        partial_rotation=True,
    ),
    "command-r": Architecture(
        "cohere",
        "CohereForCausalLM",
        keys={"logit_scale": "logit_scale"},
        flags={**_BIAS, "use_qk_norm": "attn_q_norm.weight"},
        norm="layer_norm_eps",
    ),
    "nemotron": Architecture(
        "nemotron",
        "NemotronForCausalLM",
        flags=_LLAMA_BIASES,
        config={"hidden_act": "relu2"},
        norm="norm_eps",
        norm_plus_one=True,
        partial_rotation=True,
    ),
    "glm4": Architecture(
        "glm4",
        "Glm4ForCausalLM",
        modules={
            "ffn_up": "mlp.gate_up_proj",
            "post_attention_norm": "post_self_attn_layernorm",
            "post_ffw_norm": "post_mlp_layernorm",
        },
        flags=_BIAS,
        partial_rotation=True,
    ),
    "ernie4_5": Architecture("ernie4_5", "Ernie4_5ForCausalLM", flags={"use_bias": "attn_q.bias"}),
    "hunyuan-dense": Architecture(
        "hunyuan_v1_dense",
        "HunYuanDenseV1ForCausalLM",
        modules={"attn_q_norm": "self_attn.query_layernorm", "attn_k_norm": "self_attn.key_layernorm"},
        flags=_BIAS,
    ),
}

MIXTRAL: Final = Architecture(
    "mixtral",
    "MixtralForCausalLM",
    modules={
        "ffn_gate_inp": "block_sparse_moe.gate",
        "ffn_gate_exps": "block_sparse_moe.experts.{}.w1",
        "ffn_down_exps": "block_sparse_moe.experts.{}.w2",
        "ffn_up_exps": "block_sparse_moe.experts.{}.w3",
    },
    keys={"expert_count": "num_local_experts", "expert_used_count": "num_experts_per_tok"},
    config={"hidden_act": "silu", "sliding_window": None},
    permuted=True,
)
"""An architecture `llama` with experts."""

OLMO3: Final = Architecture("olmo3", "Olmo3ForCausalLM", modules=_NORMS_AFTER, flags=_BIAS, sliding=True)
"""An architecture `olmo2` with a sliding window."""
