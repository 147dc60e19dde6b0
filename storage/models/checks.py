"""Checks a model before anything of it is written: tensor shapes against config.json, and whether a stage can run the dtype.

`decoder` knows the tensors of the models that Lamina's own layers run. For other models, transformers builds the model without
memory (on torch's meta device), which names every tensor with its shape. Stages check again what they load.
"""

import re
from collections.abc import Mapping
from typing import Any, Final

from storage.checkpoints.decoder import EMBEDDER_KEY, Decoder, Shapes, all_shapes, float32_names, full_name, outer_shapes
from storage.checkpoints.decoder_config import decoder_of
from storage.checkpoints.decoder_families import UnsupportedConfig
from storage.checkpoints.families import check_served, mixes_longrope, with_floats
from storage.errors import ArchitectureUnsupported, CheckpointInvalid, LibraryMissing

_LAYER_MATRICES: Final = (
    "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "qkv_proj", "query_key_value", "out_proj",
    "dense", "gate_up_proj", "fc1", "fc2", "c_fc", "c_proj", "dense_h_to_4h", "dense_4h_to_h", "in_proj", "in_proj_qkv",
    "in_proj_z", "in_proj_qkvz", "w1", "w2", "w3", "input_linear", "output_linear",
    "fc1_latent_proj", "fc2_latent_proj",
    "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "per_layer_input_gate", "per_layer_projection",
    "per_layer_model_projection", "linear_left", "linear_right",
)  # fmt: skip
_MAX_HEAD_DIM: Final = 1024  # LAMINA_MOST_HEAD of functions/stage/native/c/native.h


def check_runnable(config: Mapping[str, Any], dtype: str) -> None:
    """Raises ArchitectureUnsupported for a model that no stage could run in `dtype`. config: a parsed config.json.

    A stage decides by the same description. transformers runs floats only; int8 and q4 need Lamina's own layers, which run only
    families of the table. Other families may have matrices of the same names, so the config decides, not the names.
    """
    check_served(config)
    if EMBEDDER_KEY in config:
        try:
            decoder_of(config)
        except UnsupportedConfig as error:
            raise ArchitectureUnsupported(f"models that make vectors of texts run by layers in C alone: {error}") from error
    elif config.get("use_bidirectional_attention") in (True, "all"):  # "vision": tokens of images do
        raise ArchitectureUnsupported(
            "its tokens attend to later ones (use_bidirectional_attention): it does not generate text"
        )
    if dtype not in ("int8", "q4"):
        return
    try:
        model = decoder_of(config)
    except (ArchitectureUnsupported, AttributeError, TypeError, ValueError, ArithmeticError) as error:
        raise ArchitectureUnsupported(f"no stage would run it in {dtype}: {error}; publish it as bfloat16") from error
    if model.names.transposed:
        raise ArchitectureUnsupported(f"a {config['model_type']} is not read in {dtype}; publish it as bfloat16")
    head_dim = model.attention.head_dim
    if dtype == "q4" and head_dim > _MAX_HEAD_DIM:
        raise ArchitectureUnsupported(
            f"no stage would run it in q4: layers in C have heads of at most {_MAX_HEAD_DIM} numbers, this model's {head_dim}; "
            "publish it as bfloat16"
        )


def is_layer_matrix(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor with this name and shape is the matrix of a linear layer, which int8 and q4 quantize."""
    return len(shape) == 2 and name.endswith(tuple(f".{matrix}.weight" for matrix in _LAYER_MATRICES))


def check_shapes(config: Mapping[str, Any], seen: Shapes, dtype: str) -> frozenset[str]:
    """Compares the shapes `seen` in a checkpoint with those that its parsed config.json implies.

    Returns the names of the tensors that stay float32 whatever the `dtype` of the published model, as in transformers: a
    router's bias, for example, and its matrix if the experts run in C. A model that Lamina's own layers run must have exactly
    the tensors that config.json implies. In other models, tensors with unknown names are not checked here: the stage that loads
    them runs transformers as well. Raises CheckpointInvalid, which names a tensor and both shapes, or LibraryMissing.
    """
    try:
        model = decoder_of(config)
    except UnsupportedConfig:
        return _check_by_transformers(config, seen, dtype)
    _check_by_description(model, seen)
    if model.experts and dtype == "float16":  # which layers in C do not run
        return _check_by_transformers(config, seen, dtype)
    routers = (f".{model.names.router}.weight", f".{model.names.router}.bias", f".{model.names.correction}")
    wide = float32_names(model)
    return frozenset(
        name
        for name in seen
        if (model.experts and name.endswith(routers)) or name.partition(".layers.")[2].partition(".")[2] in wide
    )


def _check_by_description(model: Decoder, seen: Shapes) -> None:
    expected = all_shapes(model) | outer_shapes(model)  # a tied model may have a head's matrix, too
    names = {full_name(model, name): name for name in seen}
    for name, given in names.items():
        if name in expected and expected[name] != seen[given]:
            raise _other_shape(given, seen[given], expected[name])
    if unknown := names.keys() - expected.keys():
        raise CheckpointInvalid(f"the checkpoint has {min(unknown)!r}, for which its config.json has no place; which is right?")
    if missing := expected.keys() - names.keys() - {f"{model.names.head}.weight"}:
        raise CheckpointInvalid(f"the checkpoint lacks {min(missing)!r}, which its config.json asks for. Is a shard missing?")


def _check_by_transformers(config: Mapping[str, Any], seen: Shapes, dtype: str) -> frozenset[str]:
    expected, prefix, in_float32 = _shapes_by_transformers(config, dtype)
    for name, shape in seen.items():
        known = next((each for each in (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}.")) if each in expected), None)
        if known is not None and expected[known] != shape:
            raise _other_shape(name, shape, expected[known])
    return frozenset(name for name in seen if any(re.search(pattern, name) for pattern in in_float32))


def _other_shape(name: str, seen: tuple[int, ...], expected: tuple[int, ...]) -> CheckpointInvalid:
    return CheckpointInvalid(f"tensor {name!r} is {list(seen)} and config.json makes it {list(expected)}; which is right?")


def _shapes_by_transformers(config: Mapping[str, Any], dtype: str) -> tuple[Shapes, str, frozenset[str]]:
    """Returns the shapes of the tensors in transformers' model for this config.json, by names as `save_pretrained` writes them.

    Also returns the prefix of these names (such as `model`) that some checkpoints omit, and regular expressions for the names
    of tensors that the model loads in float32 even if `dtype` is narrower. Raises LibraryMissing, and ArchitectureUnsupported
    if transformers has no language model for the config.
    """
    try:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError as error:
        raise LibraryMissing(f"publishing a {config['model_type']!r} takes torch and transformers", error) from error

    known = AutoConfig.for_model(**with_floats(config))
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(known)
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError, ZeroDivisionError) as error:
        raise ArchitectureUnsupported(f"transformers makes no language model of this config.json: {error}") from error
    if any(map(mixes_longrope, model.modules())):
        raise ArchitectureUnsupported("longrope in some kinds of layers and not in others is not supported")
    tensors = revert_weight_conversion(model, model.state_dict())
    always = model._keep_in_fp32_modules_strict if dtype in ("float16", "bfloat16") else None
    in_float16 = model._keep_in_fp32_modules if dtype == "float16" else None
    in_float32 = frozenset(name.replace("*", ".*") for name in {*(always or ()), *(in_float16 or ())})
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}, model.base_model_prefix, in_float32
