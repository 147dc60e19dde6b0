"""Which layer group runs a model. Nothing is imported but what the chosen one needs: a lean stage never loads transformers."""

from collections.abc import Mapping, MutableMapping
from typing import Any, Literal

import torch

from functions.stage.models.families import family_of
from functions.stage.models.layer_group import FLOAT_DTYPES, LayerGroup

Kind = Literal["auto", "llama", "transformers", "sleep"]


class UnsupportedDtype(Exception):
    """The group cannot run what the publication holds. Publish the model in a float dtype."""


def choose(config: Mapping[str, Any]) -> Literal["llama", "transformers"]:
    """The lean group where it runs the model of a config.json exactly, else transformers. Raises UnsupportedArchitecture."""
    family_of(config)
    from functions.stage.models.llama.group import LlamaGroup

    return "llama" if LlamaGroup.supports(config) else "transformers"


def device_for(configured: str, dtype: str) -> str:
    """Where layers of a publication run: `auto` takes a GPU where there is one and the dtype runs on it. int8 runs on CPUs."""
    if configured != "auto":
        return configured
    return "cuda" if dtype in FLOAT_DTYPES and torch.cuda.is_available() else "cpu"


def build_layer_group(
    kind: Kind,
    config: Mapping[str, Any],
    tensors: MutableMapping[str, torch.Tensor],
    first_layer: int,
    last_layer: int,
    dtype: str,
    device: torch.device | str,
    kv_budget_bytes: int,
    sleep_seconds: float = 0.0,
) -> LayerGroup:
    """Layers [first_layer, last_layer) of the model of a config.json, ready to run.

    tensors: by their names in the checkpoint; the group may take them out. dtype: of the publication. sleep_seconds: of a
    pass with `sleep`, which needs no tensors. Raises UnsupportedArchitecture, UnsupportedDtype, and what the group raises.
    """
    if kind == "sleep":
        from functions.stage.models.sleep_group import SleepGroup

        return SleepGroup(config, first_layer, last_layer, kv_budget_bytes, sleep_seconds)
    if kind == "llama" or (kind == "auto" and choose(config) == "llama"):
        from functions.stage.models.llama.group import LlamaGroup

        return LlamaGroup.build(config, tensors, first_layer, last_layer, dtype, device, kv_budget_bytes)
    if dtype not in FLOAT_DTYPES:
        raise UnsupportedDtype(f"{config.get('model_type')} in {dtype}: transformers runs {', '.join(FLOAT_DTYPES)} only")
    from functions.stage.models.transformers.group import TransformersGroup

    return TransformersGroup.build(config, tensors, first_layer, last_layer, dtype, device, kv_budget_bytes)
