"""Describes a model's shape for its manifest, from its config.json.

`decoder_config` describes the families that Lamina's own layers run. For other families, transformers' configuration classes
supply names and defaults (n_layer, tie_word_embeddings, head_dim …). No code of a checkpoint is run.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from storage.checkpoints.decoder import NO_ATTENTION, Decoder
from storage.checkpoints.decoder_config import decoder_of
from storage.checkpoints.decoder_families import DECODER_FAMILIES, UnsupportedConfig
from storage.checkpoints.families import RECURRENT_ONLY, layers_key, with_floats
from storage.errors import ArchitectureUnsupported, LibraryMissing

_ALIBI_CONTEXT_TOKENS: Final = 2048  # training length of BLOOM, whose positions have no limit
_FURTHER_LAYERS: Final = "num_nextn_predict_layers"
RECURRENT_CONTEXT_TOKENS: Final = 2**20  # of models without attention, whose configs state no limit: their memory does not grow


@dataclass(frozen=True, slots=True)
class ModelDescription:
    """The shape of a decoder-only model: the fields of its manifest, and a few that only publishing needs."""

    architecture: str
    model_type: str
    num_layers: int
    ignored_layers: int  # extra layers in the checkpoint, for multi-token prediction, that the decoder does not run
    hidden_size: int
    vocab_size: int
    num_kv_heads: int
    head_dim: int
    context_length: int
    tied: bool
    has_head: bool = True  # it makes logits
    vector_tensors: frozenset[str] = frozenset()  # of an embedder, beside those of the layers
    unused_tensors: frozenset[str] = frozenset()  # that checkpoints have and layers do not: keys of layers that read others' KV
    has_layer_inputs: bool = False  # every stage needs the object `embedding`


def describe_model(config: Mapping[str, Any]) -> ModelDescription:
    """Describes the shape of the model with this parsed config.json.

    Raises ArchitectureUnsupported. Raises LibraryMissing for a family outside the table if transformers is not installed.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise ArchitectureUnsupported(f"config.json has model_type {model_type!r}, which is no name")
    try:
        model = decoder_of(config)
    except UnsupportedConfig:
        return describe_by_transformers(config, model_type)
    family = DECODER_FAMILIES.get(model_type)
    return ModelDescription(
        architecture=_architecture(config),
        model_type=model_type,
        num_layers=model.num_layers,
        ignored_layers=config.get(_FURTHER_LAYERS, family.defaults.get(_FURTHER_LAYERS) if family else None) or 0,
        hidden_size=model.hidden_size,
        vocab_size=model.vocab_size,
        num_kv_heads=model.attention.num_kv_heads,
        head_dim=model.attention.head_dim,
        context_length=model.max_positions,
        tied=model.tied,
        has_head=model.has_head,
        unused_tensors=frozenset(_unused(model)),
        has_layer_inputs=model.layer_input is not None,
    )


def _unused(model: Decoder) -> Iterator[str]:
    for number, layer in enumerate(model.layers):
        if layer.attention is not None and layer.attention.kv_layer is not None:
            for name in (*model.names.qkv[1:], model.names.key_norm):
                yield f"{model.names.layers}.{number}.{name}.weight"


def describe_by_transformers(config: Mapping[str, Any], model_type: str) -> ModelDescription:
    try:
        from huggingface_hub.errors import StrictDataclassError
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING  # 0.6 s, which only a real publication pays
    except ImportError as error:
        raise LibraryMissing(f"publishing a {model_type!r} takes transformers", error) from error
    if model_type not in CONFIG_MAPPING:
        raise ArchitectureUnsupported(
            f"config.json has model_type {model_type!r}, which transformers does not know; no code of the checkpoint is run"
        )
    try:
        known = CONFIG_MAPPING[model_type].from_dict(with_floats(config))
    except (StrictDataclassError, ValueError, TypeError) as error:
        raise ArchitectureUnsupported(f"config.json is not what a {model_type!r} has: {error}") from error
    known.allow_global_per_layer_attribute_access = True
    kinds = set(getattr(known, "layer_types", None) or ())
    has_attention = kinds != {"linear_attention"} and model_type not in RECURRENT_ONLY
    wanted = [layers_key(model_type), "hidden_size", "vocab_size", *(["num_attention_heads"] if has_attention else [])]
    missing = [name for name in wanted if not hasattr(known, name)]
    if missing and isinstance(config.get("text_config"), Mapping):
        raise ArchitectureUnsupported(
            f"{model_type!r} also sees or hears: publish its language model alone, by push --text-only"
        )
    if missing or known.is_encoder_decoder:
        why = f"its configuration lacks {', '.join(missing)}" if missing else "it has an encoder"
        raise ArchitectureUnsupported(f"model_type {model_type!r} is not supported: it is no decoder-only text model, {why}")
    # Falcon's num_kv_heads counts only in its newer layout; the older one has a flag.
    is_multi_query = getattr(known, "multi_query", False) and not getattr(known, "new_decoder_architecture", False)
    latent = getattr(known, "kv_lora_rank", None) if hasattr(known, "qk_rope_head_dim") else None  # KV is one of a token
    heads = known.num_attention_heads if has_attention else 1
    kv_heads = 1 if is_multi_query or not has_attention else getattr(known, "num_key_value_heads", None) or heads
    head_dim = (getattr(known, "head_dim", None) or known.hidden_size // heads) if has_attention else NO_ATTENTION.head_dim
    if latent:
        kv_heads, head_dim = 1, latent + known.qk_rope_head_dim
    return ModelDescription(
        architecture=_architecture(config),
        model_type=model_type,
        num_layers=getattr(known, layers_key(model_type)),
        ignored_layers=getattr(known, _FURTHER_LAYERS, None) or 0,
        hidden_size=known.hidden_size,
        vocab_size=known.vocab_size,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        context_length=getattr(known, "max_position_embeddings", None)
        or getattr(known, "seq_length", None)
        or (_ALIBI_CONTEXT_TOKENS if has_attention else RECURRENT_CONTEXT_TOKENS),
        tied=bool(getattr(known, "tie_word_embeddings", False)),
    )


def _architecture(config: Mapping[str, Any]) -> str:
    architectures: list[str] = config.get("architectures") or [""]
    return architectures[0]
