"""The Llama-shaped families: the sizes and tensors of their models, read from config.json without a library.

Each family is a row of a table: its biases, and the defaults of its class in transformers for keys that a config leaves out
(tests/storage/checkpoints/test_llama_shaped.py compares them). Stages run these families in C and in every dtype.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Self

from storage.errors import ArchitectureUnsupported

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class LlamaFamily:
    """The biases, the norm of queries and keys, and the defaults of one family.

    A bias is True, False, or the key of the config that tells which.
    """

    qkv_bias: bool | str = False
    out_bias: bool | str = False
    mlp_bias: bool | str = False
    qk_norm: bool = False
    defaults: Mapping[str, Any] = field(default_factory=dict)  # for keys that a config lacks


LLAMA_FAMILIES: Final[Mapping[str, LlamaFamily]] = {
    "llama": LlamaFamily("attention_bias", "attention_bias", "mlp_bias", defaults={"max_position_embeddings": 2048}),
    "ministral": LlamaFamily(
        defaults={"max_position_embeddings": 131_072, "sliding_window": 4096, "num_key_value_heads": 8},
    ),
    "mistral": LlamaFamily(
        defaults={"max_position_embeddings": 131_072, "sliding_window": 4096, "num_key_value_heads": 8},
    ),
    "qwen2": LlamaFamily(
        qkv_bias=True, defaults={"max_position_embeddings": 32_768, "sliding_window": 4096, "num_key_value_heads": 32}
    ),
    "qwen3": LlamaFamily(
        "attention_bias",
        "attention_bias",
        qk_norm=True,
        defaults={"max_position_embeddings": 32_768, "sliding_window": 4096, "num_key_value_heads": 32, "head_dim": 128},
    ),
    "seed_oss": LlamaFamily(
        "attention_bias",
        "attention_out_bias",
        "mlp_bias",
        defaults={"max_position_embeddings": 524_288, "num_key_value_heads": 8, "attention_bias": True, "head_dim": 128},
    ),
    "smollm3": LlamaFamily(
        "attention_bias",
        "attention_bias",
        "mlp_bias",
        defaults={
            "max_position_embeddings": 32_768,
            "num_key_value_heads": 4,
            "rope_theta": 2_000_000.0,
            "tie_word_embeddings": True,
        },
    ),
}


@dataclass(frozen=True, kw_only=True)
class LlamaSizes:
    """The sizes of a whole model."""

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int
    tie_word_embeddings: bool
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    qk_norm: bool

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Reads a parsed config.json.

        Raises ArchitectureUnsupported for a family that is not in the table, and for a missing or invalid size.
        """
        model_type = str(config.get("model_type"))
        if model_type not in LLAMA_FAMILIES:
            raise ArchitectureUnsupported(f"model_type {model_type!r} is not one of {', '.join(LLAMA_FAMILIES)}")
        family = LLAMA_FAMILIES[model_type]
        values = _Values(model_type, {**family.defaults, **config})
        hidden, heads = values.size("hidden_size"), values.size("num_attention_heads")
        return cls(
            num_layers=values.size("num_hidden_layers"),
            hidden_size=hidden,
            intermediate_size=values.size("intermediate_size"),
            num_heads=heads,
            num_kv_heads=values.size("num_key_value_heads", heads),
            head_dim=values.size("head_dim", max(1, hidden // heads)),
            vocab_size=values.size("vocab_size"),
            max_positions=values.size("max_position_embeddings", family.defaults["max_position_embeddings"]),
            tie_word_embeddings=values.flag("tie_word_embeddings"),
            qkv_bias=values.flag(family.qkv_bias),
            out_bias=values.flag(family.out_bias),
            mlp_bias=values.flag(family.mlp_bias),
            qk_norm=family.qk_norm,
        )


def layer_shapes(model: LlamaSizes) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors of one layer, by their names in a checkpoint without the prefix `model.layers.N.`."""
    hidden, queries, keys = model.hidden_size, model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    shapes: dict[str, tuple[int, ...]] = {"input_layernorm.weight": (hidden,), "post_attention_layernorm.weight": (hidden,)}
    if model.qk_norm:
        shapes |= {"self_attn.q_norm.weight": (model.head_dim,), "self_attn.k_norm.weight": (model.head_dim,)}
    for name, outs, width, biased in (
        ("self_attn.q_proj", queries, hidden, model.qkv_bias),
        ("self_attn.k_proj", keys, hidden, model.qkv_bias),
        ("self_attn.v_proj", keys, hidden, model.qkv_bias),
        ("self_attn.o_proj", hidden, queries, model.out_bias),
        ("mlp.gate_proj", model.intermediate_size, hidden, model.mlp_bias),
        ("mlp.up_proj", model.intermediate_size, hidden, model.mlp_bias),
        ("mlp.down_proj", hidden, model.intermediate_size, model.mlp_bias),
    ):
        shapes[f"{name}.weight"] = (outs, width)
        if biased:
            shapes[f"{name}.bias"] = (outs,)
    return shapes


def outer_shapes(model: LlamaSizes) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors outside the layers, by their full names. A tied model may lack `lm_head.weight`."""
    matrix = (model.vocab_size, model.hidden_size)
    return {"model.embed_tokens.weight": matrix, "model.norm.weight": (model.hidden_size,), "lm_head.weight": matrix}


class _Values:
    """Reads values from a config and checks their types."""

    def __init__(self, model_type: str, values: Mapping[str, Any]) -> None:
        self._model_type = model_type
        self._values = values

    def size(self, name: str, default: int | None = None) -> int:
        value = self._values.get(name)
        value = default if value is None else value
        if type(value) is not int or value <= 0:
            raise self._wrong(name, "a number of at least 1")
        return value

    def flag(self, name: bool | str) -> bool:
        value = self._values.get(name, False) if isinstance(name, str) else name
        if type(value) is not bool:
            raise self._wrong(str(name), "true or false")
        return value

    def _wrong(self, name: str, wanted: str) -> ArchitectureUnsupported:
        seen = f"has {name} = {str(self._values[name])[:64]!r}" if name in self._values else f"lacks {name}"
        return ArchitectureUnsupported(f"config.json {seen}; a {self._model_type!r} has {wanted} there")
