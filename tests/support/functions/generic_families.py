"""The families that transformers' modules run, each as a tiny model of its config class's defaults."""

from typing import Any, Final

from functions.stage.models.transformers.catalogue import known_families
from functions.stage.models.transformers.self_test import tiny_config

GENERIC: Final = [family.model_type for family in known_families() if family.runs == "generic"]
_ROPE: Final = {"rope_type": "default", "rope_theta": 10_000.0}
# What every checkpoint says and the defaults of the family's class leave open.
_SAID: Final[dict[str, dict[str, Any]]] = {
    "bamba": {"attn_layer_indices": [1, 3]},
    "granitemoehybrid": {"num_hidden_layers": 8, "layer_types": ["linear_attention", "full_attention"] * 4},
    "cohere_compass_text": {"rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE}},
    "dbrx": {
        "attn_config": {"rope_theta": 500_000.0, "kv_n_heads": 8, "clip_qkv": 8.0},
        "ffn_config": {"moe_num_experts": 4, "ffn_hidden_size": 64},
    },
    "deepseek_v2": {"n_routed_experts": 8, "num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 8, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "rwkv": {"rescale_every": 2},
    "zamba": {"num_hidden_layers": 6, "layers_block_type": ["linear_attention", "hybrid"] * 3},
    "zamba2": {"num_hidden_layers": 6, "layers_block_type": ["linear_attention", "hybrid"] * 3, "use_mem_rope": True},
    "hunyuan_v1_dense": {"head_dim": 128},
    "lfm2_moe": {"num_hidden_layers": 24, "layer_types": ["conv", "conv", "full_attention"] * 8},
    "hunyuan_v1_moe": {"head_dim": 128, "num_experts": 8, "moe_topk": 2},
}


def default_config(model_type: str) -> Any:
    """transformers' config of the family's tiny model."""
    return tiny_config({"model_type": model_type, **_SAID.get(model_type, {})})
