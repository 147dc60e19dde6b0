"""A checkpoint's tensors held against its config.json, before anything is written.

Llama-shaped families have a table of them. Of any other the model's own class in transformers is built without memory (torch's
meta device), so that it names every tensor with its shape. Stages check again what they load.
"""

from collections.abc import Mapping, Set
from typing import Any, Final

from storage.checkpoints.llama_shaped import LLAMA_FAMILIES, LlamaSizes, Shapes, layer_shapes, outer_shapes
from storage.errors import ArchitectureUnsupported, CheckpointInvalid, LibraryMissing

_TIED_HEAD: Final = "lm_head.weight"


def check_shapes(config: Mapping[str, Any], seen: Shapes) -> None:
    """Raises CheckpointInvalid naming a tensor, its shape and the one that `config`, a config.json, makes it. LibraryMissing.

    Names of Llama-shaped families are one and the same everywhere, so that theirs have to be complete, too. In other families
    what goes by another name than transformers writes is left to the stage that loads it, which is transformers as well.
    """
    llama_shaped = config["model_type"] in LLAMA_FAMILIES
    expected, prefix = (_of_table(config), "model") if llama_shaped else _of_transformers(config)
    for name, shape in seen.items():
        known = next((each for each in (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}.")) if each in expected), None)
        if known is not None and expected[known] != shape:
            raise CheckpointInvalid(
                f"tensor {name!r} is {list(shape)} and config.json makes it {list(expected[known])}; which is right?"
            )
    if llama_shaped:
        _check_names(seen.keys(), expected.keys())


def _check_names(seen: Set[str], expected: Set[str]) -> None:
    if unknown := seen - expected:
        raise CheckpointInvalid(f"the checkpoint has {min(unknown)!r}, for which its config.json has no place; which is right?")
    if missing := expected - seen - {_TIED_HEAD}:
        raise CheckpointInvalid(f"the checkpoint lacks {min(missing)!r}, which its config.json asks for. Is a shard missing?")


def _of_table(config: Mapping[str, Any]) -> Shapes:
    sizes = LlamaSizes.from_config(config)
    layer = layer_shapes(sizes)
    layers = {f"model.layers.{number}.{name}": shape for number in range(sizes.num_layers) for name, shape in layer.items()}
    return layers | outer_shapes(sizes)


def _of_transformers(config: Mapping[str, Any]) -> tuple[Shapes, str]:
    """Shapes by the names that `save_pretrained` writes, and the prefix that some checkpoints leave out."""
    try:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError as error:
        raise LibraryMissing(f"publishing a {config['model_type']!r} takes torch and transformers", error) from error

    known = AutoConfig.for_model(**config)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(known)
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError, ZeroDivisionError) as error:
        raise ArchitectureUnsupported(f"transformers makes no language model of this config.json: {error}") from error
    tensors = revert_weight_conversion(model, model.state_dict())
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}, model.base_model_prefix
