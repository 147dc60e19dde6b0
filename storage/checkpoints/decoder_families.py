"""The families that Lamina's own layers run: one table, from which `decoder_config` makes the description of a model.

A row names the family's class in transformers and says how it differs from Llama's. It also has the defaults of the family's
config class. tests/storage/checkpoints/test_decoder_families.py compares both with transformers.
"""

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from typing import Any, Final, Literal

import msgspec

from storage.checkpoints.decoder import Norm, Recurrent, TensorNames
from storage.checkpoints.families import with_floats
from storage.errors import ArchitectureUnsupported


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


class UnsupportedConfig(ArchitectureUnsupported):
    """Lamina's own layers cannot run a model with this config.json. transformers' modules may, in a float dtype."""


BEFORE: Final = frozenset(("before_attention", "before_feed_forward"))
Part = Literal["attention", "recurrent", "feed_forward"]  # of a layer, by its field in the description
_PLAIN: Final[tuple[Part, ...]] = ("attention", "feed_forward")


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertsFamily:
    """Says how a config describes the experts of a family's layers. Its fields are read as those of DecoderFamily."""

    count: str = "num_experts"
    chosen: str = "num_experts_per_tok"
    inner_size: str = "moe_intermediate_size"
    scores: Literal["softmax", "softmax_of_chosen", "sigmoid", "sparse_mix"] = "softmax"
    threshold: Callable[["Values"], float] = lambda _: 0.0
    router_bias: bool = False
    correction: bool | str = False
    groups: tuple[str, str] | None = None  # keys of their number, and of how many a token's experts are in
    group_score: Literal["greatest", "two_greatest"] = "two_greatest"
    normalized: bool | str = False
    normal_eps: float = 0.0
    scale: str | None = None
    bias: bool = False
    shared_size: Callable[["Values"], int | None] = lambda _: None  # inner size of the shared expert; None: there is none
    shared_gate: bool = False
    own_norms: bool = False  # the layer's own feed-forward is beside them, and layers may have none
    latent_size: str | None = None
    swiglu: tuple[str, str] | None = None  # keys of its two numbers
    layers: Callable[["Values"], Iterable[bool]] = lambda values: (True,) * values.size("num_hidden_layers")


@dataclass(frozen=True, slots=True)
class MergedExperts:
    """Names of the tensors in a checkpoint that each contain all experts of a layer.

    Their shape is [experts, outs, width]. In `gate_up`, the rows of gate come before those of up.
    """

    gate_up: str
    down: str
    # [experts, width, outs], in which gate and up alternate; with biases [experts, outs] of the same names and `_bias`.
    transposed: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderFamily:
    """Says how the config of a family describes its layers.

    A field that may be a constant or a string is read as follows: a constant is the value, and a string names the config key
    that has the value.
    """

    source: str  # module and class in transformers that the row describes
    defaults: Mapping[str, Any]  # of the config class, for keys that a config leaves out
    keys: Mapping[str, str] = field(default_factory=dict)  # the family's names for keys, by Llama's
    aliases: Mapping[str, str] = field(default_factory=dict)  # other names of the family's own keys
    names: TensorNames = TensorNames()  # noqa: RUF009  frozen
    norm: Literal["rms", "layer"] = "rms"
    eps: str | float = "rms_norm_eps"
    norm_bias: bool = False
    gain_plus_one: bool = False
    norms: frozenset[str] = BEFORE
    parallel: bool | str = False
    one_norm_if_parallel: bool = False  # a parallel layer has no norm of its own before the feed-forward
    qk_norm: bool | str = False
    qk_norm_over: Literal["head", "head_of_its_own", "all_heads"] = "head"
    qk_norm_bias: bool = False
    qk_norm_after_rope: bool = False
    latent: bool = False  # latent attention
    sinks: bool = False
    output_gate: bool = False
    qkv_bias: bool | str = False
    out_bias: bool | str = False
    mlp_bias: bool | str = False
    gated: bool = True
    inner_size: Callable[["Values"], int | Sequence[int]] = lambda values: values.size("intermediate_size")  # or of each layer
    sparsity: Callable[["Values"], Sequence[float]] = lambda _: ()  # of each layer; empty: none has any
    heads: Callable[["Values"], Sequence[tuple[int, int]]] | None = None  # how many KV heads a layer has, and of which size
    values_are_keys: Callable[["Values"], Collection[int]] = lambda _: ()  # layers whose values are keys before norm and rope
    value_norm: bool = False
    kv_layers: Callable[["Values"], Mapping[int, int]] = lambda _: {}  # whose keys and values a layer reads, if not its own
    layer_input: str | None = None  # key of its size
    streams: bool = False
    output_scale: bool = False
    scale: Callable[["Values", int, int], float] = lambda _, head_dim, layer: head_dim**-0.5  # of scores
    attention_soft_cap: str | None = None
    windows: Callable[["Values"], Iterable[int | None]] = lambda values: (None,) * values.size("num_hidden_layers")
    unrotated: Callable[["Values"], Iterable[bool]] = lambda values: (False,) * values.size("num_hidden_layers")
    rope: Literal["halves", "neighbours", None] = "halves"  # which numbers of a head form a pair
    rope_share: float | None = None  # default of the rotated share of a head; None: the class rotates whole heads
    rope_by_kind: bool = False  # layers with a window have a rotation of their own
    rope_alpha: bool = False  # `alpha` in the parameters of a dynamic rotation stretches its base
    rope_ignores: frozenset[str] = frozenset()  # parameters that change nothing for text
    longrope_names: tuple[str, ...] = ()  # older names of this rotation
    queries_grow: bool = False  # queries are multiplied by a logarithm of their position
    embedding_scale: Callable[["Values"], float] = lambda _: 1.0
    residual_scale: Callable[["Values"], float] = lambda _: 1.0
    attention_out_scale: Callable[["Values"], float] = lambda _: 1.0
    mlp_scales: Callable[["Values"], Iterable[float]] = lambda _: (1.0, 1.0)  # of what the activation gets, and of the output
    logit_scale: Callable[["Values"], float] = lambda _: 1.0
    logit_soft_cap: str | None = None
    position_offset: int | None = None
    head_bias: bool | str = False
    bidirectional: bool | str = False  # tokens attend to later ones, and windows to half as many tokens on either side
    parts: Callable[["Values"], Iterable[tuple[Part, ...]]] = lambda values: (_PLAIN,) * values.size("num_hidden_layers")
    recurrent: Callable[["Values"], Recurrent] | None = None  # the mixer of layers that have this part
    completed: Callable[[Mapping[str, Any]], Mapping[str, Any]] = lambda config: config  # with what its class reads otherwise
    only: Callable[["Values"], Mapping[str, Any]] = lambda _: {}  # keys that the row describes for one value alone
    experts: ExpertsFamily | None = None
    merged_experts: MergedExperts | None = None  # as checkpoints of the family have them, if not as matrices
    unread: frozenset[str] = frozenset()  # keys in configs of the family that its class does not read
    legacy_gelu: bool = False  # gelu means its tanh form
    has_head_dim: bool = True  # the class reads the key head_dim


class Values:
    """Reads values from a config and checks their types. Callers name keys as Llama's config does."""

    def __init__(self, family: DecoderFamily, config: Mapping[str, Any]) -> None:
        self._family = family
        given = {family.aliases.get(key, key): value for key, value in config.items()}
        self._values = {"rms_norm_eps": 1e-6, **family.defaults, **given}
        self._model_type = config["model_type"]
        self.read: set[str] = set()  # the config's names of the keys that were asked for
        self.obstacles: list[str] = []  # what the layers do not run
        for alias, key in family.aliases.items():
            if config.get(alias, given.get(key)) != config.get(key, given.get(key)):
                self.obstacles.append(f"both {key} = {config[key]!r} and {alias} = {config[alias]!r}")

    def get(self, name: str) -> Any:
        name = self._family.keys.get(name, name)
        self.read.add(name)
        return self._values.get(name)

    def without(self, name: str) -> "Values":
        """A copy of these values in which one key is None."""
        changed = copy(self)
        changed._values = {**self._values, name: None}
        return changed

    def size(self, name: str, default: int | None = None) -> int:
        value = self.get(name)
        value = default if value is None else value
        if type(value) is not int or value <= 0:
            raise self._wrong(name, "a number of at least 1")
        return value

    def default(self, name: str) -> Any:
        return self._family.defaults.get(self._family.keys.get(name, name))

    def number(self, name: str) -> float:
        value = self.get(name)
        if not is_number(value):
            raise self._wrong(name, "a number")
        return float(value)

    def numbers(self, name: str, count: int) -> tuple[float, ...]:
        """Reads a list of `count` numbers. All are 1 if the config has no such list."""
        found = self.get(name)
        if found is None:
            return (1.0,) * count
        if not isinstance(found, list | tuple) or len(found) != count or not all(map(is_number, found)):
            raise self._wrong(name, f"{count} numbers")
        return tuple(map(float, found))

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
    """The attention window of each layer; None for a layer without one.

    slides: says for a layer's number whether the layer has a window. It is used if the config has no list `layer_types`.
    """
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


def _with_used_window(values: Values) -> Values:
    return values if values.get("use_sliding_window") else values.without("sliding_window")


def _windows_of_qwen(values: Values) -> tuple[int | None, ...]:
    values = _with_used_window(values)
    first = math.inf if values.get("sliding_window") is None else values.number("max_window_layers")
    return _windows(values, lambda layer: layer >= first)


def _windows_of_qwen2_moe(values: Values) -> tuple[int | None, ...]:
    values = _with_used_window(values)
    first = 0.0 if values.get("sliding_window") is None else values.number("max_window_layers")
    return _windows(values, lambda layer: layer % 2 == 0 and layer < first)


def _scale_of_gemma(values: Values, *_: int) -> float:
    scale: float = values.number("query_pre_attn_scalar") ** -0.5
    return scale


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


def _windows_by_pattern(values: Values) -> tuple[int | None, ...]:
    """The attention window of each layer, if every `sliding_window_pattern`-th layer has none."""
    pattern = values.size("sliding_window_pattern") if values.get("sliding_window") is not None else 1
    return _windows(values, lambda layer: (layer + 1) % pattern != 0)


def _windows_but_every_fourth(values: Values) -> tuple[int | None, ...]:
    return _windows(values, lambda layer: layer % 4 != 0)


def _unrotated_in_granite_swa(values: Values) -> tuple[bool, ...]:
    thetas = values.get("layer_rope_theta")
    if thetas is None:
        return (False,) * values.size("num_hidden_layers")
    theta = (values.get("rope_parameters") or {}).get("rope_theta", values.get("rope_theta"))
    if others := sorted(set(thetas) - {0, theta}):
        values.obstacles.append(f"rotations with bases of their own, {others}")
    return tuple(each == 0 for each in thetas)


def _full_layers(values: Values) -> tuple[bool, ...]:
    """For each layer, whether it has no window while the model has windows. All are False in a model without windows."""
    windows = _windows_by_pattern(values)
    return tuple(window is None and values.get("sliding_window") is not None for window in windows)


def _scale_of_latent(values: Values, *_: int) -> float:
    """The scale of scores in latent attention: 1 / sqrt(size of a head), times YaRN's factor for scores.

    The factor (yarn_apply_mscale of transformers) is applied in addition to that of the rotation.
    """
    scale = (values.size("qk_nope_head_dim") + values.size("qk_rope_head_dim")) ** -0.5
    rope = values.get("rope_scaling") or values.get("rope_parameters") or {}
    all_dim: Any = rope.get("mscale_all_dim")
    factor: Any = rope.get("factor")
    if rope.get("rope_type", rope.get("type", "default")) != "default" and is_number(all_dim) and all_dim and is_number(factor):
        scale *= (1.0 if factor <= 1 else 0.1 * all_dim * math.log(factor) + 1.0) ** 2
    return float(scale)


def _only_of_deepseek_v2(values: Values) -> Mapping[str, Any]:
    values.get("norm_topk_prob")  # which the class does not read
    in_groups = values.get("topk_method") == "group_limited_greedy"
    return {"mlp_bias": False} | ({} if in_groups else {"topk_method": "greedy", "n_group": 1})


def _sparse_layers_of_glm(values: Values) -> tuple[bool, ...]:
    values.get("first_k_dense_replace")  # which the class does not read
    kinds = values.get("mlp_layer_types") or ["dense", *["sparse"] * (values.size("num_hidden_layers") - 1)]
    return tuple(kind == "sparse" for kind in kinds)


def _root_of_size(values: Values) -> float:
    return math.sqrt(values.size("hidden_size"))


def _sparse_layers_of_qwen(values: Values) -> tuple[bool, ...]:
    step, dense = values.size("decoder_sparse_step"), values.get("mlp_only_layers") or ()
    return tuple(layer not in dense and (layer + 1) % step == 0 for layer in range(values.size("num_hidden_layers")))


def _all_but_first(values: Values) -> tuple[bool, ...]:
    first = values.get("first_k_dense_replace") or 0
    return tuple(layer >= first for layer in range(values.size("num_hidden_layers")))


def _scale_of_gpt2(values: Values, head_dim: int, layer: int) -> float:
    scale = head_dim**-0.5 if values.get("scale_attn_weights") else 1.0
    return scale / (layer + 1) if values.get("scale_attn_by_inverse_layer_idx") else scale


def _parts_of_lfm2(values: Values) -> list[tuple[Part, ...]]:
    count, layer_types, attending = values.size("num_hidden_layers"), values.get("layer_types"), values.get("full_attn_idxs")
    if layer_types is None:
        layer_types = ["full_attention" if attending is None or layer in attending else "conv" for layer in range(count)]
    if unknown := set(layer_types) - {"full_attention", "conv"}:
        values.obstacles.append(f"layers of type {min(unknown)!r}")
    return [("recurrent" if layer_type == "conv" else "attention", "feed_forward") for layer_type in layer_types]


def _short_convolution(values: Values) -> Recurrent:
    biased = values.flag("conv_bias")
    return Recurrent(kind="convolution", kernel=values.size("conv_L_cache"), kernel_bias=biased, biased=biased)


def _parts_by_type(values: Values) -> list[tuple[Part, ...]]:
    """The parts of each layer, by its type in `layer_types`. Type names of older configs are known, too.

    A config without the list has full attention in every `full_attention_interval`-th layer and linear attention in others.
    """
    count, types = values.size("num_hidden_layers"), values.get("layer_types")
    if types is None:
        every = values.get("full_attention_interval")
        types = ["full_attention" if every and (layer + 1) % every == 0 else "linear_attention" for layer in range(count)]
    return [_parts_of(values, each, "feed_forward") for each in types]


def _parts_of(values: Values, layer_type: str, *besides: Part) -> tuple[Part, ...]:
    if layer_type in ("linear_attention", "mamba"):
        return ("recurrent", *besides)
    if layer_type not in ("full_attention", "attention"):
        values.obstacles.append(f"layers of type {layer_type!r}")
    return ("attention", *besides)


def _parts_of_nemotron_h(values: Values) -> list[tuple[Part, ...]]:
    types = values.get("layers_block_type")
    return [("feed_forward",) if each in ("mlp", "moe") else _parts_of(values, each) for each in types]


def _with_layers_of_nemotron_h(config: Mapping[str, Any]) -> Mapping[str, Any]:
    names = {"M": "linear_attention", "E": "moe", "*": "full_attention", "-": "mlp"}
    types = (
        config.get("layers_block_type")
        or config.get("layer_types")
        or [names.get(each, each) for each in config.get("hybrid_override_pattern") or "ME*-"]
    )
    return {**config, "layers_block_type": types, "num_hidden_layers": len(types)}


def _with_scales_of_phimoe(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """A config of PhiMoE with the rotation that its class really computes.

    The class multiplies rotations by factors of its own, and uses the factors of short contexts for long ones, too.
    """
    changed = dict(config)
    for key in ("rope_parameters", "rope_scaling"):
        rope: Any = config.get(key)
        if isinstance(rope, Mapping) and (scale := rope.get("short_mscale")) is not None and scale == rope.get("long_mscale"):
            plain = {name: value for name, value in rope.items() if name not in ("short_mscale", "long_mscale")}
            changed[key] = {**plain, "attention_factor": scale}
            if "short_factor" in rope:
                changed[key]["long_factor"] = rope["short_factor"]
    return changed


def _parts_of_bamba(values: Values) -> list[tuple[Part, ...]]:
    attending = values.get("attn_layer_indices") or ()
    layers = range(values.size("num_hidden_layers"))
    return [("attention" if layer in attending else "recurrent", "feed_forward") for layer in layers]


def _mamba_2(values: Values) -> Recurrent:
    """The Mamba-2 mixer of a family whose config has Bamba's names of keys."""
    if (activation := values.get("mamba_hidden_act")) not in (None, "silu", "swish"):
        values.obstacles.append(f"a convolution with activation {activation!r}")
    limits = with_floats(values.get("time_step_limit"))
    if limits is not None and [*limits] != [0.0, math.inf]:
        values.obstacles.append(f"steps within {limits}")
    heads, inner = values.size("mamba_n_heads"), values.size("mamba_expand") * values.size("hidden_size")
    is_open = values.get("mamba_d_head") in (None, "auto")
    groups = values.size("mamba_n_groups")
    return Recurrent(
        kind="mamba",
        kernel=values.size("mamba_d_conv"),
        kernel_bias=values.flag("mamba_conv_bias"),
        biased=values.flag("mamba_proj_bias"),
        num_heads=heads,
        head_size=inner // heads if is_open else values.size("mamba_d_head"),
        num_groups=groups,
        key_size=values.size("mamba_d_state"),
        norm=Norm(eps=values.number("rms_norm_eps")),
        norm_parts=groups,
        gate_first=True,
    )


def _mamba_2_of_falcon(values: Values) -> Recurrent:
    inner = values.size("mamba_expand") * values.size("hidden_size")
    inner = inner if values.get("mamba_d_ssm") is None else values.size("mamba_d_ssm")
    plain, into = _mamba_2(values), values.number("ssm_in_multiplier")
    if values.flag("projectors_bias") != plain.biased or (plain.biased and into != 1):
        values.obstacles.append("a projection that is scaled before its bias is added, or biases of one projection alone")
    return msgspec.structs.replace(
        plain,
        head_size=inner // plain.num_heads,
        norm=plain.norm if values.flag("mamba_rms_norm") else None,
        gate_first=not values.flag("mamba_norm_before_gate"),
        in_scales=tuple(into * scale for scale in values.numbers("ssm_multipliers", 5)),
        out_scale=values.number("ssm_out_multiplier"),
    )


def _scale_of_falcon_h1(values: Values, head_dim: int, layer: int) -> float:
    into = values.number("attention_in_multiplier")
    if values.flag("attention_bias") and into != 1:
        values.obstacles.append("queries, keys and values whose inputs are scaled before biases are added")
    scale: float = head_dim**-0.5 * into**2 * values.number("key_multiplier")
    return scale


def _delta_net(values: Values) -> Recurrent:
    if (activation := values.get("hidden_act")) not in (None, "silu", "swish"):
        values.obstacles.append(f"a convolution with activation {activation!r}")
    heads = values.size("linear_num_value_heads")
    return Recurrent(
        kind="delta",
        kernel=values.size("linear_conv_kernel_dim"),
        num_heads=heads,
        head_size=values.size("linear_value_head_dim"),
        num_groups=values.size("linear_num_key_heads"),
        key_size=values.size("linear_key_head_dim"),
        norm=Norm(eps=values.number("rms_norm_eps")),
        norm_parts=heads,
    )


def _inner_of_lfm2(values: Values) -> int:
    inner = values.size("intermediate_size" if values.get("block_ff_dim") is None else "block_ff_dim")
    factor = 1 if values.get("block_ffn_dim_multiplier") is None else values.number("block_ffn_dim_multiplier")
    multiple = values.size("block_multiple_of")
    if values.flag("block_auto_adjust_ff_dim"):
        inner = -(-int(factor * int(2 * inner / 3)) // multiple) * multiple
    return inner


def _with_layer_types(config: Mapping[str, Any], default_layers: int, pattern: int) -> Mapping[str, Any]:
    """Adds a type for each layer to a config that lacks `layer_types`. Every `pattern`-th layer has no window."""
    count: Any = config.get("num_hidden_layers", default_layers)
    if config.get("layer_types") is not None or type(count) is not int:
        return config
    types = ["sliding_attention" if (layer + 1) % pattern else "full_attention" for layer in range(min(count, 10_000))]
    return {**config, "layer_types": types}


def _gemma_4_completed(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """A config of Gemma 4 with all `layer_types`. The last layer attends to all tokens, whatever the config says."""
    config = _with_layer_types(config, _GEMMA_4_LAYERS, pattern=6)
    types: Any = config.get("layer_types")
    return {**config, "layer_types": [*types[:-1], "full_attention"] if types else types}


def _full_layers_of_gemma_4(values: Values) -> list[int]:
    return [layer for layer, kind in enumerate(values.get("layer_types") or ()) if kind == "full_attention"]


def _heads_of_gemma_4(values: Values) -> list[tuple[int, int]]:
    """The number of KV heads and the size of a head, for each layer.

    Newer configs have them in `per_layer_config`. Others have keys for the layers without a window.
    """
    kv_heads, size = values.size("num_key_value_heads"), values.size("head_dim")
    global_heads = values.get("num_global_key_value_heads") if values.flag("attention_k_eq_v") else None
    of_full = {"head_dim": values.get("global_head_dim"), "num_key_value_heads": global_heads or kv_heads}
    given = values.get("per_layer_config")
    if given is None:
        given = dict.fromkeys(_full_layers_of_gemma_4(values), of_full)
    try:
        own = {int(layer): {key: int(value) for key, value in fields.items()} for layer, fields in given.items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise ArchitectureUnsupported(f"config.json has per_layer_config {str(given)[:64]!r}: {error}") from error
    if unknown := {key for fields in own.values() for key in fields} - of_full.keys():
        values.obstacles.append(f"per_layer_config with {min(unknown)}")
    found = [own.get(layer, {}) for layer in range(values.size("num_hidden_layers"))]
    return [(max(1, fields.get("num_key_value_heads", kv_heads)), max(1, fields.get("head_dim", size))) for fields in found]


def _shared_kv_layers(values: Values) -> dict[int, int]:
    """For each layer without KV of its own, the layer whose keys and values it reads.

    These are the last `num_kv_shared_layers` layers. Each reads those of the last earlier layer of its type that has its own.
    """
    types, count = values.get("layer_types"), values.size("num_hidden_layers")
    first = count - (values.get("num_kv_shared_layers") or 0)
    owners = {kind: layer for layer, kind in enumerate(types[: max(0, first)])}
    if lacking := set(types[max(0, first) :]) - owners.keys():
        values.obstacles.append(f"layers with {min(lacking)} that read the keys and values of no other layer")
    return {layer: owners[types[layer]] for layer in range(max(0, first), len(types)) if types[layer] in owners}


def _inner_sizes_of_gemma_4(values: Values) -> list[int]:
    wider = _shared_kv_layers(values) if values.flag("use_double_wide_mlp") else ()
    size = values.size("intermediate_size")
    return [2 * size if layer in wider else size for layer in range(values.size("num_hidden_layers"))]


def _inner_sizes_of_gemma_3n(values: Values) -> int | list[int]:
    found = values.get("intermediate_size")
    if not isinstance(found, list | tuple):
        return values.size("intermediate_size")
    if not all(type(size) is int and size > 0 for size in found):
        raise ArchitectureUnsupported(f"config.json has intermediate_size = {str(found)[:64]}")
    return [*found]


def _sparsity_of_gemma_3n(values: Values) -> list[float]:
    found, count = values.get("activation_sparsity_pattern"), values.size("num_hidden_layers")
    if found is None:
        found = [0.95 if count > 10 and layer < 10 else 0.0 for layer in range(count)]
    if not isinstance(found, list | tuple) or not all(is_number(share) and 0 <= share < 1 for share in found):
        raise ArchitectureUnsupported(f"config.json has activation_sparsity_pattern = {str(found)[:64]}")
    return [float(share) for share in found]


def _only_of_gemma_4(values: Values) -> Mapping[str, Any]:
    values.get("vocab_size_per_layer_input")
    has_input = values.get("hidden_size_per_layer_input")
    found = {"vocab_size_per_layer_input": values.get("vocab_size")} if has_input else {}
    return {"use_bidirectional_attention": "vision", **found}  # tokens of images alone attend to later ones


# Tables, in which a row takes few lines: ruff would give each field a line of its own.
# fmt: off
_MAMBA_2: Final[Mapping[str, Any]] = {
    "mamba_n_heads": 128, "mamba_d_head": "auto", "mamba_n_groups": 1, "mamba_d_state": 256, "mamba_d_conv": 4,
    "mamba_expand": 2, "mamba_conv_bias": True,
}
# Keys of Mamba-2 as families without the prefix have them.
_MAMBA_2_WITHOUT_PREFIX: Final[Mapping[str, str]] = {
    "mamba_n_groups": "n_groups", "mamba_d_conv": "conv_kernel", "mamba_expand": "expand", "mamba_conv_bias": "use_conv_bias",
    "mamba_proj_bias": "use_bias",
}
_NAMES_OF_BAMBA: Final = TensorNames(
    final_norm="model.final_layernorm", gate="feed_forward.gate_proj", up="feed_forward.up_proj", down="feed_forward.down_proj",
    before_feed_forward="pre_ff_layernorm", recurrent="mamba",
)
# These keys are of initialization, training and the formula for many tokens at once.
_UNREAD_OF_MAMBA: Final = frozenset((
    "chunk_size", "mamba_chunk_size", "time_step_rank", "time_step_min", "time_step_max", "time_step_floor",
    "rescale_prenorm_residual", "residual_in_fp32", "num_logits_to_keep", "z_loss_coefficient", "use_mamba_kernels",
    "mamba_ssm_cache_dtype", "router_aux_loss_coef",
))
_DELTA_NET: Final[Mapping[str, Any]] = {
    "linear_conv_kernel_dim": 4, "linear_key_head_dim": 128, "linear_value_head_dim": 128, "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
}
LLAMA_BIASES: Final[Mapping[str, Any]] = {"qkv_bias": "attention_bias", "out_bias": "attention_bias"}
AFTER: Final = frozenset(("after_attention", "after_feed_forward"))
EVERYWHERE: Final = AFTER | BEFORE
_GRANITE_EXPERTS: Final = TensorNames(
    router="block_sparse_moe.router.layer",
    experts=(
        "block_sparse_moe.experts.{expert}.gate_proj", "block_sparse_moe.experts.{expert}.up_proj",
        "block_sparse_moe.experts.{expert}.down_proj",
    ),
)
_MIXTRAL_EXPERTS: Final = TensorNames(
    router="block_sparse_moe.gate",
    experts=(
        "block_sparse_moe.experts.{expert}.w1", "block_sparse_moe.experts.{expert}.w3", "block_sparse_moe.experts.{expert}.w2",
    ),
)
_SHARED_IN_GRANITE: Final = msgspec.structs.replace(
    _GRANITE_EXPERTS, shared=("shared_mlp.input_linear", "shared_mlp.input_linear", "shared_mlp.output_linear"),
)
_EXPERTS_OF_GRANITE: Final = ExpertsFamily(
    count="num_local_experts", inner_size="intermediate_size", scores="softmax_of_chosen",
)
_MERGED_IN_GRANITE: Final = MergedExperts("block_sparse_moe.input_linear.weight", "block_sparse_moe.output_linear.weight")
_ROUTED: Final[dict[str, Any]] = {
    "num_experts_per_tok": 8, "n_routed_experts": 128, "n_shared_experts": 1, "routed_scaling_factor": 1.0, "n_group": 1,
    "topk_group": 1, "norm_topk_prob": True,
}
_ROUTED_EXPERTS: Final = ExpertsFamily(
    count="n_routed_experts", scores="sigmoid", correction=True, groups=("n_group", "topk_group"), normalized="norm_topk_prob",
    normal_eps=1e-20, scale="routed_scaling_factor",
    shared_size=lambda values: values.size("moe_intermediate_size") * values.size("n_shared_experts"), layers=_all_but_first,
)
_SHARED_EXPERTS: Final = TensorNames(
    shared=("mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj", "mlp.shared_experts.down_proj"),
)
_GEMMA: Final[dict[str, Any]] = {"head_dim": 256, "tie_word_embeddings": True}
_GEMMA_2: Final[Mapping[str, Any]] = {
    **_GEMMA, "num_key_value_heads": 4, "hidden_activation": "gelu_pytorch_tanh", "max_position_embeddings": 8192,
    "query_pre_attn_scalar": 256, "sliding_window": 4096, "final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0,
}
_LIKE_GEMMA_2: Final[Mapping[str, Any]] = {
    "gain_plus_one": True, "embedding_scale": _root_of_size, "scale": _scale_of_gemma,
    "attention_soft_cap": "attn_logit_softcapping", "logit_soft_cap": "final_logit_softcapping",
    "windows": lambda values: _windows(values, lambda layer: layer % 2 == 0), **LLAMA_BIASES,
}
_GRANITE: Final = dict.fromkeys(("embedding_multiplier", "logits_scaling", "residual_multiplier", "attention_multiplier"), 1.0)
_LIKE_GRANITE: Final[Mapping[str, Any]] = {
    "scale": lambda values, *_: values.number("attention_multiplier"),
    "embedding_scale": lambda values: values.number("embedding_multiplier"),
    "residual_scale": lambda values: values.number("residual_multiplier"),
    "logit_scale": lambda values: 1 / values.number("logits_scaling"),
}
_LATENT: Final = {"kv_lora_rank": 512, "q_lora_rank": 1536, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128}
_LATENT_ATTENTION: Final[Mapping[str, Any]] = {
    "latent": True, "qkv_bias": "attention_bias", "out_bias": "attention_bias", "scale": _scale_of_latent, "rope": "neighbours",
    "has_head_dim": False, "only": lambda values: {"rope_interleave": True},
}
_FOUR_NORMS: Final = TensorNames(
    after_attention="post_attention_layernorm", before_feed_forward="pre_feedforward_layernorm",
    after_feed_forward="post_feedforward_layernorm",
)
_NORMS_AFTER: Final = TensorNames(after_attention="post_attention_layernorm", after_feed_forward="post_feedforward_layernorm")
_QWEN3_5: Final[dict[str, Any]] = {
    "max_position_embeddings": 32_768, "head_dim": 256, "full_attention_interval": 4, **_DELTA_NET,
}
_QWEN_EXPERTS: Final[Mapping[str, Any]] = {"moe_intermediate_size": 512, "shared_expert_intermediate_size": 512}
_LIKE_QWEN3_5: Final[Mapping[str, Any]] = {
    "gain_plus_one": True, "qk_norm": True, "output_gate": True, "parts": _parts_by_type, "recurrent": _delta_net,
    "rope_share": 0.25, "rope_ignores": frozenset(("mrope_section", "mrope_interleaved")), **LLAMA_BIASES,
}
_GLM: Final[Mapping[str, Any]] = {
    "max_position_embeddings": 131_072, "num_key_value_heads": 2, "head_dim": 128, "rms_norm_eps": 1.5625e-07,
    "attention_bias": True,
}
_LFM2_NAMES: Final = TensorNames(
    final_norm="model.embedding_norm", query_norm="self_attn.q_layernorm", key_norm="self_attn.k_layernorm",
    out="self_attn.out_proj", gate="feed_forward.w1", up="feed_forward.w3", down="feed_forward.w2",
    before_attention="operator_norm", before_feed_forward="ffn_norm", recurrent="conv", recurrent_kernel="conv",
)
_NAMES_OF_MAMBA_2: Final = TensorNames(
    base="backbone", layers="backbone.layers", embedding="backbone.embeddings", final_norm="backbone.norm_f",
    before_attention="norm", recurrent="mixer",
)
_LFM2: Final[dict[str, Any]] = {
    "max_position_embeddings": 128_000, "num_key_value_heads": 8, "norm_eps": 1e-5, "rope_theta": 1_000_000.0,
    "tie_word_embeddings": True, "conv_L_cache": 3,
}
_LIKE_LFM2: Final[dict[str, Any]] = {
    "eps": "norm_eps", "qk_norm": True, "parts": _parts_of_lfm2, "recurrent": _short_convolution,
    "only": lambda values: {"tie_embedding": values.flag("tie_word_embeddings")},
}
_GEMMA_3N_LAYERS: Final = 35
_GEMMA_4_LAYERS: Final = 30
_LIKE_GEMMA_4: Final[Mapping[str, Any]] = {
    "keys": {"hidden_act": "hidden_activation"}, "norms": EVERYWHERE, "qk_norm": True, "value_norm": True,
    "scale": lambda *_: 1.0, "embedding_scale": _root_of_size, "logit_soft_cap": "final_logit_softcapping",
    "windows": lambda values: _windows(values, lambda _: False), "rope_by_kind": True, "kv_layers": _shared_kv_layers,
    "layer_input": "hidden_size_per_layer_input", **LLAMA_BIASES,
}
DECODER_FAMILIES: Final[Mapping[str, DecoderFamily]] = {
    "llama": DecoderFamily(
        source="llama.modeling_llama:LlamaDecoderLayer",
        defaults={"max_position_embeddings": 2048}, mlp_bias="mlp_bias", **LLAMA_BIASES,
    ),
    "arcee": DecoderFamily(
        source="arcee.modeling_arcee:ArceeDecoderLayer",
        defaults={"max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "hidden_act": "relu2"}, mlp_bias="mlp_bias",
        gated=False, **LLAMA_BIASES,
    ),
    "cwm": DecoderFamily(
        source="cwm.modeling_cwm:CwmDecoderLayer",
        defaults={
            "max_position_embeddings": 131_072, "num_key_value_heads": 8, "head_dim": 128, "rms_norm_eps": 1e-5,
            "sliding_window": 8192, "rope_theta": 1_000_000.0,
            "rope_parameters": {
                "rope_type": "llama3", "rope_theta": 1_000_000.0, "factor": 16.0, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
            },
        },
        mlp_bias="mlp_bias", windows=_windows_but_every_fourth,
    ),
    "exaone": DecoderFamily(
        source="llama.modeling_llama:LlamaDecoderLayer",
        defaults={"max_position_embeddings": 4096, "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 500_000.0},
        aliases={"num_layers": "num_hidden_layers", "layer_norm_epsilon": "rms_norm_eps", "activation_function": "hidden_act"},
        names=TensorNames(
            base="transformer", layers="transformer.h", embedding="transformer.wte", final_norm="transformer.ln_f",
            qkv=("attn.attention.q_proj", "attn.attention.k_proj", "attn.attention.v_proj"), out="attn.attention.out_proj",
            gate="mlp.c_fc_0", up="mlp.c_fc_1", down="mlp.c_proj", before_attention="ln_1", before_feed_forward="ln_2",
        ),
        mlp_bias="mlp_bias", **LLAMA_BIASES,
    ),
    "helium": DecoderFamily(
        source="helium.modeling_helium:HeliumDecoderLayer",
        defaults={
            "max_position_embeddings": 4096, "num_key_value_heads": 20, "head_dim": 128, "rms_norm_eps": 1e-8,
            "rope_theta": 100_000.0,
        },
        qkv_bias="attention_bias", mlp_bias="mlp_bias", rope="neighbours",
    ),
    "internlm3": DecoderFamily(
        source="llama.modeling_llama:LlamaDecoderLayer",
        defaults={"max_position_embeddings": 32_768, "num_key_value_heads": 2, "head_dim": 128, "rms_norm_eps": 1e-5},
        aliases={"qkv_bias": "attention_bias", "bias": "mlp_bias"}, mlp_bias="mlp_bias", **LLAMA_BIASES,
    ),
    "iquestcoder": DecoderFamily(
        source="llama.modeling_llama:LlamaDecoderLayer",
        defaults={"max_position_embeddings": 131_072, "num_key_value_heads": 8, "head_dim": 128, "rms_norm_eps": 1e-5},
        mlp_bias="mlp_bias", **LLAMA_BIASES,
    ),
    "jais2": DecoderFamily(
        source="jais2.modeling_jais2:Jais2DecoderLayer",
        defaults={
            "max_position_embeddings": 8192, "layer_norm_eps": 1e-5, "hidden_act": "relu2", "attention_bias": True,
            "mlp_bias": True,
        },
        norm="layer", eps="layer_norm_eps", norm_bias=True, mlp_bias="mlp_bias", gated=False, **LLAMA_BIASES,
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
            "max_position_embeddings": 32_768, "sliding_window": 4096, "num_key_value_heads": 32, "max_window_layers": 28,
        },
        qkv_bias=True, windows=_windows_of_qwen,
    ),
    "qwen3": DecoderFamily(
        source="qwen3.modeling_qwen3:Qwen3DecoderLayer",
        defaults={
            "max_position_embeddings": 32_768, "sliding_window": 4096, "num_key_value_heads": 32, "head_dim": 128,
            "max_window_layers": 28,
        },
        qk_norm=True, windows=_windows_of_qwen, **LLAMA_BIASES,
    ),
    "seed_oss": DecoderFamily(
        source="seed_oss.modeling_seed_oss:SeedOssDecoderLayer",
        defaults={"max_position_embeddings": 524_288, "num_key_value_heads": 8, "attention_bias": True, "head_dim": 128},
        qkv_bias="attention_bias", out_bias="attention_out_bias", mlp_bias="mlp_bias",
    ),
    "smollm3": DecoderFamily(
        source="smollm3.modeling_smollm3:SmolLM3DecoderLayer",
        defaults={
            "max_position_embeddings": 32_768, "num_key_value_heads": 4, "rope_theta": 2_000_000.0, "tie_word_embeddings": True,
            "no_rope_layer_interval": 4,
        },
        mlp_bias="mlp_bias", windows=_windows_of_smollm, unrotated=_unrotated_in_smollm, **LLAMA_BIASES,
    ),
    "gemma": DecoderFamily(
        source="gemma.modeling_gemma:GemmaDecoderLayer",
        defaults=_GEMMA | {"num_key_value_heads": 16, "hidden_act": "gelu_pytorch_tanh", "max_position_embeddings": 8192},
        gain_plus_one=True, embedding_scale=_root_of_size, legacy_gelu=True, **LLAMA_BIASES,
    ),
    "gemma2": DecoderFamily(
        source="gemma2.modeling_gemma2:Gemma2DecoderLayer",
        defaults=_GEMMA_2, keys={"hidden_act": "hidden_activation"}, names=_FOUR_NORMS, norms=EVERYWHERE, **_LIKE_GEMMA_2,
    ),
    "vaultgemma": DecoderFamily(
        source="vaultgemma.modeling_vaultgemma:VaultGemmaDecoderLayer",
        defaults=_GEMMA_2, keys={"hidden_act": "hidden_activation"},
        names=TensorNames(before_feed_forward="pre_feedforward_layernorm"), **_LIKE_GEMMA_2,
    ),
    "gemma3_text": DecoderFamily(
        source="gemma3.modeling_gemma3:Gemma3DecoderLayer",
        defaults=_GEMMA | {
            "num_key_value_heads": 4, "hidden_activation": "gelu_pytorch_tanh", "max_position_embeddings": 131_072,
            "query_pre_attn_scalar": 256, "sliding_window": 4096, "sliding_window_pattern": 6, "rope_theta": 1_000_000.0,
            "rope_local_base_freq": 10_000.0,
        },
        keys={"hidden_act": "hidden_activation"}, names=_FOUR_NORMS, norms=EVERYWHERE, gain_plus_one=True, qk_norm=True,
        embedding_scale=_root_of_size, scale=_scale_of_gemma, logit_soft_cap="final_logit_softcapping",
        attention_soft_cap="attn_logit_softcapping", windows=_windows_by_pattern, bidirectional="use_bidirectional_attention",
        rope_by_kind=True, **LLAMA_BIASES,
    ),
    "gemma4_text": DecoderFamily(
        source="gemma4.modeling_gemma4:Gemma4TextDecoderLayer",
        defaults=_GEMMA | {
            "num_hidden_layers": _GEMMA_4_LAYERS, "num_key_value_heads": 4, "hidden_activation": "gelu_pytorch_tanh",
            "max_position_embeddings": 131_072, "sliding_window": 512, "global_head_dim": 512,
            "hidden_size_per_layer_input": 256, "vocab_size_per_layer_input": 262_144,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
                "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1_000_000.0},
            },
        },
        names=msgspec.structs.replace(
            _FOUR_NORMS, router="router.proj",
            experts=("experts.{expert}.gate_proj", "experts.{expert}.up_proj", "experts.{expert}.down_proj"),
        ),
        completed=_gemma_4_completed, heads=_heads_of_gemma_4,
        values_are_keys=lambda values: _full_layers_of_gemma_4(values) if values.flag("attention_k_eq_v") else (),
        inner_size=_inner_sizes_of_gemma_4, output_scale=True, only=_only_of_gemma_4,
        experts=ExpertsFamily(
            chosen="top_k_experts", normalized=True, own_norms=True,
            layers=lambda values: (values.flag("enable_moe_block"),) * values.size("num_hidden_layers"),
        ),
        merged_experts=MergedExperts("experts.gate_up_proj", "experts.down_proj"), **_LIKE_GEMMA_4,
    ),
    "gemma3n_text": DecoderFamily(
        source="gemma3n.modeling_gemma3n:Gemma3nTextDecoderLayer",
        defaults=_GEMMA | {
            "num_hidden_layers": _GEMMA_3N_LAYERS, "num_key_value_heads": 2, "hidden_activation": "gelu_pytorch_tanh",
            "max_position_embeddings": 32_768, "sliding_window": 512, "final_logit_softcapping": 30.0,
            "rope_theta": 1_000_000.0, "rope_local_base_freq": 10_000.0, "vocab_size": 262_400,
            "vocab_size_per_layer_input": 262_144, "hidden_size_per_layer_input": 256, "num_kv_shared_layers": 15,
            "laurel_rank": 64, "altup_num_inputs": 4, "altup_correct_scale": True,
        },
        names=_FOUR_NORMS, completed=lambda config: _with_layer_types(config, _GEMMA_3N_LAYERS, pattern=5),
        inner_size=_inner_sizes_of_gemma_3n, sparsity=_sparsity_of_gemma_3n, streams=True,
        only=lambda _: {"altup_active_idx": 0},
        unread=frozenset(("altup_coef_clip",)),  # which limits coefficients in training
        **_LIKE_GEMMA_4,
    ),
    "phi3": DecoderFamily(
        source="phi3.modeling_phi3:Phi3DecoderLayer",
        defaults={"max_position_embeddings": 4096, "original_max_position_embeddings": 4096, "rms_norm_eps": 1e-5},
        names=TensorNames(qkv=("self_attn.qkv_proj",), gate="mlp.gate_up_proj", up="mlp.gate_up_proj"),
        windows=_windows_everywhere, rope_share=1.0, longrope_names=("su", "yarn"),
    ),
    "phi": DecoderFamily(
        source="phi.modeling_phi:PhiDecoderLayer",
        defaults={"max_position_embeddings": 2048, "layer_norm_eps": 1e-5, "hidden_act": "gelu_new"},
        names=TensorNames(
            out="self_attn.dense", up="mlp.fc1", down="mlp.fc2", query_norm="self_attn.q_layernorm",
            key_norm="self_attn.k_layernorm", final_norm="model.final_layernorm",
        ),
        norm="layer", eps="layer_norm_eps", norm_bias=True, parallel=True, one_norm_if_parallel=True, qk_norm="qk_layernorm",
        qk_norm_bias=True, qkv_bias=True, out_bias=True, mlp_bias=True, gated=False, rope_share=0.5, head_bias=True,
    ),
    "granite": DecoderFamily(
        source="granite.modeling_granite:GraniteDecoderLayer",
        defaults={"max_position_embeddings": 2048, **_GRANITE}, mlp_bias="mlp_bias", **_LIKE_GRANITE, **LLAMA_BIASES,
    ),
    "hyperclovax": DecoderFamily(
        source="hyperclovax.modeling_hyperclovax:HyperCLOVAXDecoderLayer",
        defaults={"max_position_embeddings": 2048, **_GRANITE, "attention_multiplier": None, "use_post_norm": True},
        names=TensorNames(after_attention="post_norm1", after_feed_forward="post_norm2"), norms=EVERYWHERE, mlp_bias="mlp_bias",
        only=lambda _: {"use_post_norm": True},
        **{
            **_LIKE_GRANITE, **LLAMA_BIASES,
            "scale": lambda values, head_dim, _: (
                head_dim**-0.5 if values.get("attention_multiplier") is None else values.number("attention_multiplier")
            ),
            "logit_scale": lambda values: values.number("logits_scaling"),  # Granite divides by it
        },
    ),
    "granite_swa": DecoderFamily(
        source="granite_swa.modeling_granite_swa:GraniteSWADecoderLayer",
        defaults={
            "max_position_embeddings": 8192, "num_key_value_heads": 4, "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
            "sliding_window": 128, **_GRANITE,
        },
        mlp_bias="mlp_bias", sinks=True, windows=_windows_but_every_fourth, unrotated=_unrotated_in_granite_swa,
        **_LIKE_GRANITE, **LLAMA_BIASES,
    ),
    "qwen3_5_text": DecoderFamily(
        source="qwen3_5.modeling_qwen3_5:Qwen3_5DecoderLayer",
        defaults=_QWEN3_5 | {"num_key_value_heads": 4},
        names=TensorNames(recurrent="linear_attn", recurrent_in=("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a")),
        **_LIKE_QWEN3_5,
    ),
    "deepseek_v2": DecoderFamily(
        source="deepseek_v2.modeling_deepseek_v2:DeepseekV2DecoderLayer",
        defaults={
            "max_position_embeddings": 2048, **_LATENT, **_ROUTED, "num_experts_per_tok": 6, "n_routed_experts": 64,
            "n_shared_experts": 2, "topk_method": "greedy", "moe_intermediate_size": 1407,
        },
        aliases={"num_experts": "n_routed_experts"}, names=_SHARED_EXPERTS,
        experts=replace(_ROUTED_EXPERTS, scores="softmax", correction=False, group_score="greatest", normalized=False),
        **{**_LATENT_ATTENTION, "only": _only_of_deepseek_v2},
    ),
    "deepseek_v3": DecoderFamily(
        source="deepseek_v3.modeling_deepseek_v3:DeepseekV3DecoderLayer",
        defaults={
            "max_position_embeddings": 4096, "num_nextn_predict_layers": 1, **_LATENT, **_ROUTED, "n_routed_experts": 256,
            "n_group": 8, "topk_group": 4, "routed_scaling_factor": 2.5, "first_k_dense_replace": 3,
            "moe_intermediate_size": 2048,
        },
        aliases={"num_local_experts": "n_routed_experts", "num_mtp_layers": "num_nextn_predict_layers"}, names=_SHARED_EXPERTS,
        experts=_ROUTED_EXPERTS, **_LATENT_ATTENTION,
    ),
    "youtu": DecoderFamily(
        source="youtu.modeling_youtu:YoutuDecoderLayer",
        defaults={"max_position_embeddings": 131_072, "tie_word_embeddings": True, **_LATENT},
        unread=frozenset(("embedding_initializer_range",)), **_LATENT_ATTENTION,
    ),
    "glm4_moe_lite": DecoderFamily(
        source="glm4_moe_lite.modeling_glm4_moe_lite:Glm4MoeLiteDecoderLayer",
        defaults={
            "max_position_embeddings": 202_752, "rms_norm_eps": 1e-5, **_LATENT, "q_lora_rank": 768, "qk_nope_head_dim": 192,
            "v_head_dim": 256, **_ROUTED, "num_experts_per_tok": 4, "n_routed_experts": 64, "routed_scaling_factor": 1.8,
            "moe_intermediate_size": 1536,
        },
        aliases={"num_local_experts": "n_routed_experts"}, names=_SHARED_EXPERTS,
        experts=replace(_ROUTED_EXPERTS, layers=_sparse_layers_of_glm), **_LATENT_ATTENTION,
    ),
    "olmo2": DecoderFamily(
        source="olmo2.modeling_olmo2:Olmo2DecoderLayer",
        defaults={"max_position_embeddings": 2048, "rms_norm_eps": 1e-5}, names=_NORMS_AFTER, norms=AFTER, qk_norm=True,
        qk_norm_over="all_heads", **LLAMA_BIASES,
    ),
    "olmo3": DecoderFamily(
        source="olmo3.modeling_olmo3:Olmo3DecoderLayer",
        defaults={
            "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "sliding_window": 4096, "rope_theta": 500_000.0,
            "rope_local_base_freq": 500_000.0,
        },
        names=_NORMS_AFTER, norms=AFTER, qk_norm=True, qk_norm_over="all_heads",
        windows=lambda values: _windows(values, lambda layer: (layer + 1) % 4 != 0),
        rope_by_kind=True, **LLAMA_BIASES,
    ),
    "starcoder2": DecoderFamily(
        source="starcoder2.modeling_starcoder2:Starcoder2DecoderLayer",
        defaults={
            "max_position_embeddings": 4096, "num_key_value_heads": 2, "norm_epsilon": 1e-5, "hidden_act": "gelu_pytorch_tanh",
            "use_bias": True, "tie_word_embeddings": True,
        },
        names=TensorNames(up="mlp.c_fc", down="mlp.c_proj"), norm="layer", eps="norm_epsilon", norm_bias=True,
        qkv_bias="use_bias", out_bias="use_bias", mlp_bias="use_bias", gated=False, windows=_windows_everywhere,
    ),
    "stablelm": DecoderFamily(
        source="stablelm.modeling_stablelm:StableLmDecoderLayer",
        defaults={"max_position_embeddings": 4096, "num_key_value_heads": 32, "layer_norm_eps": 1e-5},
        names=TensorNames(query_norm="self_attn.q_layernorm.norms.{head}", key_norm="self_attn.k_layernorm.norms.{head}"),
        norm="layer", eps="layer_norm_eps", norm_bias=True, parallel="use_parallel_residual", one_norm_if_parallel=True,
        qk_norm="qk_layernorm", qk_norm_over="head_of_its_own", qkv_bias="use_qkv_bias", rope_share=0.25, has_head_dim=False,
    ),
    "cohere": DecoderFamily(
        source="cohere.modeling_cohere:CohereDecoderLayer",
        defaults={
            "max_position_embeddings": 8192, "layer_norm_eps": 1e-5, "logit_scale": 0.0625, "tie_word_embeddings": True,
            "rope_theta": 500_000.0,
        },
        norm="layer", eps="layer_norm_eps", parallel=True, one_norm_if_parallel=True, qk_norm="use_qk_norm",
        qk_norm_over="head_of_its_own", rope="neighbours", logit_scale=lambda values: values.number("logit_scale"),
        **LLAMA_BIASES,
    ),
    "cohere2": DecoderFamily(
        source="cohere2.modeling_cohere2:Cohere2DecoderLayer",
        defaults={
            "max_position_embeddings": 8192, "layer_norm_eps": 1e-5, "logit_scale": 0.0625, "tie_word_embeddings": True,
            "sliding_window": 4096, "sliding_window_pattern": 4,
        },
        norm="layer", eps="layer_norm_eps", parallel=True, one_norm_if_parallel=True, rope="neighbours",
        windows=_windows_by_pattern, unrotated=_full_layers, logit_scale=lambda values: values.number("logit_scale"),
        **LLAMA_BIASES,
    ),
    "glm": DecoderFamily(
        source="glm.modeling_glm:GlmDecoderLayer",
        defaults=_GLM,
        names=TensorNames(gate="mlp.gate_up_proj", up="mlp.gate_up_proj"), qkv_bias="attention_bias", rope="neighbours",
        rope_share=0.5,
    ),
    "glm4": DecoderFamily(
        source="glm4.modeling_glm4:Glm4DecoderLayer",
        defaults=_GLM,
        names=TensorNames(
            gate="mlp.gate_up_proj", up="mlp.gate_up_proj", after_attention="post_self_attn_layernorm",
            after_feed_forward="post_mlp_layernorm",
        ),
        norms=EVERYWHERE, qkv_bias="attention_bias", rope="neighbours", rope_share=0.5,
    ),
    "exaone4": DecoderFamily(
        source="exaone4.modeling_exaone4:Exaone4DecoderLayer",
        defaults={
            "max_position_embeddings": 2048, "num_key_value_heads": 32, "rms_norm_eps": 1e-5, "sliding_window": 4096,
            "sliding_window_pattern": 4,
        },
        names=_NORMS_AFTER, norms=AFTER, qk_norm=True, windows=_windows_by_pattern, unrotated=_full_layers,
    ),
    "ernie4_5": DecoderFamily(
        source="ernie4_5.modeling_ernie4_5:Ernie4_5DecoderLayer",
        defaults={
            "max_position_embeddings": 131_072, "num_key_value_heads": 2, "head_dim": 128, "rms_norm_eps": 1e-5,
            "tie_word_embeddings": True, "rope_theta": 500_000.0,
        },
        qkv_bias="use_bias", out_bias="use_bias", mlp_bias="use_bias", rope="neighbours",
    ),
    "hunyuan_v1_dense": DecoderFamily(
        source="hunyuan_v1_dense.modeling_hunyuan_v1_dense:HunYuanDenseV1DecoderLayer",
        defaults={"max_position_embeddings": 2048, "rms_norm_eps": 1e-5},
        names=TensorNames(query_norm="self_attn.query_layernorm", key_norm="self_attn.key_layernorm"), qk_norm=True,
        qk_norm_after_rope=True, rope_alpha=True, **LLAMA_BIASES,
    ),
    "nemotron": DecoderFamily(
        source="nemotron.modeling_nemotron:NemotronDecoderLayer",
        defaults={"max_position_embeddings": 4096, "norm_eps": 1e-5, "hidden_act": "relu2"}, norm="layer", eps="norm_eps",
        norm_bias=True, gain_plus_one=True, gated=False, mlp_bias="mlp_bias", rope_share=0.5, **LLAMA_BIASES,
    ),
    "gpt_neox": DecoderFamily(
        source="gpt_neox.modeling_gpt_neox:GPTNeoXLayer",
        defaults={
            "max_position_embeddings": 2048, "layer_norm_eps": 1e-5, "hidden_act": "gelu", "use_parallel_residual": True,
            "attention_bias": True,
        },
        keys={
            "rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct",
            "num_key_value_heads": "num_attention_heads",
        },
        names=TensorNames(
            base="gpt_neox", layers="gpt_neox.layers", embedding="gpt_neox.embed_in", final_norm="gpt_neox.final_layer_norm",
            head="embed_out", qkv=("attention.query_key_value",), qkv_by_head=True, out="attention.dense",
            up="mlp.dense_h_to_4h", down="mlp.dense_4h_to_h",
        ),
        norm="layer", eps="layer_norm_eps", norm_bias=True, parallel="use_parallel_residual", mlp_bias=True, gated=False,
        rope_share=0.25, has_head_dim=False, **LLAMA_BIASES,
    ),
    "gpt2": DecoderFamily(
        source="gpt2.modeling_gpt2:GPT2Block",
        defaults={
            "n_positions": 1024, "layer_norm_epsilon": 1e-5, "activation_function": "gelu_new", "scale_attn_weights": True,
            "tie_word_embeddings": True,
        },
        aliases={
            "hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head",
            "max_position_embeddings": "n_positions",
        },
        keys={
            "hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head",
            "num_key_value_heads": "n_head", "max_position_embeddings": "n_positions", "intermediate_size": "n_inner",
            "hidden_act": "activation_function",
        },
        names=TensorNames(
            base="transformer", layers="transformer.h", embedding="transformer.wte", positions="transformer.wpe",
            final_norm="transformer.ln_f", qkv=("attn.c_attn",), out="attn.c_proj", up="mlp.c_fc", down="mlp.c_proj",
            before_attention="ln_1", before_feed_forward="ln_2", transposed=True,
        ),
        norm="layer", eps="layer_norm_epsilon", norm_bias=True, qkv_bias=True, out_bias=True, mlp_bias=True, gated=False,
        inner_size=lambda values: values.size("intermediate_size", 4 * values.size("hidden_size")), scale=_scale_of_gpt2,
        rope=None, position_offset=0, has_head_dim=False,
    ),
    "opt": DecoderFamily(
        source="opt.modeling_opt:OPTDecoderLayer",
        defaults={
            "max_position_embeddings": 2048, "activation_function": "relu", "enable_bias": True, "tie_word_embeddings": True,
        },
        keys={
            "intermediate_size": "ffn_dim", "hidden_act": "activation_function", "num_key_value_heads": "num_attention_heads",
        },
        names=TensorNames(
            layers="model.decoder.layers", embedding="model.decoder.embed_tokens", positions="model.decoder.embed_positions",
            final_norm="model.decoder.final_layer_norm", out="self_attn.out_proj", up="fc1", down="fc2",
            before_attention="self_attn_layer_norm", before_feed_forward="final_layer_norm",
        ),
        norm="layer", eps=1e-5, norm_bias=True, qkv_bias="enable_bias", out_bias="enable_bias", mlp_bias="enable_bias",
        gated=False, rope=None, position_offset=2, has_head_dim=False,
        only=lambda values: {
            "do_layer_norm_before": True,
            "_remove_final_layer_norm": False,
            "layer_norm_elementwise_affine": True,
            "word_embed_proj_dim": values.get("hidden_size"),
        },
    ),
    "mixtral": DecoderFamily(
        source="mixtral.modeling_mixtral:MixtralDecoderLayer",
        defaults={
            "max_position_embeddings": 131_072, "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 1_000_000.0,
            "num_experts_per_tok": 2, "num_local_experts": 8,
        },
        aliases={"num_experts": "num_local_experts"},
        names=_MIXTRAL_EXPERTS,
        windows=_windows_everywhere,
        experts=ExpertsFamily(count="num_local_experts", inner_size="intermediate_size", normalized=True),
    ),
    "qwen2_moe": DecoderFamily(
        source="qwen2_moe.modeling_qwen2_moe:Qwen2MoeDecoderLayer",
        defaults={
            "max_position_embeddings": 32_768, "sliding_window": 4096, "num_key_value_heads": 16, "max_window_layers": 28,
            "qkv_bias": True, "decoder_sparse_step": 1, "moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632,
            "num_experts_per_tok": 4, "num_experts": 60,
        },
        qkv_bias="qkv_bias", windows=_windows_of_qwen2_moe,
        experts=ExpertsFamily(
            normalized="norm_topk_prob", shared_size=lambda values: values.size("shared_expert_intermediate_size"),
            shared_gate=True, layers=_sparse_layers_of_qwen,
        ),
    ),
    "qwen3_moe": DecoderFamily(
        source="qwen3_moe.modeling_qwen3_moe:Qwen3MoeDecoderLayer",
        defaults={
            "max_position_embeddings": 32_768, "sliding_window": 4096, "num_key_value_heads": 4, "decoder_sparse_step": 1,
            "moe_intermediate_size": 768, "num_experts_per_tok": 8, "num_experts": 128,
        },
        aliases={"num_local_experts": "num_experts"}, qk_norm=True,
        windows=lambda values: _windows_everywhere(_with_used_window(values)),
        experts=ExpertsFamily(normalized="norm_topk_prob", layers=_sparse_layers_of_qwen), **LLAMA_BIASES,
    ),
    "olmoe": DecoderFamily(
        source="olmoe.modeling_olmoe:OlmoeDecoderLayer",
        defaults={"max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "num_experts_per_tok": 8, "num_experts": 64},
        aliases={"num_local_experts": "num_experts"}, qk_norm=True, qk_norm_over="all_heads",
        experts=ExpertsFamily(inner_size="intermediate_size", normalized="norm_topk_prob"), **LLAMA_BIASES,
    ),
    "flex_olmo": DecoderFamily(
        source="flex_olmo.modeling_flex_olmo:FlexOlmoDecoderLayer",
        defaults={"max_position_embeddings": 4096, "rope_theta": 500_000.0, "num_experts_per_tok": 5, "num_experts": 7},
        aliases={"num_local_experts": "num_experts"}, names=_NORMS_AFTER, norms=AFTER, qk_norm=True, qk_norm_over="all_heads",
        experts=ExpertsFamily(inner_size="intermediate_size", normalized="norm_topk_prob"), **LLAMA_BIASES,
    ),
    "granitemoe": DecoderFamily(
        source="granitemoe.modeling_granitemoe:GraniteMoeDecoderLayer",
        defaults={"max_position_embeddings": 2048, "num_local_experts": 8, "num_experts_per_tok": 2, **_GRANITE},
        names=_GRANITE_EXPERTS, experts=_EXPERTS_OF_GRANITE, merged_experts=_MERGED_IN_GRANITE, **_LIKE_GRANITE, **LLAMA_BIASES,
    ),
    "granitemoeshared": DecoderFamily(
        source="granitemoeshared.modeling_granitemoeshared:GraniteMoeSharedDecoderLayer",
        defaults={
            "max_position_embeddings": 2048, "num_local_experts": 8, "num_experts_per_tok": 2, "shared_intermediate_size": 0,
            **_GRANITE,
        },
        names=_SHARED_IN_GRANITE,
        experts=replace(_EXPERTS_OF_GRANITE, shared_size=lambda values: values.get("shared_intermediate_size") or None),
        merged_experts=_MERGED_IN_GRANITE, **_LIKE_GRANITE, **LLAMA_BIASES,
    ),
    "gpt_oss": DecoderFamily(
        source="gpt_oss.modeling_gpt_oss:GptOssDecoderLayer",
        defaults={
            "max_position_embeddings": 131_072, "num_key_value_heads": 8, "head_dim": 64, "rms_norm_eps": 1e-5,
            "sliding_window": 128, "attention_bias": True, "num_local_experts": 128, "num_experts_per_tok": 4,
            "swiglu_alpha": 1.702, "swiglu_limit": 7.0, "rope_theta": 150_000.0,
            "rope_parameters": {
                "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
                "original_max_position_embeddings": 4096,
            },
        },
        aliases={"num_experts": "num_local_experts"}, names=TensorNames(router="mlp.router"), sinks=True,
        windows=lambda values: _windows(values, lambda layer: layer % 2 == 0),
        experts=ExpertsFamily(
            count="num_local_experts", inner_size="intermediate_size", scores="softmax_of_chosen", router_bias=True, bias=True,
            swiglu=("swiglu_alpha", "swiglu_limit"),
        ),
        merged_experts=MergedExperts("mlp.experts.gate_up_proj", "mlp.experts.down_proj", transposed=True), **LLAMA_BIASES,
    ),
    "glm4_moe": DecoderFamily(
        source="glm4_moe.modeling_glm4_moe:Glm4MoeDecoderLayer",
        defaults={
            "max_position_embeddings": 131_072,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-5,
            "moe_intermediate_size": 1408,
            "first_k_dense_replace": 1,
            "num_nextn_predict_layers": 1,
        }
        | _ROUTED,
        aliases={"num_local_experts": "n_routed_experts", "num_mtp_layers": "num_nextn_predict_layers"}, names=_SHARED_EXPERTS,
        qk_norm="use_qk_norm", qkv_bias="attention_bias", rope_share=0.5, experts=_ROUTED_EXPERTS,
    ),
    "ministral3": DecoderFamily(
        source="ministral3.modeling_ministral3:Ministral3DecoderLayer",
        defaults={
            "max_position_embeddings": 262_144, "num_key_value_heads": 8, "head_dim": 128, "rms_norm_eps": 1e-5,
            "rope_parameters": {
                "type": "yarn", "rope_theta": 1_000_000.0, "factor": 16.0, "original_max_position_embeddings": 16_384,
                "beta_fast": 32.0, "beta_slow": 1.0, "mscale_all_dim": 1.0, "mscale": 1.0, "llama_4_scaling_beta": 0.1,
            },
        },
        windows=_windows_everywhere, queries_grow=True,
    ),
    "apertus": DecoderFamily(
        source="apertus.modeling_apertus:ApertusDecoderLayer",
        defaults={
            "max_position_embeddings": 65_536, "rms_norm_eps": 1e-5, "hidden_act": "xielu",
            "rope_parameters": {
                "rope_type": "llama3", "rope_theta": 12_000_000.0, "factor": 8.0, "original_max_position_embeddings": 8192,
                "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            },
        },
        names=TensorNames(
            before_attention="attention_layernorm", before_feed_forward="feedforward_layernorm", activation="mlp.act_fn",
        ),
        qk_norm=True, gated=False, **LLAMA_BIASES,
    ),
    "lfm2": DecoderFamily(
        source="lfm2.modeling_lfm2:Lfm2DecoderLayer",
        defaults=_LFM2 | {"block_multiple_of": 256, "block_ffn_dim_multiplier": 1.0, "block_auto_adjust_ff_dim": True},
        names=_LFM2_NAMES, inner_size=_inner_of_lfm2,
        unread=frozenset((
            "block_dim", "block_mlp_init_scale", "block_norm_eps", "block_out_init_scale", "block_use_swiglu",
            "block_use_xavier_init", "conv_dim", "conv_dim_out", "conv_use_xavier_init", "num_heads", "theta", "use_pos_enc",
        )),
        **_LIKE_LFM2,
    ),
    "phimoe": DecoderFamily(
        source="phimoe.modeling_phimoe:PhimoeDecoderLayer",
        defaults={
            "max_position_embeddings": 131_072, "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 1_000_000.0,
            "num_experts_per_tok": 2, "num_local_experts": 16, "router_jitter_noise": 0.01,
        },
        names=_MIXTRAL_EXPERTS,
        norm="layer", norm_bias=True, windows=_windows_everywhere, head_bias="lm_head_bias", completed=_with_scales_of_phimoe,
        experts=ExpertsFamily(
            count="num_local_experts", inner_size="intermediate_size", scores="sparse_mix",
            threshold=lambda values: 2 * values.number("router_jitter_noise"),
        ),
        only=lambda _: {"num_experts_per_tok": 2},  # the class has no other number
        unread=frozenset(("input_jitter_noise",)), **LLAMA_BIASES,
    ),
    "qwen3_5_moe_text": DecoderFamily(
        source="qwen3_5_moe.modeling_qwen3_5_moe:Qwen3_5MoeDecoderLayer",
        defaults=_QWEN3_5 | {"num_key_value_heads": 2, "num_experts_per_tok": 8, "num_experts": 256, **_QWEN_EXPERTS},
        names=TensorNames(recurrent="linear_attn", recurrent_in=("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a")),
        experts=ExpertsFamily(
            normalized=True, shared_size=lambda values: values.size("shared_expert_intermediate_size"), shared_gate=True,
        ),
        inner_size=lambda _: 1, unread=frozenset(("router_aux_loss_coef",)), **_LIKE_QWEN3_5,
    ),
    "qwen3_next": DecoderFamily(
        source="qwen3_next.modeling_qwen3_next:Qwen3NextDecoderLayer",
        defaults=_QWEN3_5 | {
            "num_key_value_heads": 2, "num_experts_per_tok": 10, "num_experts": 512, "norm_topk_prob": True,
            "decoder_sparse_step": 1, **_QWEN_EXPERTS,
        },
        names=TensorNames(recurrent="linear_attn", recurrent_in=("in_proj_qkvz", "in_proj_ba")),
        experts=ExpertsFamily(
            normalized="norm_topk_prob", shared_size=lambda values: values.size("shared_expert_intermediate_size"),
            shared_gate=True, layers=_sparse_layers_of_qwen,
        ),
        unread=frozenset(("router_aux_loss_coef",)), **_LIKE_QWEN3_5,
    ),
    "lfm2_moe": DecoderFamily(
        source="lfm2_moe.modeling_lfm2_moe:Lfm2MoeDecoderLayer",
        defaults=_LFM2 | {
            "moe_intermediate_size": 1792, "num_dense_layers": 2, "num_experts_per_tok": 4, "num_experts": 32,
            "use_expert_bias": True, "routed_scaling_factor": 1.0, "norm_topk_prob": True,
        },
        names=msgspec.structs.replace(
            _LFM2_NAMES, router="feed_forward.gate", correction="feed_forward.expert_bias",
            experts=tuple(f"feed_forward.experts.{{expert}}.w{number}" for number in (1, 3, 2)),
        ),
        experts=ExpertsFamily(
            scores="sigmoid", correction="use_expert_bias", normalized="norm_topk_prob", normal_eps=1e-6,
            scale="routed_scaling_factor",
            layers=lambda values: (
                layer >= values.get("num_dense_layers") for layer in range(values.size("num_hidden_layers"))
            ),
        ),
        **_LIKE_LFM2,
    ),
    "mamba2": DecoderFamily(
        source="mamba2.modeling_mamba2:Mamba2Block",
        defaults={
            "max_position_embeddings": 2**20, "num_attention_heads": 1, "num_heads": 128, "head_dim": 64, "state_size": 128,
            "n_groups": 8, "conv_kernel": 4, "expand": 2, "use_conv_bias": True, "layer_norm_epsilon": 1e-5,
        },
        keys={
            "head_dim": "attention_head_dim",  # it has none
            "rms_norm_eps": "layer_norm_epsilon", "mamba_hidden_act": "hidden_act", "mamba_n_heads": "num_heads",
            "mamba_d_head": "head_dim", "mamba_d_state": "state_size", **_MAMBA_2_WITHOUT_PREFIX,
        },
        names=_NAMES_OF_MAMBA_2, norms=frozenset(("before_attention",)),
        parts=lambda values: (("recurrent",),) * values.size("num_hidden_layers"), recurrent=_mamba_2, inner_size=lambda _: 1,
        rope=None, unread=_UNREAD_OF_MAMBA,
    ),
    "bamba": DecoderFamily(
        source="bamba.modeling_bamba:BambaDecoderLayer",
        defaults={"max_position_embeddings": 262_144, "num_key_value_heads": 8, "rms_norm_eps": 1e-5, **_MAMBA_2},
        keys={"mamba_hidden_act": "hidden_act"}, names=_NAMES_OF_BAMBA, mlp_bias="mlp_bias", parts=_parts_of_bamba,
        recurrent=_mamba_2, rope_share=0.5, unread=_UNREAD_OF_MAMBA, **LLAMA_BIASES,
    ),
    "falcon_h1": DecoderFamily(
        source="falcon_h1.modeling_falcon_h1:FalconH1DecoderLayer",
        defaults={
            "max_position_embeddings": 8192, "num_key_value_heads": 8, "rms_norm_eps": 1e-5, **_MAMBA_2, "mamba_d_ssm": 1024,
            "mamba_norm_before_gate": True,
            **dict.fromkeys(
                (
                    "embedding_multiplier", "lm_head_multiplier", "key_multiplier", "attention_in_multiplier",
                    "attention_out_multiplier", "ssm_in_multiplier", "ssm_out_multiplier",
                ),
                1.0,
            ),
        },
        keys={"mamba_hidden_act": "hidden_act"}, names=_NAMES_OF_BAMBA, mlp_bias="mlp_bias",
        parts=lambda values: (("attention", "recurrent", "feed_forward"),) * values.size("num_hidden_layers"),
        recurrent=_mamba_2_of_falcon, scale=_scale_of_falcon_h1,
        embedding_scale=lambda values: values.number("embedding_multiplier"),
        # Values are made of scaled inputs, too.
        attention_out_scale=lambda values: values.number("attention_in_multiplier") * values.number("attention_out_multiplier"),
        mlp_scales=lambda values: values.numbers("mlp_multipliers", 2),
        logit_scale=lambda values: values.number("lm_head_multiplier"),
        unread=_UNREAD_OF_MAMBA | {"layers_block_type", "mamba_use_mlp", "mlp_expansion_factor", "attn_layer_indices"},
        **LLAMA_BIASES,
    ),
    "granitemoehybrid": DecoderFamily(
        source="granitemoehybrid.modeling_granitemoehybrid:GraniteMoeHybridDecoderLayer",
        defaults={
            "max_position_embeddings": 2048, "shared_intermediate_size": 1024, "num_local_experts": 8, "num_experts_per_tok": 2,
            **_GRANITE, **_MAMBA_2,
        },
        aliases={"layers_block_type": "layer_types"}, keys={"mamba_hidden_act": "hidden_act"},
        names=msgspec.structs.replace(
            _SHARED_IN_GRANITE, **dict(zip(("gate", "up", "down"), _SHARED_IN_GRANITE.shared, strict=True)), recurrent="mamba",
        ),
        inner_size=lambda values: values.size("shared_intermediate_size"),
        experts=replace(
            _EXPERTS_OF_GRANITE, shared_size=lambda values: values.size("shared_intermediate_size"),
            layers=lambda values: (values.get("num_local_experts") != 0,) * values.size("num_hidden_layers"),
        ),
        merged_experts=_MERGED_IN_GRANITE, parts=_parts_by_type, recurrent=_mamba_2,
        unrotated=lambda values: (values.get("position_embedding_type") != "rope",) * values.size("num_hidden_layers"),
        unread=_UNREAD_OF_MAMBA | {"num_experts_per_tok", "attention_multiplier"}, **_LIKE_GRANITE, **LLAMA_BIASES,
    ),
    "nemotron_h": DecoderFamily(
        source="nemotron_h.modeling_nemotron_h:NemotronHBlock",
        defaults={
            "max_position_embeddings": 4096, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
            "intermediate_size": 21_504, "mlp_hidden_act": "relu2", "layer_norm_epsilon": 1e-5, "mamba_num_heads": 128,
            "mamba_head_dim": 64, "ssm_state_size": 128, "n_groups": 8, "conv_kernel": 4, "expand": 2, "use_conv_bias": True,
            "moe_intermediate_size": 7688, "moe_shared_expert_intermediate_size": 7688, **_ROUTED, "n_routed_experts": 8,
            "num_experts_per_tok": 2,
        },
        aliases={"num_local_experts": "n_routed_experts", "layer_types": "layers_block_type"},
        keys={
            "rms_norm_eps": "layer_norm_epsilon", "hidden_act": "mlp_hidden_act", "mamba_n_heads": "mamba_num_heads",
            "mamba_d_head": "mamba_head_dim", "mamba_d_state": "ssm_state_size", **_MAMBA_2_WITHOUT_PREFIX,
        },
        names=msgspec.structs.replace(
            _NAMES_OF_MAMBA_2, qkv=("mixer.q_proj", "mixer.k_proj", "mixer.v_proj"), out="mixer.o_proj", up="mixer.up_proj",
            down="mixer.down_proj", router="mixer.gate", correction="mixer.gate.e_score_correction_bias",
            experts=("", "mixer.experts.{expert}.up_proj", "mixer.experts.{expert}.down_proj"),
            shared=("", "mixer.shared_experts.up_proj", "mixer.shared_experts.down_proj"), narrow="mixer.fc1_latent_proj",
            widen="mixer.fc2_latent_proj", before_feed_forward="norm",
        ),
        mlp_bias="mlp_bias", gated=False, completed=_with_layers_of_nemotron_h, parts=_parts_of_nemotron_h, recurrent=_mamba_2,
        rope=None,
        experts=replace(
            _ROUTED_EXPERTS, shared_size=lambda values: values.size("moe_shared_expert_intermediate_size"),
            layers=lambda values: (each == "moe" for each in values.get("layers_block_type")), latent_size="moe_latent_size",
        ),
        only=lambda _: {"sliding_window": None},
        unread=_UNREAD_OF_MAMBA | {
            *_ROUTED,  # if no layer has experts
            "n_shared_experts", "moe_intermediate_size", "moe_shared_expert_intermediate_size", "moe_shared_expert_overlap",
            "moe_latent_size", "mtp_layers_block_type", "hybrid_override_pattern", "mtp_hybrid_override_pattern", "norm_eps",
            "mamba_proj_bias", "num_hidden_layers",
        },
        **LLAMA_BIASES,
    ),
}
