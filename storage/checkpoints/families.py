"""The model families that a stage can run, and how transformers' modules of each are sliced. Imports no heavy library.

A family is a `model_type` of a checkpoint's config.json. The transformers group runs all of them;
`decoder_families` has those that run in C. Some families do more before and after their layers than embed and
normalize: for example, the first stage may add position embeddings. `cut_config` handles what depends on a layer's number.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from storage.errors import ArchitectureUnsupported


@dataclass(frozen=True, slots=True)
class Family:
    """What a family's model has before and after its layers. Strings name attributes of the module that holds the layers."""

    layers: str = "layers"  # the list of layers
    before: tuple[str, ...] = ("embed_tokens",)  # applied before the layers by the first stage, embedding first
    added_before: tuple[str, ...] = ()  # position embeddings, whose output the first stage adds to the embedding
    after: tuple[str, ...] = ("norm",)  # applied after the layers by the last stage
    # Config values that act on the input → the value that does nothing, which all stages but the first get.
    neutral_unless_first: Mapping[str, float] = field(default_factory=dict)
    attention: str | None = None  # attention implementation, if transformers' own choice would compute something else


_PLAIN: Final = Family()

FAMILIES: Final[dict[str, Family]] = {
    "apertus": _PLAIN,
    "bamba": Family(after=("final_layernorm",)),
    "bloom": Family(before=("word_embeddings", "word_embeddings_layernorm"), after=("ln_f",), layers="h"),
    "cohere": _PLAIN,
    "cohere2": _PLAIN,
    "deepseek_v3": _PLAIN,
    "ernie4_5": _PLAIN,
    "exaone4": _PLAIN,
    "falcon": Family(before=("word_embeddings",), after=("ln_f",), layers="h"),
    "falcon_h1": Family(after=("final_layernorm",), neutral_unless_first={"embedding_multiplier": 1.0}),
    "falcon_mamba": Family(before=("embeddings",), after=("norm_f",)),
    "gemma": _PLAIN,
    # SDPA has no soft cap on attention scores, and would silently drop it.
    "gemma2": Family(attention="eager"),
    "gemma3_text": _PLAIN,
    "glm4": _PLAIN,
    "gpt2": Family(before=("wte",), added_before=("wpe",), after=("ln_f",), layers="h"),
    "gpt_neox": Family(before=("embed_in",), after=("final_layer_norm",)),
    "gpt_oss": _PLAIN,
    "gptj": Family(before=("wte",), after=("ln_f",), layers="h"),
    "granite": Family(neutral_unless_first={"embedding_multiplier": 1.0}),
    "granitemoehybrid": Family(neutral_unless_first={"embedding_multiplier": 1.0}),
    "hunyuan_v1_dense": _PLAIN,
    "jamba": Family(after=("final_layernorm",)),
    "lfm2": Family(after=("embedding_norm",)),
    "lfm2_moe": Family(after=("embedding_norm",)),
    "llama": _PLAIN,
    "mamba": Family(before=("embeddings",), after=("norm_f",)),
    "mamba2": Family(before=("embeddings",), after=("norm_f",)),
    "ministral": _PLAIN,
    "ministral3": _PLAIN,
    "mistral": _PLAIN,
    "mixtral": _PLAIN,
    "nemotron": _PLAIN,
    "nemotron_h": Family(before=("embeddings",), after=("norm_f",)),
    "olmo2": _PLAIN,
    "olmo3": _PLAIN,
    "olmo_hybrid": _PLAIN,
    "opt": Family(
        before=("embed_tokens", "project_in"),
        added_before=("embed_positions",),
        after=("final_layer_norm", "project_out"),
    ),
    "phi": Family(after=("final_layernorm",)),
    "phi3": _PLAIN,
    "qwen2": _PLAIN,
    "qwen3": _PLAIN,
    "qwen3_5_moe_text": _PLAIN,
    "qwen3_5_text": _PLAIN,
    "qwen3_moe": _PLAIN,
    "qwen3_next": _PLAIN,
    "seed_oss": _PLAIN,
    "smollm3": _PLAIN,
    "stablelm": _PLAIN,
    "starcoder2": _PLAIN,
}

_LIST_PER_LAYER: Final = ("layer_types", "no_rope_layers")
# Families whose configs compute each layer's type from its number.
_TYPES_BY_NUMBER: Final = frozenset({"bamba", "falcon_h1", "falcon_mamba", "jamba", "mamba", "mamba2"})


def family_of(config: Mapping[str, Any]) -> Family:
    """The family of a config.json. Raises ArchitectureUnsupported if no stage runs its `model_type`."""
    model_type = str(config.get("model_type", ""))
    try:
        return FAMILIES[model_type]
    except KeyError:
        raise ArchitectureUnsupported(
            f"model_type {model_type!r} is not supported; supported are {', '.join(sorted(FAMILIES))}"
        ) from None


def with_floats(value: Any) -> Any:
    """A part of a config.json with the numbers that JSON lacks, for example {"__float__": "Infinity"}, as floats."""
    if isinstance(value, Mapping):
        if value.keys() == {"__float__"}:
            return float(value["__float__"])
        return {name: with_floats(part) for name, part in value.items()}
    return [with_floats(part) for part in value] if isinstance(value, list) else value


def mixes_longrope(module: object) -> bool:
    """Whether a transformers module uses LongRoPE for a kind of layers by name, which no stage can run."""
    rope_type = getattr(module, "rope_type", None)
    return isinstance(rope_type, Mapping) and "longrope" in rope_type.values()


def cut_config(config: Any, family: Family, first_layer: int, last_layer: int) -> None:
    """Changes a transformers config in place to describe only layers [first_layer, last_layer), numbered from 0."""
    num_layers = last_layer - first_layer
    if num_layers < config.num_hidden_layers:
        # Embedding and head may be in different groups.
        config.tie_word_embeddings = False
    for name in _LIST_PER_LAYER:
        values = getattr(config, name, None)
        if values is not None and config.model_type not in _TYPES_BY_NUMBER:
            setattr(config, name, list(values[first_layer:last_layer]))
    if config.model_type == "bamba":
        config.attn_layer_indices = [layer - first_layer for layer in config.attn_layer_indices or () if layer >= first_layer]
    if config.model_type == "jamba":
        for offset, period in (("attn_layer_offset", "attn_layer_period"), ("expert_layer_offset", "expert_layer_period")):
            setattr(config, offset, (getattr(config, offset) - first_layer) % getattr(config, period))
    if config.model_type in ("qwen3_moe", "qwen3_next"):
        # Which layers are sparse follows from their number in the whole model: list the dense ones instead.
        config.mlp_only_layers = [
            layer - first_layer
            for layer in range(first_layer, last_layer)
            if layer in config.mlp_only_layers or (layer + 1) % config.decoder_sparse_step != 0
        ]
        config.decoder_sparse_step = 1
    if config.model_type == "lfm2_moe":
        config.num_dense_layers = max(0, config.num_dense_layers - first_layer)
    if config.model_type == "deepseek_v3":
        config.first_k_dense_replace = max(0, config.first_k_dense_replace - first_layer)
    if first_layer > 0:
        for name, value in family.neutral_unless_first.items():
            setattr(config, name, value)
    config.num_hidden_layers = num_layers
