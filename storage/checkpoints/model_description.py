"""What a manifest says about a model's shape, from its config.json, through transformers' own configuration classes.

They know every family's names and defaults (n_layer, tie_word_embeddings, head_dim …). Nothing of a checkpoint is run.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from storage.errors import ArchitectureUnsupported

_UNLIMITED_CONTEXT_TOKENS: Final = 2048
"""Where a family without learned or rotary positions (BLOOM) names no limit: its training length."""


@dataclass(frozen=True, slots=True)
class ModelDescription:
    """The shape of a decoder."""

    architecture: str
    model_type: str
    num_layers: int
    ignored_layers: int
    """Layers behind the last that checkpoints may carry for multi-token prediction and that the decoder does not run."""
    hidden_size: int
    vocab_size: int
    num_kv_heads: int
    head_dim: int
    context_length: int
    tied: bool


def describe_model(config: Mapping[str, Any]) -> ModelDescription:
    """`config` is a parsed config.json. Raises ArchitectureUnsupported."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING  # 0.6 s, which only a real publication pays

    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        raise ArchitectureUnsupported(
            f"config.json has model_type {model_type!r}, which transformers does not know; no code of the checkpoint is run"
        )
    try:
        known = CONFIG_MAPPING[model_type].from_dict(dict(config))
    except (StrictDataclassError, ValueError, TypeError) as error:
        raise ArchitectureUnsupported(f"config.json is not what a {model_type!r} has: {error}") from error
    missing = [
        name for name in ("num_hidden_layers", "hidden_size", "vocab_size", "num_attention_heads") if not hasattr(known, name)
    ]
    if missing or known.is_encoder_decoder:
        raise ArchitectureUnsupported(
            f"{model_type!r} is no decoder-only language model: its configuration lacks {missing or 'nothing but a decoder'}"
        )
    architectures = config.get("architectures") or [""]
    return ModelDescription(
        architecture=architectures[0],
        model_type=model_type,
        num_layers=known.num_hidden_layers,
        ignored_layers=getattr(known, "num_nextn_predict_layers", None) or 0,
        hidden_size=known.hidden_size,
        vocab_size=known.vocab_size,
        num_kv_heads=_num_kv_heads(known),
        head_dim=getattr(known, "head_dim", None) or known.hidden_size // known.num_attention_heads,
        context_length=getattr(known, "max_position_embeddings", None)
        or getattr(known, "seq_length", None)
        or _UNLIMITED_CONTEXT_TOKENS,
        tied=bool(getattr(known, "tie_word_embeddings", False)),
    )


def _num_kv_heads(config: Any) -> int:
    # Falcon's num_kv_heads counts only in its newer layout; the older one has a flag.
    if getattr(config, "multi_query", False) and not getattr(config, "new_decoder_architecture", False):
        return 1
    heads: int = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return heads
