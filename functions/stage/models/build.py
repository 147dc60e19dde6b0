"""Which layer group runs a model. Nothing is imported but what the chosen one needs: a native stage never loads torch."""

import os
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, Final, Literal

from functions.configuration.pass_times import PassTimes
from functions.stage.models.families import family_of
from functions.stage.models.layer_group import LayerGroup
from functions.stage.models.native.choice import native_obstacle
from storage.checkpoints.llama_config import LlamaConfig, UnsupportedConfig
from storage.errors import LibraryMissing
from storage.loading.weight_loader import RawTensor

if TYPE_CHECKING:
    from functions.stage.models.llama.group import LlamaGroup
    from functions.stage.models.native.group import NativeGroup

Kind = Literal["auto", "native", "llama", "transformers", "sleep"]

FLOAT_DTYPES: Final = ("float32", "bfloat16", "float16")
"""Of publications that GPUs and transformers run."""
_GPU_FILES: Final = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")
"""CUDA's, ROCm's, and CUDA's under WSL: where there is none of them, torch need not be asked for GPUs."""


_MODULES: Final = {
    "native": "functions.stage.models.native.group",
    "llama": "functions.stage.models.llama.group",
    "transformers": "functions.stage.models.transformers.group",
    "sleep": "functions.stage.models.sleep_group",
}


class UnsupportedDtype(Exception):
    """The group cannot run what the publication holds. Publish the model in a float dtype."""


@dataclass(frozen=True, slots=True)
class Choice:
    """What runs the layers of a model, and where."""

    kind: Literal["native", "llama", "transformers", "sleep"]
    device: str
    why: str | None = None
    """The layers do not run in C."""


def _nothing() -> None:
    pass


def choose(
    kind: Kind, config: Mapping[str, Any], dtype: str, device: str, before_torch: Callable[[], None] = _nothing
) -> Choice:
    """device: auto, cpu, cuda, or another of torch's. before_torch: called where torch is about to be imported.

    `auto` takes layers in C where they run, else torch's operators where they run the model exactly, else transformers. Raises
    UnsupportedArchitecture, UnsupportedConfig, UnsupportedDtype where another kind was asked for, and LibraryMissing.
    """
    if kind == "sleep":
        return Choice(kind, "cpu")
    family_of(config)
    device = device_for(device, dtype, before_torch)
    try:
        obstacle = native_obstacle(LlamaConfig.from_dict(config), dtype, device) if kind in ("auto", "native") else None
    except UnsupportedConfig as error:
        if kind == "native":
            raise
        return _of_torch("transformers", config, dtype, device, str(error), before_torch)
    if kind == "native" and obstacle is not None:
        raise UnsupportedConfig(f"the layers do not run in C: {obstacle}")
    if kind == "native" or (kind == "auto" and obstacle is None):
        return Choice("native", device)
    return _of_torch("llama" if kind == "auto" else kind, config, dtype, device, obstacle, before_torch)


def device_for(configured: str, dtype: str, before_torch: Callable[[], None] = _nothing) -> str:
    """Where layers of a publication run: `auto` takes a GPU where there is one and the dtype runs on it. int8 runs on CPUs."""
    if configured != "auto":
        return configured
    return (
        "cuda" if dtype in FLOAT_DTYPES and any(map(os.path.exists, _GPU_FILES)) and _torch_finds_a_gpu(before_torch) else "cpu"
    )


def _torch_finds_a_gpu(before_torch: Callable[[], None]) -> bool:
    before_torch()
    try:
        import torch
    except ImportError:
        return False
    return torch.cuda.is_available()


def _of_torch(
    kind: Literal["llama", "transformers"],
    config: Mapping[str, Any],
    dtype: str,
    device: str,
    why: str | None,
    before_torch: Callable[[], None],
) -> Choice:
    before_torch()
    if kind == "transformers" and dtype not in FLOAT_DTYPES:
        raise UnsupportedDtype(f"{config.get('model_type')} in {dtype}: transformers runs {', '.join(FLOAT_DTYPES)} only")
    if dtype == "q4":
        raise UnsupportedDtype(f"q4 runs by layers in C alone, and here they do not: {why or f'{kind} was asked for'}")
    what = f"a {config.get('model_type')} model in {dtype} on {device}" + (f" ({why})" if why else "")
    for library in ("torch", "transformers") if kind == "transformers" else ("torch",):
        try:
            import_module(library)
        except ImportError as missing:
            raise LibraryMissing(f"{what} takes {library}", missing) from missing
    return Choice(kind, device, why)


def import_group(choice: Choice) -> None:
    """Ahead of its use, so that imports and work on weights are told apart."""
    import_module(_MODULES[choice.kind])


def empty_group(
    choice: Choice, config: Mapping[str, Any], first_layer: int, last_layer: int, dtype: str, kv_budget_bytes: int
) -> "NativeGroup | LlamaGroup":
    """A group of the native or llama kind, for weights that are placed as they come. Raises what the group raises."""
    if choice.kind == "native":
        from functions.stage.models.native.group import NativeGroup

        return NativeGroup(config, first_layer, last_layer, dtype, kv_budget_bytes)
    from functions.stage.models.llama.group import LlamaGroup

    return LlamaGroup(config, first_layer, last_layer, dtype, choice.device, kv_budget_bytes, choice.why)


def build_layer_group(
    kind: Kind,
    config: Mapping[str, Any],
    tensors: MutableMapping[str, RawTensor],
    first_layer: int,
    last_layer: int,
    dtype: str,
    device: str,
    kv_budget_bytes: int,
    sleep_times: PassTimes | None = None,
) -> LayerGroup:
    """Layers [first_layer, last_layer) of the model of a config.json, ready to run.

    tensors: by their names in the checkpoint; the group may take them out. dtype: of the publication. sleep_times: of a
    pass with `sleep`, which needs no tensors; None: none. Raises what `choose` and the group raise.
    """
    choice = choose(kind, config, dtype, device)
    if choice.kind == "sleep":
        from functions.stage.models.sleep_group import SleepGroup

        return SleepGroup(config, first_layer, last_layer, kv_budget_bytes, sleep_times or PassTimes())
    if choice.kind == "transformers":
        from functions.stage.models.transformers.group import TransformersGroup

        return TransformersGroup.build(config, tensors, first_layer, last_layer, dtype, choice.device, kv_budget_bytes)
    group = empty_group(choice, config, first_layer, last_layer, dtype, kv_budget_bytes)
    group.place(tensors)
    group.finish()
    return group
