"""Tests whether a model can be cut: two stages of a tiny random copy of the model must give the logits of the whole copy.

The copy has the config of the model, but with few layers, heads, experts and tokens, so that it runs within seconds on a CPU.
"""

import json
import tempfile
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin, DynamicCache, LinearAttentionCacheLayerMixin
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import logging

from functions.stage.models.floats import Array, Float32
from functions.stage.models.layer_group import Segment
from functions.stage.models.torch_border import output_array
from functions.stage.models.transformers.group import TransformersGroup
from functions.stage.models.transformers.outside_caches import OUTSIDE
from functions.stage.models.transformers.sliced_model import attention_of, cache_argument
from storage.checkpoints.families import check_served, layers_key, with_shared_blocks
from storage.errors import ArchitectureUnsupported
from storage.loading.weight_loader import RawTensor

_VOCABULARY: Final = 128
_LAYERS: Final = 4  # of the copy, or more until each kind of layer is in it
_HEADS: Final = 4
_WIDTH: Final = 256  # of models without attention
_STATE_HEADS: Final = (  # keys whose product is the width times a factor: number of heads, size of one, factor
    ("mamba_n_heads", "mamba_d_head", "mamba_expand"),
    ("num_heads", "head_dim", "expand"),
)
_FOLLOW: Final = ("attention_hidden_size", "embedding_dim", "hybrid_layer_ids", "mamba_headdim", "num_blocks")  # others
_TOKENS: Final = 24  # more than the copy's windows
_TOLERANCE: Final = 1e-4  # of the greatest logit
_MOST_PARAMETERS: Final = 10**8
_MOST: Final[Mapping[str, int]] = {  # key of a config: the greatest value that the copy has
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), _VOCABULARY),
    **dict.fromkeys(
        ("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size", "intermediate_size_mlp", "n_inner",
         "ffn_dim", "ffn_hidden_size", "expert_ffn_hidden_size", "dense_intermediate_size", "shared_intermediate_size",
         "moe_shared_expert_intermediate_size"),
        64,
    ),
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts", "zero_expert_num"), 8),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk", "moe_top_k", "moe_k"), 2),
    **dict.fromkeys(("n_group", "num_expert_group", "first_k_dense_replace", "num_dense_layers", "moe_layer_start_index"), 2),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 64),
    "topk_group": 1,
    "kv_n_heads": 2,
    **dict.fromkeys(("sliding_window", "attention_chunk_size", "window_size", "index_topk", "local_attention"), 8),
}  # fmt: skip


def check_cut(config: Mapping[str, Any]) -> None:
    """Checks that the model of a config.json runs in two stages.

    Raises ArchitectureUnsupported, which says what differs, if it does not.
    """
    check_served(config)
    model_type = config.get("model_type")
    try:
        copy = tiny_config(config)
        with tempfile.TemporaryDirectory() as folder:
            tensors = tiny_tensors(copy, Path(folder))
            whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=attention_of(copy))
        token_ids = list(range(_VOCABULARY - _TOKENS, _VOCABULARY))
        expected = _whole_logits(whole.eval(), token_ids)
    except Exception as error:  # whatever transformers raises for a config that it does not run
        raise ArchitectureUnsupported(
            f"transformers does not run a tiny copy of this {model_type!r}, with which a cut would be tried: {error}"
        ) from error
    try:
        num_layers: int = getattr(copy, layers_key(copy.model_type))
        found = _logits_of_stages(json.loads(copy.to_json_string(use_diff=False)), tensors, num_layers, token_ids)
    except ArchitectureUnsupported:
        raise
    except Exception as error:
        raise ArchitectureUnsupported(f"a {model_type!r} cut in two does not run by transformers' modules: {error}") from error
    difference = np.abs(found - expected).max(axis=1) / np.abs(expected).max()
    if not difference.max() < _TOLERANCE:
        first = int(np.flatnonzero(~(difference < _TOLERANCE))[0])
        raise ArchitectureUnsupported(
            f"a {model_type!r} cut in two gives other logits than the whole model: from token {first} on they differ by up to "
            f"{difference.max():.2g} of the greatest"
        )


def tiny_config(config: Mapping[str, Any]) -> Any:
    """Returns a transformers config like a given config.json, but of a tiny model that runs within a second.

    The sizes of heads stay, because much depends on them. Ratios between sizes stay too.
    """
    known = CONFIG_MAPPING[config["model_type"]].from_dict(dict(config))
    fields = known.to_dict()

    def name_of(key: str) -> str:
        return str(known.attribute_map.get(key, key))

    key_of_layers = layers_key(known.model_type)
    num_layers: int = getattr(known, key_of_layers)
    per_layer = {key: value for key, value in fields.items() if isinstance(value, list | tuple) and len(value) == num_layers}
    kinds = [*per_layer.values(), getattr(known, "layer_types", None) or ()]  # some configs compute them
    layers = min(num_layers, max([_LAYERS, *map(_until_all_kinds, kinds)]))
    width: int = fields[name_of("hidden_size")]
    changes: dict[str, Any] = {key_of_layers: layers, "eos_token_id": 2, "dtype": "float32"}
    if heads := fields.get(name_of("num_attention_heads")):
        few, kv_heads = min(heads, _HEADS), fields.get(name_of("num_key_value_heads"))
        width = width // heads * few
        changes["num_attention_heads"] = few
        changes["num_key_value_heads"] = few if kv_heads in (None, heads) else min(2, kv_heads)
    else:
        width = min(width, _WIDTH)
    changes["hidden_size"] = width
    small = _smaller(fields) | {key: value[:layers] for key, value in per_layer.items()}
    if overrides := small.get("per_layer_config"):
        small["per_layer_config"] = {key: value for key, value in overrides.items() if int(key) < layers}
    for key in (*_FOLLOW, *(() if heads else ("intermediate_size",))):
        small.pop(key, None)
    for count, size, factor in _STATE_HEADS:
        if isinstance(fields.get(size), int) and factor in fields and (heads is None or count != "num_heads"):
            small[count] = int(fields[factor] * width) // fields[size]
    small |= {name_of(key): value for key, value in changes.items() if name_of(key) in fields}
    return type(known).from_dict(small)


def _until_all_kinds(kinds: Sequence[object]) -> int:
    """Returns how many layers from the first on it takes to have one of each kind. kinds: the kind of each layer.

    0 if there are more kinds than half of the layers.
    """
    firsts = {str(kind): number for number, kind in reversed(list(enumerate(kinds, 1)))}
    return max(firsts.values(), default=0) if len(firsts) <= len(kinds) // 2 else 0


def _smaller(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of a config, and of configs nested in it, with the sizes of a tiny model."""
    small: dict[str, Any] = {}
    for key, value in fields.items():
        if key.endswith("_config") and isinstance(value, dict) and key != "per_layer_config":
            small[key] = _smaller(value)
        elif key.endswith("_token_id") and value is not None:
            small[key] = {"pad_token_id": 0, "bos_token_id": 1}.get(key, 2)
        elif key in _MOST and isinstance(value, int):
            small[key] = min(value, _MOST[key])
        else:
            small[key] = value
    return small


def tiny_tensors(config: Any, folder: Path) -> dict[str, torch.Tensor]:
    """Saves a random model with a tiny config in a folder, and returns its tensors by checkpoint name.

    The seed is fixed. Raises ValueError if the model of the config is not tiny.
    """
    with torch.device("meta"):
        parameters = sum(each.numel() for each in AutoModelForCausalLM.from_config(config).parameters())
    if parameters > _MOST_PARAMETERS:
        raise ValueError(f"it has {parameters} parameters")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # some families draw vectors at random (A_log of a delta rule), to which noise is added below
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention_of(config))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim >= 2:
                parameter.copy_(noise * (0.1 if parameter.shape[0] == _VOCABULARY else 1.5 / parameter.shape[-1] ** 0.5))
            else:
                parameter.add_(noise * 0.1)  # a norm's gain stays near one
    logging.disable_progress_bar()
    model.save_pretrained(folder)
    return dict(
        with_shared_blocks({name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()})
    )


@torch.inference_mode()
def _whole_logits(whole: PreTrainedModel, token_ids: Sequence[int]) -> Float32:
    model_type, ids = whole.config.model_type, torch.tensor([token_ids])
    if model_type == "xlstm":  # as stages run it: its path for several tokens computes in bfloat16
        steps, cache = [], None
        for token in ids.T:
            output = whole(input_ids=token[None], cache=cache, use_cache=True)
            steps.append(output_array(output.logits[0].float()))
            cache = output.cache
        return np.concatenate(steps)
    cache = DynamicCache(config=whole.config)
    kinds = (LinearAttentionCacheLayerMixin, CacheLayerMixin)  # without the second, transformers does not know positions
    if model_type in OUTSIDE or not all(any(isinstance(layer, kind) for layer in cache.layers) for kind in kinds):
        return output_array(whole(input_ids=ids, use_cache=False).logits[0].float())
    # As stages run recurrent layers, because transformers computes several tokens at once in another way.
    given = {cache_argument(whole): cache, "use_cache": True}
    return np.concatenate(
        [output_array(whole(input_ids=torch.tensor([[token]]), **given).logits[0].float()) for token in token_ids]
    )


def _logits_of_stages(
    config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], num_layers: int, token_ids: Sequence[int]
) -> Float32:
    """Returns the logits that two stages compute. The stages get the tokens in three chunks, one with a single token."""
    middle, tokens = num_layers // 2, len(token_ids)
    raw = {
        name: RawTensor("F32", tuple(tensor.shape), output_array(tensor.float()).data.cast("B"))
        for name, tensor in tensors.items()
    }
    stages = [
        TransformersGroup.build(config, raw, first, last, "float32", "cpu", 2**26)
        for first, last in pairwise((0, middle, num_layers))
    ]
    handles = [stage.kv.reserve(tokens) for stage in stages]
    logits = []
    for first, last in pairwise((0, tokens // 2, tokens // 2 + 1, tokens)):
        states: Array = np.array(token_ids[first:last])
        for stage, handle in zip(stages, handles, strict=True):
            states = stage.forward(states, [Segment(handle, first, last - first)])
        logits.append(stages[-1].logits(states))
    return np.concatenate(logits)
