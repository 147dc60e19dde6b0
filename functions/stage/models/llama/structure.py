"""Checks for groups of Llama-shaped models: that all weights are there, their shapes, and the segments of a pass.

Layers in C and torch's operators take sizes from the config. If a tensor had another shape, they would access memory outside
the tensor. So every tensor is checked. Needs no torch.
"""

import re
from collections.abc import Collection, Iterable, Sequence

from msgspec import Struct
from msgspec.structs import replace

from functions.stage.models.kv_cache import KVBudget
from functions.stage.models.layer_group import MissingTensors, Segment
from functions.stage.models.packed_tensors import WrongShape
from storage.checkpoints.decoder import (
    Attention,
    Decoder,
    FeedForward,
    Layer,
    Norm,
    QKNorm,
    Rotation,
    Shapes,
    TensorNames,
    layer_shapes,
    outer_shapes,
)
from storage.models.q4 import packed_shape


def check_layers(model: Decoder, first: int, last: int) -> None:
    """Raises ValueError if [first, last) are not layers of the model, or if the model cannot be cut at these layers."""
    if not 0 <= first < last <= model.num_layers:
        raise ValueError(f"layers {first}:{last} are no group of a model of {model.num_layers}")
    for bound in (first, last):
        if (obstacle := model.obstacle_to_cut(bound)) is not None:
            raise ValueError(f"no stage can end before layer {bound}: {obstacle}")


def check_placed(
    model: Decoder,
    first: int,
    last: int,
    layers: Collection[int],
    *,
    embedding: bool,
    norm: bool,
    head: bool,
    positions: bool = False,
    inputs: bool = False,
    others: Iterable[str] = (),
) -> None:
    """Raises MissingTensors, which names the missing tensors, if layers [first, last) do not have all their weights.

    layers: numbers of the layers whose weights are present. embedding, norm, head, positions, inputs: whether these weights are
    present; inputs are the weights of `LayerInput`. Only the first group of a model needs embedding and positions, and only
    the last group needs norm and head. others: names of tensors that are known to be missing.
    """
    names = model.names
    missing = [*others, *(f"{names.layers}.{layer}" for layer in range(first, last) if layer not in layers)]
    if first == 0 and not embedding:
        missing.append(f"{names.embedding}.weight")
    if first == 0 and model.position_offset is not None and not positions:
        missing.append(f"{names.positions}.weight")
    if last == model.num_layers and not norm:
        missing.append(f"{names.final_norm}.weight")
    if last == model.num_layers and not head:
        missing.append(f"{names.embedding if model.tied else names.head}.weight")
    if model.layer_input is not None and not inputs:
        missing.append(f"{names.layer_embedding}.weight")
    if missing:
        raise MissingTensors(f"not placed: {', '.join(missing)}")


def checked_positions(kv: KVBudget, rows: int, segments: Sequence[Segment]) -> list[int]:
    """Checks the segments of a pass, and returns the position of each token of the pass.

    rows: number of tokens in the input. Raises ValueError if the lengths of segments do not add up to `rows`, if a segment does
    not begin after the tokens that its sequence holds, if it exceeds the reservation, or if a sequence has two segments.
    """
    positions: list[int] = []
    handles: set[int] = set()
    for segment in segments:
        held, reserved = kv.length(segment.handle), kv.reserved(segment.handle)
        if segment.length < 1 or held != segment.position or held + segment.length > reserved:
            raise ValueError(f"{segment} does not follow the {held} tokens held, of {reserved} reserved")
        handles.add(segment.handle)
        positions.extend(range(held, held + segment.length))
    if not segments or len(handles) < len(segments):
        raise ValueError(f"{len(segments)} segments of {len(handles)} sequences: one for each, and at least one")
    if rows != len(positions):
        raise ValueError(f"{rows} rows of input for segments of {len(positions)} tokens in all")
    return positions


def torch_obstacle(model: Decoder) -> str | None:
    """Returns the reason why torch's layers cannot run the model, or None if they can.

    They run models that differ little from Llama.
    """
    if model.experts:
        return "layers with experts run in C alone"
    attention, norm = model.attention, Norm(eps=model.final_norm.eps)
    of_llama = Attention(
        num_heads=attention.num_heads,
        num_kv_heads=attention.num_kv_heads,
        head_dim=attention.head_dim,
        scale=attention.head_dim**-0.5,
        qk_norm=None if attention.qk_norm is None else QKNorm(norm=norm),
        qkv_bias=attention.qkv_bias,
        out_bias=attention.out_bias,
    )
    biased = any(each.feed_forward is not None and each.feed_forward.biased for each in model.kinds)
    mlp_of_llama = FeedForward(inner_size=model.inner_size, biased=biased)
    like_llama = Layer(attention=of_llama, feed_forward=mlp_of_llama, before_attention=norm, before_feed_forward=norm)
    if any(rope.parameters["rope_type"] == "longrope" for rope in model.ropes.values()):
        return "LongRoPE runs in C alone"
    for layer in model.kinds:
        if layer.attention is None or layer.recurrent is not None or layer.feed_forward is None:
            return "layers without attention or feed-forward, and recurrent ones, run in C alone"
        plain_attention = replace(layer.attention, window=None, rope=None)
        own = replace(layer, attention=plain_attention)
        found = [*_different(plain_attention, of_llama), *_different(layer.feed_forward, mlp_of_llama)]
        if found or own != like_llama:
            return f"layers with another {', '.join(found or _different(own, like_llama))} than Llama's run in C alone"
    plain = replace(
        model,
        final_norm=norm,
        embedding_scale=1.0,
        position_offset=None,
        logit_scale=1.0,
        logit_soft_cap=None,
        head_bias=False,
        layer_input=None,
        streams=None,
        causal=True,
        has_head=True,
        names=TensorNames(),
        ropes={name: Rotation(parameters=rope.parameters, rotated=attention.head_dim) for name, rope in model.ropes.items()},
    )
    return f"models with another {', '.join(_different(model, plain))} than Llama's run in C alone" if model != plain else None


def _different(own: Struct, other: Struct) -> list[str]:
    """Returns the names of the fields in which two descriptions differ."""
    return [name for name in own.__struct_fields__ if getattr(own, name) != getattr(other, name)]


def layers_in(model: Decoder, names: Iterable[str]) -> list[int]:
    """Returns the sorted numbers of the layers to which the tensors `names` belong."""
    return sorted({int(found[1]) for found in map(_layer_pattern(model).match, names) if found})


def _layer_pattern(model: Decoder) -> re.Pattern[str]:
    return re.compile(re.escape(model.names.layers) + r"\.(\d+)\.")


def check_shapes(model: Decoder, seen: Shapes, in_four_bits: Collection[str] = ()) -> None:
    """Checks the shapes of some of the model's tensors. seen: shapes by checkpoint name.

    in_four_bits: names of packed q4 tensors. Raises WrongShape. Raises MissingTensors for a tensor that a model with this
    config does not have, because ignoring the tensor would change results.
    """
    of_others = _with_scales(outer_shapes(model))
    of_kinds = [_with_scales(layer_shapes(model, layer)) for layer in model.kinds]
    in_layers = _layer_pattern(model)
    for name, shape in seen.items():
        found = in_layers.match(name)
        if found and int(found[1]) < model.num_layers:
            expected = of_kinds[model.order[int(found[1])]].get(name[found.end() :])
        else:
            expected = of_others.get(name)
        if expected is None:
            raise MissingTensors(f"the config has no place for {name} {list(shape)}")
        if name in in_four_bits:
            if len(expected) != 2:
                raise MissingTensors(f"{name} {list(shape)} is in four bits, which matrices alone are")
            expected = packed_shape(*expected)
        if shape != expected:
            raise WrongShape(f"{name} is {list(shape)}, and the config makes it {list(expected)}")


def _with_scales(shapes: Shapes) -> Shapes:
    """Returns the shapes, and for each matrix also the shape of its scales, which it has only in int8."""
    scales = {f"{name}_scale": shape[:1] for name, shape in shapes.items() if len(shape) == 2}
    return {**shapes, **scales}
