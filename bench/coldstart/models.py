"""The models that cold starts are measured with: a stage of 1 GiB made for it, and the packaged SmolLM2."""

import json
from pathlib import Path
from typing import Final

import torch
from safetensors.torch import save_file

from knative.spec.model_sources import DEFAULT_MODEL, packaged_model
from storage.models.model_repository import ModelManifest
from storage.models.publisher import publish
from storage.store.object_store import ObjectStore

LARGE_LAYERS: Final = 12
"""Of the shape of TinyLlama-1.1B, 84 MiB each in bfloat16: 1,008 MiB, one stage."""
_HIDDEN: Final = 2048
_INTERMEDIATE: Final = 5632
_KEYS: Final = 256
_VOCABULARY: Final = 256


def publish_large(store: ObjectStore, folder: Path) -> ModelManifest:
    """Random weights under the name `bench-large`; `folder` keeps the checkpoint, so that it is published once."""
    checkpoint = folder / "bench-large"
    if not (checkpoint / "config.json").exists():
        _write_checkpoint(checkpoint)
    return publish(checkpoint, store, "bench-large", "bfloat16")


def publish_smollm2(store: ObjectStore) -> ModelManifest:
    """SmolLM2-135M-Instruct in bfloat16, 257 MiB."""
    return publish(packaged_model(), store, DEFAULT_MODEL, "bfloat16")


def _write_checkpoint(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(1)
    tensors = {"model.embed_tokens.weight": _matrix(_VOCABULARY, _HIDDEN), "model.norm.weight": _matrix(_HIDDEN)}
    for layer in range(LARGE_LAYERS):
        tensors |= {f"model.layers.{layer}.{name}.weight": _matrix(*shape) for name, shape in _LAYER.items()}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(_CONFIG))
    (folder / "tokenizer.json").write_text("{}")


def _matrix(*shape: int) -> torch.Tensor:
    return torch.randn(*shape).mul_(0.02).to(torch.bfloat16)


_LAYER: Final = {
    "input_layernorm": (_HIDDEN,),
    "post_attention_layernorm": (_HIDDEN,),
    "self_attn.q_proj": (_HIDDEN, _HIDDEN),
    "self_attn.k_proj": (_KEYS, _HIDDEN),
    "self_attn.v_proj": (_KEYS, _HIDDEN),
    "self_attn.o_proj": (_HIDDEN, _HIDDEN),
    "mlp.gate_proj": (_INTERMEDIATE, _HIDDEN),
    "mlp.up_proj": (_INTERMEDIATE, _HIDDEN),
    "mlp.down_proj": (_HIDDEN, _INTERMEDIATE),
}
_CONFIG: Final = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": _HIDDEN,
    "intermediate_size": _INTERMEDIATE,
    "num_hidden_layers": LARGE_LAYERS,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "vocab_size": _VOCABULARY,
    "tie_word_embeddings": True,
}
