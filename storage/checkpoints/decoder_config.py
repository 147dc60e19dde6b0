"""Makes the description of a model (`decoder`) from its config.json, with the table of families. Needs no transformers.

It reads configs as transformers 4 and 5 write them. A config that the table does not describe is refused here. transformers'
modules then run the model, in a float dtype.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Final

import msgspec

from storage.checkpoints.decoder import (
    DECODER_KEY,
    EMBEDDER_KEY,
    Activation,
    Attention,
    Decoder,
    Experts,
    ExpertsLatent,
    FeedForward,
    Latent,
    Layer,
    LayerInput,
    Norm,
    QKNorm,
    Rotation,
    Router,
    Streams,
)
from storage.checkpoints.decoder_families import (
    DECODER_FAMILIES,
    DecoderFamily,
    UnsupportedConfig,
    Values,
    is_number,
)
from storage.errors import ArchitectureUnsupported

_ACTIVATIONS: Final[Mapping[str, Activation]] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
    "xielu": "xielu",
}  # by transformers' names, several of which are one function

_ROPE_COMMON: Final = frozenset(
    {"rope_type", "type", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings"}
)
_ROPE_OPTIONAL: Final[dict[str, frozenset[str]]] = {
    "default": frozenset({"factor"}),  # transformers reads no factor either
    "proportional": frozenset({"factor"}),
    "yarn": frozenset({"attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"}),
    "longrope": frozenset({"attention_factor"}),
}
_ROPE_NEEDED: Final[dict[str, tuple[str, ...]]] = {
    "default": (),
    "proportional": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
    "longrope": ("factor", "original_max_position_embeddings", "short_factor", "long_factor"),
}

_MOST_LAYERS: Final = 10_000

# Keys that do not change logits: training, generation, tokens' ids, the file itself.
_HARMLESS: Final = frozenset((
    DECODER_KEY, "model_type", "architectures", "transformers_version", "dtype", "torch_dtype", "auto_map", "name_or_path",
    "use_cache", "use_bfloat16", "initializer_range", "init_std", "initializer_factor", "attention_dropout", "attn_pdrop",
    "embd_pdrop", "resid_pdrop", "hidden_dropout", "residual_dropout", "embedding_dropout", "activation_dropout",
    "classifier_dropout", "dropout", "layerdrop", "bos_token_id", "eos_token_id", "eod_token_id", "pad_token_id",
    "sep_token_id", "unk_token_id", "cls_token_id", "decoder_start_token_id", "tokenizer_class", "prefix",
    "task_specific_params", "problem_type", "id2label", "label2id", "num_labels", "finetuning_task", "is_decoder",
    "is_encoder_decoder", "add_cross_attention", "cross_attention_hidden_size", "tie_encoder_decoder", "output_attentions",
    "output_hidden_states", "output_router_logits", "output_scores", "return_dict", "return_dict_in_generate",
    "torchscript", "pruned_heads", "chunk_size_feed_forward", "gradient_checkpointing", "pretraining_tp", "max_length",
    "min_length", "do_sample", "temperature", "top_k", "top_p", "typical_p", "repetition_penalty", "num_beams",
    "num_beam_groups", "diversity_penalty", "early_stopping", "length_penalty", "no_repeat_ngram_size",
    "encoder_no_repeat_ngram_size", "bad_words_ids", "suppress_tokens", "begin_suppress_tokens", "num_return_sequences",
    "exponential_decay_length_penalty", "forced_bos_token_id", "forced_eos_token_id", "remove_invalid_values",
    "tf_legacy_loss", "summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels",
    "summary_first_dropout", "reorder_and_upcast_attn", "attn_implementation", "cache_implementation",
    "num_nextn_predict_layers", "mlp_dim", "rms_norm", "embedding_size", "use_mrope", "unsloth_fixed", "unsloth_version",
    "loss_type", "is_matryoshka", "matryoshka_dimensions", EMBEDDER_KEY,
    "router_aux_loss_coef", "router_jitter_noise", "seq_aux", "aux_loss_alpha", "ep_size", "num_mtp_layers",
))  # fmt: skip
# Keys of one family that another's class does not read: a Llama's config with a window has none.
_KEYS_OF_FAMILIES: Final = frozenset((
    "sliding_window", "use_sliding_window", "max_window_layers", "layer_types", "sliding_window_pattern", "no_rope_layers",
    "no_rope_layer_interval", "head_dim", "hidden_activation", "intermediate_size", "rope_theta", "rope_scaling",
    "rope_parameters", "partial_rotary_factor", "original_max_position_embeddings", "rope_local_base_freq",
    "attention_bias", "mlp_bias", "use_bias", "num_key_value_heads", "rotary_dim", "qk_norm", "use_qk_norm",
    "query_pre_attn_scalar", "mlp_only_layers", "decoder_sparse_step", "moe_intermediate_size",
))  # fmt: skip


def decoder_of(config: Mapping[str, Any]) -> Decoder:
    """Describes what the layers of a model compute. config: its parsed config.json.

    The config.json of a published model contains the description. For others the table of families makes it.

    Raises UnsupportedConfig, whose message names everything that Lamina's layers do not run, and ArchitectureUnsupported for a
    missing or impossible value.
    """
    if (published := config.get(DECODER_KEY)) is not None:
        try:
            return msgspec.convert(published, Decoder)
        except msgspec.ValidationError as error:
            raise UnsupportedConfig(f"the published description of its layers cannot be read here: {error}") from error
    model_type = str(config.get("model_type"))
    if model_type not in DECODER_FAMILIES:
        raise UnsupportedConfig(f"Lamina's own layers do not run a {model_type!r}")
    family = DECODER_FAMILIES[model_type]
    values = Values(family, family.completed(config))
    decoder = _described(family, values)
    obstacles = [*values.obstacles, *_obstacles(family, values, decoder, config)]
    known = values.read | family.aliases.keys() | family.unread | _HARMLESS | _KEYS_OF_FAMILIES
    if unknown := sorted(key for key, value in config.items() if value and key not in known and not key.startswith("_")):
        obstacles.append(f"the keys {', '.join(unknown)}, which may change numbers")
    if obstacles:
        raise UnsupportedConfig("the lean layers do not run " + "; ".join(obstacles))
    return decoder


def with_description(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Adds the description of the model's layers to a config.json, as published models have it.

    Returns the config unchanged if the table does not describe the model. transformers' modules then run it.
    """
    try:
        return {**config, DECODER_KEY: msgspec.to_builtins(decoder_of(config))}
    except UnsupportedConfig:
        return config


def _described(family: DecoderFamily, values: Values) -> Decoder:
    hidden, heads = values.size("hidden_size"), values.size("num_attention_heads")
    head_dim = max(1, hidden // heads)
    if family.has_head_dim:
        head_dim = values.size("head_dim", head_dim)
    norm = Norm(
        kind=family.norm,
        eps=values.number(family.eps) if isinstance(family.eps, str) else family.eps,
        gain_plus_one=family.gain_plus_one,
        biased=family.norm_bias,
    )
    latent = _latent(values) if family.latent else None
    if latent is not None:
        head_dim = latent.rank + latent.rope_size
    layers = _layers(family, values, norm, heads, head_dim, latent)
    kinds = tuple(dict.fromkeys(layers))
    names, has_head = family.names, values.get(EMBEDDER_KEY) is None
    if layers[0].parallel and family.one_norm_if_parallel:
        names = msgspec.structs.replace(names, before_feed_forward=names.before_attention)
    return Decoder(
        num_layers=len(layers),
        hidden_size=hidden,
        vocab_size=values.size("vocab_size"),
        max_positions=values.size("max_position_embeddings", values.default("max_position_embeddings")),
        tied=values.flag("tie_word_embeddings") and has_head,
        kinds=kinds,
        order=tuple(map(kinds.index, layers)),
        ropes=_ropes(family, values, {kind: _rotated_size(layers, head_dim, kind) for kind in ("all", "windows")}),
        final_norm=norm,
        layer_input=_layer_input(family, values, norm),
        streams=Streams(
            count=values.size("altup_num_inputs"),
            norm=norm,
            rank=values.size("laurel_rank"),
            scaled=values.flag("altup_correct_scale"),
        )
        if family.streams
        else None,
        embedding_scale=family.embedding_scale(values),
        position_offset=family.position_offset,
        logit_scale=family.logit_scale(values),
        logit_soft_cap=values.soft_cap(family.logit_soft_cap),
        head_bias=values.flag(family.head_bias),
        causal=not values.flag(family.bidirectional),
        has_head=has_head,
        names=names,
    )


def _layer_input(family: DecoderFamily, values: Values, norm: Norm) -> LayerInput | None:
    if family.layer_input is None or not values.get(family.layer_input):
        return None
    own, rows = values.size("vocab_size"), values.size("vocab_size_per_layer_input")
    return LayerInput(size=values.size(family.layer_input), norm=norm, vocab_size=None if rows == own else rows)


def _rotated_size(layers: list[Layer], head_dim: int, rope: str) -> int:
    """How many numbers of a head the rotation named `rope` may rotate. `head_dim` if no layer uses this rotation."""
    found = (layer.attention for layer in layers if layer.attention is not None and layer.attention.rope == rope)
    return next((each.head_dim if each.latent is None else each.latent.rope_size for each in found), head_dim)


def _latent(values: Values) -> Latent:
    values.get("qk_head_dim")  # the sum of two others
    if values.get("q_lora_rank") is None and values.flag("attention_bias"):
        values.obstacles.append("biases of latents, but not of queries")
    return Latent(
        rank=values.size("kv_lora_rank"),
        nope_size=values.size("qk_nope_head_dim"),
        rope_size=values.size("qk_rope_head_dim"),
        value_size=values.size("v_head_dim"),
        query_rank=None if values.get("q_lora_rank") is None else values.size("q_lora_rank"),
        norm=Norm(eps=1e-6),  # the classes give these norms no eps
    )


def _layers(family: DecoderFamily, values: Values, norm: Norm, heads: int, head_dim: int, latent: Latent | None) -> list[Layer]:
    num_layers = values.size("num_hidden_layers")
    if num_layers > _MOST_LAYERS:  # a list of as many would fill the memory
        raise ArchitectureUnsupported(f"config.json says {num_layers} layers, and at most {_MOST_LAYERS} can be run")
    qk_norm = None
    if values.flag(family.qk_norm):
        of_heads = msgspec.structs.replace(norm, biased=family.qk_norm_bias)
        qk_norm = QKNorm(norm=of_heads, over=family.qk_norm_over, after_rope=family.qk_norm_after_rope)
    dense: list[FeedForward] | list[None] = [None] * num_layers
    activation = _activation(family, values)
    sparse, experts, shared = _experts(family, values, activation)
    gate_scale, out_scale = family.mlp_scales(values)
    if not all(sparse) or (experts is not None and experts.own_norms):
        sizes, shares = family.inner_size(values), family.sparsity(values) or (0.0,) * num_layers
        dense = [
            FeedForward(
                inner_size=size,
                activation=activation,
                sparsity=share,
                gated=family.gated,
                biased=values.flag(family.mlp_bias),
                gate_scale=gate_scale,
                out_scale=out_scale,
            )
            for size, share in zip([sizes] * num_layers if isinstance(sizes, int) else sizes, shares, strict=False)
        ]
    windows, unrotated = tuple(family.windows(values)), tuple(family.unrotated(values))
    if values.flag(family.bidirectional):  # the config counts both sides
        windows = tuple(window and window // 2 + 1 for window in windows)
    parts = tuple(family.parts(values))
    if {len(windows), len(unrotated), len(sparse), len(parts), len(dense)} != {num_layers}:
        values.obstacles.append("layer lists of another length than the model")
        dense = [None] * num_layers
        windows, unrotated, sparse = (None,) * num_layers, (False,) * num_layers, (experts is not None,) * num_layers
        parts = parts[:1] * num_layers
    recurrent = None if family.recurrent is None else family.recurrent(values)
    heads_of_layers = [(values.size("num_key_value_heads", heads) if latent is None else 1, head_dim)] * num_layers
    if family.heads is not None:
        heads_of_layers = [*family.heads(values)]

    def of_layer(layer: int) -> FeedForward | None:
        if sparse[layer] and (experts is None or not experts.own_norms):
            return shared
        return dense[layer]

    kv_layers, are_keys = family.kv_layers(values), family.values_are_keys(values)
    ropes = ["windows" if family.rope_by_kind and window is not None else "all" for window in windows]
    return [
        Layer(
            attention=Attention(
                num_heads=heads,
                num_kv_heads=heads_of_layers[layer][0],
                latent=latent,
                head_dim=heads_of_layers[layer][1],
                scale=family.scale(values, heads_of_layers[layer][1], layer),
                soft_cap=values.soft_cap(family.attention_soft_cap),
                window=windows[layer],
                rope=None if unrotated[layer] or family.rope is None else ropes[layer],
                qk_norm=qk_norm,
                sinks=family.sinks,
                output_gate=family.output_gate,
                values_are_keys=layer in are_keys and layer not in kv_layers,
                value_norm=norm if family.value_norm else None,
                kv_layer=kv_layers.get(layer),
                qkv_bias=values.flag(family.qkv_bias),
                out_bias=values.flag(family.out_bias),
                out_scale=family.attention_out_scale(values),
            )
            if "attention" in parts[layer]
            else None,
            recurrent=recurrent if "recurrent" in parts[layer] else None,
            feed_forward=None if "feed_forward" not in parts[layer] else of_layer(layer),
            experts=experts if sparse[layer] and "feed_forward" in parts[layer] else None,
            parallel=values.flag(family.parallel),
            residual_scale=family.residual_scale(values),
            output_scale=family.output_scale,
            **{
                place: norm
                for place in family.norms
                if ("feed_forward" in parts[layer] if place.endswith("feed_forward") else parts[layer] != ("feed_forward",))
            },
        )
        for layer in range(num_layers)
    ]


def _experts(
    family: DecoderFamily, values: Values, activation: Activation
) -> tuple[tuple[bool, ...], Experts | None, FeedForward | None]:
    """Returns which layers have experts, the experts, and the shared expert of these layers, which every token goes through."""
    if (row := family.experts) is None:
        return (False,) * values.size("num_hidden_layers"), None, None
    sparse = tuple(row.layers(values))
    if not any(sparse):
        for key in (row.count, row.chosen, row.inner_size):
            values.get(key)
        return sparse, None, None
    groups, chosen_groups = (1, 1) if row.groups is None else (values.size(key, 1) for key in row.groups)
    router = Router(
        num_experts=values.size(row.count),
        chosen=values.size(row.chosen, values.default(row.chosen)),
        scores=row.scores,
        biased=row.router_bias,
        corrected=values.flag(row.correction),
        groups=groups,
        chosen_groups=chosen_groups,
        group_score=row.group_score,
        normalized=values.flag(row.normalized),
        normal_eps=row.normal_eps,
        scale=1.0 if row.scale is None else values.number(row.scale),
        threshold=row.threshold(values),
    )
    latent = None
    if row.latent_size is not None and values.get(row.latent_size) is not None:
        latent = ExpertsLatent(size=values.size(row.latent_size), biased=values.flag(family.mlp_bias))
    in_group, rest = divmod(router.num_experts, groups)
    if rest or chosen_groups > groups or router.chosen > in_group * chosen_groups or (groups > 1 and in_group < 2):
        values.obstacles.append(f"{router.chosen} of {router.num_experts} experts in {chosen_groups} of {groups} groups")
    each = FeedForward(
        inner_size=values.size(row.inner_size),
        activation=activation if row.swiglu is None else "swiglu",
        swiglu=None if row.swiglu is None else (values.number(row.swiglu[0]), values.number(row.swiglu[1])),
        gated=family.gated,
        biased=row.bias,
    )
    shared = None
    if (size := row.shared_size(values)) is not None:
        biased = values.flag(family.mlp_bias)
        shared = FeedForward(inner_size=size, activation=activation, gated=family.gated, biased=biased)
    return (
        sparse,
        Experts(router=router, each=each, shared_gate=row.shared_gate, latent=latent, own_norms=row.own_norms),
        shared,
    )


def _activation(family: DecoderFamily, values: Values) -> Activation:
    name = values.get("hidden_act") or "silu"
    if name == "gelu" and family.legacy_gelu:
        name = "gelu_pytorch_tanh"
    if name not in _ACTIVATIONS or (name == "xielu" and not family.names.activation):
        values.obstacles.append(f"activation {name!r}")
    return _ACTIVATIONS.get(name, "silu")


def _ropes(family: DecoderFamily, values: Values, sizes: Mapping[str, int]) -> dict[str, Rotation]:
    """The rotations of a model, by their names in the description.

    sizes: how many numbers of a head each rotation may rotate, by the same names.
    """
    if family.rope is None:
        return {}
    if not family.rope_by_kind:
        return {"all": _rope(family, values, _rope_parameters(family, values), sizes["all"])}
    given = values.get("rope_parameters") or values.default("rope_parameters") or {}
    found = {kind: dict(given.get(kind) or {"rope_type": "default"}) for kind in ("full_attention", "sliding_attention")}
    found["full_attention"] |= values.get("rope_scaling") or {}
    for kind, theta in (("full_attention", "rope_theta"), ("sliding_attention", "rope_local_base_freq")):
        found[kind].setdefault("rope_theta", values.get(theta))
    return {
        "all": _rope(family, values, _completed(family, values, found["full_attention"]), sizes["all"]),
        "windows": _rope(family, values, _completed(family, values, found["sliding_attention"]), sizes["windows"]),
    }


def _rope(family: DecoderFamily, values: Values, parameters: dict[str, Any], head_dim: int) -> Rotation:
    rotated = head_dim
    growth: tuple[float, int] | None = None
    share = parameters["partial_rotary_factor"]
    alpha: Any = parameters.get("alpha")
    if family.rope_alpha and parameters["rope_type"] == "dynamic" and is_number(alpha) and alpha > 0 and head_dim > 2:
        theta = parameters["rope_theta"] * alpha ** (head_dim / (head_dim - 2))
        parameters = {"rope_type": "default", "rope_theta": theta, "partial_rotary_factor": share}
    if family.queries_grow:
        beta, context = parameters.pop("llama_4_scaling_beta", None), parameters.get("original_max_position_embeddings")
        parameters.pop("max_position_embeddings", None)
        if is_number(beta) and type(context) is int and context > 0:
            growth = float(beta), context
        else:
            values.obstacles.append(f"queries that grow by {beta!r} after {context!r} positions")
    parameters = {key: value for key, value in parameters.items() if key not in family.rope_ignores}
    in_frequencies = parameters["rope_type"] == "proportional" and is_number(share) and 0 <= share <= 1  # 0 for the other pairs
    if family.rope_share is not None and not in_frequencies and is_number(share) and 0 < share <= 1:
        rotated = int(head_dim * share)
    elif share != 1.0 and not in_frequencies:
        values.obstacles.append(f"a rotation of {share!r} of a head")
    if rotated < 2 or rotated % 2 or not _rope_supported(parameters, rotated):
        values.obstacles.append(f"rotation {parameters!r}")
    return Rotation(parameters=parameters, rotated=rotated, adjacent=family.rope == "neighbours", query_growth=growth)


def _rope_parameters(family: DecoderFamily, values: Values) -> dict[str, Any]:
    """The parameters of the rotation as one flat dict.

    A config has them in `rope_parameters` (transformers 5), or in `rope_theta` and `rope_scaling`.
    """
    given = values.get("rope_scaling") or values.get("rope_parameters") or values.default("rope_parameters") or {}
    return _completed(family, values, given if isinstance(given, Mapping) else {"rope_type": repr(given)})


def _completed(family: DecoderFamily, values: Values, given: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of a rotation: those `given` in a config, and values for those that it leaves out."""
    parameters = {key: value for key, value in given.items() if value is not None}
    parameters.setdefault("rope_type", parameters.get("type", "default"))
    parameters.setdefault("rope_theta", values.get("rope_theta") or 10_000.0)
    original = values.get("original_max_position_embeddings")
    if original is not None:
        parameters["original_max_position_embeddings"] = original
    parameters.setdefault("original_max_position_embeddings", values.get("max_position_embeddings"))
    parameters.setdefault("partial_rotary_factor", values.get("partial_rotary_factor") or family.rope_share or 1.0)
    if parameters["rope_type"] in family.longrope_names:
        parameters["rope_type"] = "longrope"
    original = parameters["original_max_position_embeddings"]
    if parameters["rope_type"] == "longrope" and is_number(original) and original > 0:
        parameters.setdefault(
            "factor", values.size("max_position_embeddings", values.default("max_position_embeddings")) / original
        )
    return parameters


def _rope_supported(parameters: Mapping[str, Any], rotated: int) -> bool:
    """Whether `Rope` (functions/stage/models/llama/rope.py) reads all of the parameters.

    An ignored parameter might change results.
    """
    rope_type = parameters["rope_type"]
    needed = _ROPE_NEEDED.get(rope_type) if isinstance(rope_type, str) else None
    if needed is None:
        return False
    known = _ROPE_COMMON.union(needed, _ROPE_OPTIONAL.get(rope_type, ()))
    factors = [parameters.get(name) for name in ("short_factor", "long_factor") if rope_type == "longrope"]
    if any(not isinstance(each, Sequence) or len(each) != rotated // 2 or not all(map(is_number, each)) for each in factors):
        return False
    others = {*needed, *parameters} - {"rope_type", "type", "truncate", "short_factor", "long_factor"}
    return known.issuperset(parameters) and all(is_number(parameters.get(name)) for name in others)


def _obstacles(family: DecoderFamily, values: Values, model: Decoder, config: Mapping[str, Any]) -> list[str]:
    architectures: Any = config.get("architectures")
    obstacles = {
        "a quantized checkpoint": values.get("quantization_config") is not None,
        "an architecture without a language model head": bool(architectures)
        and model.has_head
        and not any(str(name).endswith(("ForCausalLM", "LMHeadModel")) for name in architectures),
    }
    for layer in model.kinds:
        if (each := layer.attention) is not None:
            obstacles[f"head_dim {each.head_dim}"] = each.head_dim % 2 != 0
            obstacles[f"{each.num_heads} heads on {each.num_kv_heads}"] = each.num_heads % each.num_kv_heads != 0
    attention = model.attention
    if not family.has_head_dim and not family.latent:  # but the rotation may read it
        obstacles[f"head_dim {values.get('head_dim')!r}"] = values.get("head_dim") not in (None, attention.head_dim)
    for key, described in family.only(values).items():
        obstacles[f"{key} = {values.get(key)!r}"] = values.get(key) not in (None, described)
    return [obstacle for obstacle, present in obstacles.items() if present]
