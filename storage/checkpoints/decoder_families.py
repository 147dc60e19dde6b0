"""The families that Lamina's own layers run: one table, from which `decoder_config` makes the description of a model.

A row says how the family's class in transformers differs from Llama's, and names that class. It has the defaults of the config
class too. tests/storage/checkpoints/test_decoder_families.py compares both with transformers.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from copy import copy
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from storage.checkpoints.decoder import TensorNames
from storage.errors import ArchitectureUnsupported


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


class UnsupportedConfig(ArchitectureUnsupported):
    """Lamina's own layers cannot run a model with this config.json. transformers may, in a float dtype."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderFamily:
    """How a family's layers are made from its config.

    A field that is a constant or a string has a constant value, or that of the config's key of this name.
    """

    source: str  # module and class in transformers that the row describes
    defaults: Mapping[str, Any]  # of the config class, for keys that a config leaves out
    keys: Mapping[str, str] = field(default_factory=dict)  # the family's names for keys, by Llama's
    names: TensorNames = TensorNames()  # noqa: RUF009  frozen
    norm: Literal["rms", "layer"] = "rms"
    eps: str | float = "rms_norm_eps"
    norm_bias: bool = False
    gain_plus_one: bool = False
    norms: frozenset[str] = frozenset(("before_attention", "before_feed_forward"))
    parallel: bool | str = False
    one_norm_if_parallel: bool = False  # a parallel layer has no norm of its own before the feed-forward
    qk_norm: bool | str = False
    qk_norm_over: Literal["head", "head_of_its_own", "all_heads"] = "head"
    qk_norm_bias: bool = False
    qk_norm_after_rope: bool = False
    qkv_bias: bool | str = False
    out_bias: bool | str = False
    mlp_bias: bool | str = False
    gated: bool = True
    scale: Callable[["Values", int, int], float] = lambda _, head_dim, layer: head_dim**-0.5  # of scores
    attention_soft_cap: str | None = None
    windows: Callable[["Values"], Iterable[int | None]] = lambda values: (None,) * values.size("num_hidden_layers")
    unrotated: Callable[["Values"], Iterable[bool]] = lambda values: (False,) * values.size("num_hidden_layers")
    rope: Literal["halves", "neighbours", None] = "halves"  # which numbers of a head form a pair
    rope_share: float | None = None  # default of the rotated share of a head; None: the class rotates whole heads
    rope_by_kind: bool = False  # layers with a window have a rotation of their own
    embedding_scale: Callable[["Values"], float] = lambda _: 1.0
    residual_scale: Callable[["Values"], float] = lambda _: 1.0
    logit_scale: Callable[["Values"], float] = lambda _: 1.0
    logit_soft_cap: str | None = None
    position_offset: int | None = None
    head_bias: bool = False
    only: Callable[["Values"], Mapping[str, Any]] = lambda _: {}  # keys that the row describes for one value alone
    has_head_dim: bool = True  # the class reads the key head_dim


class Values:
    """Reads values from a config by Llama's names of keys, and checks their types."""

    def __init__(self, family: DecoderFamily, config: Mapping[str, Any]) -> None:
        self._family = family
        self._values = {"rms_norm_eps": 1e-6, **family.defaults, **config}
        self._model_type = config["model_type"]
        self.read: set[str] = set()  # the config's names of the keys that were asked for
        self.obstacles: list[str] = []  # what the layers do not run

    def get(self, name: str) -> Any:
        name = self._family.keys.get(name, name)
        self.read.add(name)
        return self._values.get(name)

    def without(self, name: str) -> "Values":
        """These values with None for one key."""
        changed = copy(self)
        changed._values = {**self._values, name: None}
        return changed

    def size(self, name: str, default: int | None = None) -> int:
        value = self.get(name)
        value = default if value is None else value
        if type(value) is not int or value <= 0:
            raise self._wrong(name, "a number of at least 1")
        return value

    def number(self, name: str) -> float:
        value = self.get(name)
        if not is_number(value):
            raise self._wrong(name, "a number")
        return float(value)

    def flag(self, name: bool | str) -> bool:
        value = name if isinstance(name, bool) else self.get(name)
        if value is None:
            return False
        if type(value) is not bool:
            raise self._wrong(str(name), "true or false")
        return value

    def soft_cap(self, name: str | None) -> float | None:
        return None if name is None or self.get(name) is None else self.number(name)

    def _wrong(self, name: str, wanted: str) -> ArchitectureUnsupported:
        name = self._family.keys.get(name, name)
        seen = f"has {name} = {str(self._values[name])[:64]!r}" if name in self._values else f"lacks {name}"
        return ArchitectureUnsupported(f"config.json {seen}; a {self._model_type!r} has {wanted} there")


def _windows(values: Values, slides: Callable[[int], bool]) -> tuple[int | None, ...]:
    """The window of each layer. slides: whether a layer has one, by its number, if the config has no list `layer_types`."""
    window, layer_types = values.get("sliding_window"), values.get("layer_types")
    if layer_types is not None:
        found = [layer_type == "sliding_attention" for layer_type in layer_types]
    else:
        found = [slides(layer) for layer in range(values.size("num_hidden_layers"))]
    if any(found) and window is None:
        values.obstacles.append("layers with sliding attention, to which the config gives no window")
    return tuple(window if slide else None for slide in found)


def _windows_everywhere(values: Values) -> tuple[int | None, ...]:
    return (values.get("sliding_window"),) * values.size("num_hidden_layers")


def _windows_of_qwen(values: Values) -> tuple[int | None, ...]:
    if not values.get("use_sliding_window"):
        values = values.without("sliding_window")
    first = math.inf if values.get("sliding_window") is None else values.number("max_window_layers")
    return _windows(values, lambda layer: layer >= first)


def _unrotated_in_smollm(values: Values) -> tuple[bool, ...]:
    given = values.get("no_rope_layers")
    if given is not None:
        return tuple(not rotates for rotates in given)
    interval = values.size("no_rope_layer_interval")
    return tuple((layer + 1) % interval == 0 for layer in range(values.size("num_hidden_layers")))


def _windows_of_smollm(values: Values) -> tuple[int | None, ...]:
    slides = [
        bool(values.get("use_sliding_window")) and values.get("sliding_window") is not None and unrotated
        for unrotated in _unrotated_in_smollm(values)
    ]
    return _windows(values, slides.__getitem__)


LLAMA_BIASES: Final[Mapping[str, Any]] = {"qkv_bias": "attention_bias", "out_bias": "attention_bias"}

DECODER_FAMILIES: Final[Mapping[str, DecoderFamily]] = {
    "llama": DecoderFamily(
        source="llama.modeling_llama:LlamaDecoderLayer",
        defaults={"max_position_embeddings": 2048},
        mlp_bias="mlp_bias",
        **LLAMA_BIASES,
    ),
    "ministral": DecoderFamily(
        source="ministral.modeling_ministral:MinistralDecoderLayer",
        defaults={"max_position_embeddings": 131_072, "sliding_window": 4096, "num_key_value_heads": 8},
        windows=lambda values: _windows(values, lambda _: values.get("sliding_window") is not None),
    ),
    "mistral": DecoderFamily(
        source="mistral.modeling_mistral:MistralDecoderLayer",
        defaults={"max_position_embeddings": 131_072, "sliding_window": 4096, "num_key_value_heads": 8},
        windows=_windows_everywhere,
    ),
    "qwen2": DecoderFamily(
        source="qwen2.modeling_qwen2:Qwen2DecoderLayer",
        defaults={
            "max_position_embeddings": 32_768,
            "sliding_window": 4096,
            "num_key_value_heads": 32,
            "max_window_layers": 28,
        },
        qkv_bias=True,
        windows=_windows_of_qwen,
    ),
    "qwen3": DecoderFamily(
        source="qwen3.modeling_qwen3:Qwen3DecoderLayer",
        defaults={
            "max_position_embeddings": 32_768,
            "sliding_window": 4096,
            "num_key_value_heads": 32,
            "head_dim": 128,
            "max_window_layers": 28,
        },
        qk_norm=True,
        windows=_windows_of_qwen,
        **LLAMA_BIASES,
    ),
    "seed_oss": DecoderFamily(
        source="seed_oss.modeling_seed_oss:SeedOssDecoderLayer",
        defaults={"max_position_embeddings": 524_288, "num_key_value_heads": 8, "attention_bias": True, "head_dim": 128},
        qkv_bias="attention_bias",
        out_bias="attention_out_bias",
        mlp_bias="mlp_bias",
    ),
    "smollm3": DecoderFamily(
        source="smollm3.modeling_smollm3:SmolLM3DecoderLayer",
        defaults={
            "max_position_embeddings": 32_768,
            "num_key_value_heads": 4,
            "rope_theta": 2_000_000.0,
            "tie_word_embeddings": True,
            "no_rope_layer_interval": 4,
        },
        mlp_bias="mlp_bias",
        windows=_windows_of_smollm,
        unrotated=_unrotated_in_smollm,
        **LLAMA_BIASES,
    ),
}
