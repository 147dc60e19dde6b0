"""Chooses and builds the layer group that runs a model. A native stage never imports torch."""

import logging
import os
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, Final, Literal

from functions.configuration.pass_times import PassTimes
from functions.stage.models.layer_group import KVDtype, LayerGroup
from functions.stage.models.llama.structure import torch_obstacle
from functions.stage.native import limits
from functions.stage.native.library import UNAVAILABLE, library
from storage.checkpoints.decoder import EMBEDDER_KEY, Decoder
from storage.checkpoints.decoder_config import decoder_of
from storage.checkpoints.decoder_families import UnsupportedConfig
from storage.checkpoints.families import check_served
from storage.errors import ArchitectureUnsupported, LibraryMissing
from storage.loading.weight_loader import RawTensor

_log: Final = logging.getLogger(__name__)

if TYPE_CHECKING:
    from functions.stage.models.llama.group import LlamaGroup
    from functions.stage.models.native.group import NativeGroup

Kind = Literal["auto", "native", "llama", "transformers", "sleep"]

FLOAT_DTYPES: Final = ("float32", "bfloat16", "float16")  # of publications that run on GPUs and in transformers
# Device files of CUDA, ROCm, and CUDA under WSL. Without any of them there is no GPU, and no reason to import torch.
_GPU_FILES: Final = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")

_MODULES: Final = {
    "native": "functions.stage.models.native.group",
    "llama": "functions.stage.models.llama.group",
    "transformers": "functions.stage.models.transformers.group",
    "sleep": "functions.stage.models.sleep_group",
}


class UnsupportedDtype(Exception):
    """No available implementation runs the dtype of the published model. Publish the model in a float dtype."""


@dataclass(frozen=True, slots=True)
class GroupChoice:
    """The chosen implementation of the layers of a model, and the device that it runs on."""

    kind: Literal["native", "llama", "transformers", "sleep"]
    device: str  # cpu, cuda, or another of torch's
    why: str | None = None  # why the layers cannot run in C, for logs; None if they can, or if another kind was requested


def choose(
    kind: Kind,
    config: Mapping[str, Any],
    dtype: str,
    device: str,
    before_torch: Callable[[], None] = lambda: None,
    kv_dtype: KVDtype | None = None,
) -> GroupChoice:
    """Chooses the implementation and device for a model, without building anything. May import torch and compile C.

    Kind `auto` prefers layers in C, then torch's operators if they run the model exactly, then transformers' modules.

    config: a config.json. dtype: of the published model. device: auto, cpu, cuda, or another device of torch. before_torch:
    called just before torch is imported. kv_dtype: int8 for keys and values in 8 bits, which only layers in C support; if
    None, they have the dtype of activations.

    Raises ArchitectureUnsupported, UnsupportedConfig or UnsupportedDtype if the requested kind cannot run the model, and
    LibraryMissing.
    """
    if kind == "sleep":
        return GroupChoice(kind, "cpu")
    if kv_dtype is not None:
        if kind not in ("auto", "native"):
            raise UnsupportedDtype(f"keys and values in {kv_dtype} take layers in C, and {kind} was asked for")
        try:
            return choose("native", config, dtype, device, before_torch)
        except ArchitectureUnsupported as error:
            raise UnsupportedDtype(f"keys and values in {kv_dtype} take layers in C: {error}") from error
    check_served(config)
    device = device_for(device, dtype, before_torch)
    try:
        model = decoder_of(config)
        obstacle = native_obstacle(model, dtype, device) if kind in ("auto", "native") else None
        if not model.has_head and kind not in ("auto", "native"):
            raise UnsupportedConfig(f"models that make vectors of texts run by layers in C alone, and {kind} was asked for")
    except ArchitectureUnsupported as error:
        if kind == "native" or EMBEDDER_KEY in config:
            raise
        return _of_torch("transformers", config, dtype, device, str(error), before_torch)
    if obstacle is not None and (kind == "native" or not model.has_head):
        raise UnsupportedConfig(f"the layers do not run in C: {obstacle}")
    if kind == "native" or (kind == "auto" and obstacle is None):
        return GroupChoice("native", device)
    if kind == "auto":
        kind = "transformers" if torch_obstacle(model) else "llama"
    return _of_torch(kind, config, dtype, device, obstacle, before_torch)


def check_cut(config: Mapping[str, Any]) -> None:
    """Checks that transformers' modules run the model of a config.json in stages. Takes seconds.

    Raises ArchitectureUnsupported, which says what differs, if they do not, and LibraryMissing if torch or transformers is not
    installed.
    """
    _of_torch("transformers", config, "float32", "cpu", None, lambda: None)
    from functions.stage.models.transformers import self_test

    self_test.check_cut(config)


def native_obstacle(model: Decoder, dtype: str, device: str) -> str | None:
    """Returns the reason why the layers of a model cannot run in C, or None if they can.

    The reason is the dtype, the device, the head size, or that there is neither a compiled library nor a compiler. Logs a
    warning if dtype and device are not the reason. device: cpu, cuda, or another device of torch.
    """
    obstacle = limits.obstacle(dtype, device, {"head_dim": model.attention.head_dim})
    if obstacle is None and model.names.transposed and dtype in ("int8", "q4", "kept"):
        obstacle = f"its matrices are transposed, which are not read in {dtype}"
    if obstacle is None:
        try:
            library()
        except UNAVAILABLE as error:
            obstacle = str(error)
    if obstacle is not None and dtype in limits.DTYPES and device == "cpu":
        _log.warning("layers run by torch's operators, which is slower: %s", obstacle)
    return obstacle


def device_for(configured: str, dtype: str, before_torch: Callable[[], None] = lambda: None) -> str:
    """Returns the device to run on.

    That is `configured`, unless it is `auto`. Then it is the GPU if there is one and the dtype is a float, otherwise the CPU.
    before_torch: called just before torch is imported, which happens only on machines with a GPU.
    """
    if configured != "auto":
        return configured
    if dtype not in FLOAT_DTYPES or not any(map(os.path.exists, _GPU_FILES)):
        return "cpu"
    before_torch()
    try:
        import torch
    except ImportError:
        return "cpu"
    return "cuda" if torch.cuda.is_available() else "cpu"


def _of_torch(
    kind: Literal["llama", "transformers"],
    config: Mapping[str, Any],
    dtype: str,
    device: str,
    why: str | None,
    before_torch: Callable[[], None],
) -> GroupChoice:
    """Returns the choice of an implementation that needs torch.

    why: the reason why the layers cannot run in C; None if another kind was requested. Raises UnsupportedDtype, and
    LibraryMissing if torch or transformers is not installed.
    """
    before_torch()
    if kind == "transformers" and dtype not in (*FLOAT_DTYPES, "kept"):
        raise UnsupportedDtype(
            f"{config.get('model_type')} in {dtype}: transformers runs {', '.join(FLOAT_DTYPES)} and kept only"
        )
    if dtype == "q4":
        raise UnsupportedDtype(f"q4 runs by layers in C alone, and here they do not: {why or f'{kind} was asked for'}")
    what = f"a {config.get('model_type')} model in {dtype} on {device}" + (f" ({why})" if why else "")
    for name in ("torch", "transformers") if kind == "transformers" else ("torch",):
        try:
            import_module(name)
        except ImportError as missing:
            raise LibraryMissing(f"{what} takes {name}", missing) from missing
    return GroupChoice(kind, device, why)


def import_group(choice: GroupChoice) -> None:
    """Imports the chosen implementation's module, so that the time for imports can be measured separately."""
    import_module(_MODULES[choice.kind])


def empty_group(
    choice: GroupChoice,
    config: Mapping[str, Any],
    first_layer: int,
    last_layer: int,
    dtype: str,
    kv_budget_bytes: int,
    kv_dtype: KVDtype | None = None,
    weights_budget_bytes: int | None = None,
) -> "NativeGroup | LlamaGroup":
    """Returns a native or llama group without weights. The caller calls `place` as weights arrive, and then `finish`.

    The group has layers [first_layer, last_layer). dtype: of the published model. weights_budget_bytes: see `NativeGroup`; a
    llama group ignores it and keeps all weights in memory. Raises what the constructor of the group raises.
    """
    if choice.kind == "native":
        from functions.stage.models.native.group import NativeGroup

        return NativeGroup(config, first_layer, last_layer, dtype, kv_budget_bytes, kv_dtype, weights_budget_bytes)
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
    kv_dtype: KVDtype | None = None,
    sleep_bytes_per_second: int | None = None,
) -> LayerGroup:
    """Builds layers [first_layer, last_layer) of the model of a config.json, ready to run.

    tensors: by checkpoint name; the group may remove tensors from the mapping. dtype: of the published model. device, kv_dtype:
    see `choose`. sleep_times: how long passes take, for kind `sleep`, which needs no tensors. sleep_bytes_per_second: speed of
    the link of an emulated pod. Raises what `choose` and the group raise.
    """
    choice = choose(kind, config, dtype, device, kv_dtype=kv_dtype)
    if choice.kind == "sleep":
        from functions.stage.models.sleep_group import SleepGroup

        times = sleep_times or PassTimes()
        return SleepGroup(config, first_layer, last_layer, kv_budget_bytes, times, sleep_bytes_per_second)
    if choice.kind == "transformers":
        from functions.stage.models.transformers.group import TransformersGroup

        return TransformersGroup.build(config, tensors, first_layer, last_layer, dtype, choice.device, kv_budget_bytes)
    group = empty_group(choice, config, first_layer, last_layer, dtype, kv_budget_bytes, kv_dtype)
    group.place(tensors)
    group.finish()
    return group
