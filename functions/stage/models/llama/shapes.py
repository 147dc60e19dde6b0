"""What shape every tensor of a Llama-shaped model has, from its config: what is loaded is held against it.

Machine code and torch's operators take sizes from the config: a taller or wider matrix would have them read or write
memory that is none of its own.
"""

import re
from collections.abc import Mapping
from typing import Final

from functions.stage.models.layer_group import MissingTensors
from functions.stage.models.llama.config import LlamaConfig

Shapes = Mapping[str, tuple[int, ...]]

LAYER_NAME: Final = re.compile(r"model\.layers\.(\d+)\.")


class WrongShape(MissingTensors):
    """A published tensor is of another shape than the config makes it. Publish the model again from a sound checkpoint."""

    def __init__(self, name: str, seen: tuple[int, ...], expected: tuple[int, ...]) -> None:
        super().__init__(f"{name} is {list(seen)}, and the config makes it {list(expected)}")


def check_shapes(model: LlamaConfig, seen: Shapes) -> None:
    """seen: of any tensors of the model, by their names in the checkpoint.

    Raises WrongShape, and MissingTensors for a tensor that the config has no place for: without it, the model would be
    another one.
    """
    of_layers, of_others = layer_shapes(model), outer_shapes(model)
    for name, shape in seen.items():
        found = LAYER_NAME.match(name)
        in_layer = found is not None and int(found[1]) < model.num_layers
        expected = of_layers.get(name[found.end() :]) if found and in_layer else of_others.get(name)
        if expected is None:
            raise MissingTensors(f"the config has no place for {name} {list(shape)}")
        if shape != expected:
            raise WrongShape(name, shape, expected)


def layer_shapes(model: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Of one layer, by name without `model.layers.N.`: float or int8 matrices, the scales of int8 ones, biases, norms."""
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
        shapes |= {f"{name}.weight": (outs, width), f"{name}.weight_scale": (outs,)}
        if biased:
            shapes[f"{name}.bias"] = (outs,)
    return shapes


def outer_shapes(model: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Of what is no layer's, by whole name."""
    matrix = (model.vocab_size, model.hidden_size)
    return {
        "model.embed_tokens.weight": matrix,
        "model.norm.weight": (model.hidden_size,),
        "lm_head.weight": matrix,
        "lm_head.weight_scale": (model.vocab_size,),
    }
