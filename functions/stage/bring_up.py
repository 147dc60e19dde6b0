"""From the configuration to a running engine, one thing beside the other: bytes flow while torch is being imported."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec

from functions.background import run_in_background
from functions.config import StageConfig
from functions.publication import read_publication
from functions.stage.threads import set_openmp, thread_count
from functions.startup import StartUp
from storage.model_repository import Manifest, read_file
from storage.object_reader import ObjectReader
from storage.weight_loader import LoadedObject, LoadProgress, iterate_layers

if TYPE_CHECKING:
    import torch

    from functions.stage.engine import Engine, PassStatistics
    from functions.stage.layer_group import LayerGroup


@dataclass(frozen=True, slots=True)
class Weights:
    """A model's description, and this stage's objects as they arrive."""

    manifest: Manifest
    model_config: dict[str, Any]
    objects: Iterator[LoadedObject]


def bring_up(config: StageConfig, start_up: StartUp, on_pass: "Callable[[PassStatistics], None]") -> "Engine":
    """An engine that has run one step. Raises WrongPublication, a StorageError, or what the layer group refuses."""
    threads = thread_count(config.threads)
    set_openmp(os.environ, threads)
    opening = run_in_background(lambda: open_weights(config, start_up), "open-weights")
    import torch

    from functions.stage.engine import Engine

    torch.set_num_threads(threads)
    start_up.mark("import")
    weights = opening.result()
    engine = Engine(
        _layer_group(config, weights, start_up),
        num_stages=len(config.cut),
        max_merge=config.max_merge,
        idle_sequence_seconds=config.idle_sequence_seconds,
        on_pass=on_pass,
    )
    start_up.mark("place")
    engine.start()
    engine.warm_up()
    start_up.mark("warm_up")
    return engine


def open_weights(config: StageConfig, start_up: StartUp) -> Weights:
    """Checks that the publication is the one that the configuration names, and lets its bytes flow."""
    reader = ObjectReader(config.store)
    manifest = read_publication(config, reader)
    start_up.mark("connect")
    model_config = msgspec.json.decode(read_file(reader, manifest, "config.json"), type=dict[str, Any])
    if config.layer_group == "sleep":
        return Weights(manifest, model_config, iter(()))
    objects = iterate_layers(reader, manifest, *config.layers, on_progress=_Progress(start_up))
    return Weights(manifest, model_config, objects)


def _layer_group(config: StageConfig, weights: Weights, start_up: StartUp) -> "LayerGroup":
    from functions.stage.build import build_layer_group

    tensors: dict[str, torch.Tensor] = {}
    for loaded in weights.objects:
        tensors |= {name: _tensor(raw.dtype, raw.shape, raw.data) for name, raw in loaded.tensors.items()}
    start_up.mark("last_byte")
    first, last = config.layers
    return build_layer_group(
        config.layer_group,  # type: ignore[arg-type]  # the parser allows nothing else
        weights.model_config,
        tensors,
        first,
        last,
        config.dtype,
        _device(config.device),
        config.kv_cache_bytes,
        config.sleep_seconds,
    )


def _tensor(dtype: str, shape: tuple[int, ...], data: memoryview) -> "torch.Tensor":
    """Over the very memory that the bytes were read into."""
    import torch

    dtypes = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "I8": torch.int8}
    return torch.frombuffer(data, dtype=dtypes[dtype]).view(shape)


def _device(configured: str) -> str:
    import torch

    if configured != "auto":
        return configured
    return "cuda" if torch.cuda.is_available() else "cpu"


class _Progress:
    """Marks the first and the last byte; the loader itself logs what is in."""

    def __init__(self, start_up: StartUp) -> None:
        self._start_up = start_up

    def __call__(self, progress: LoadProgress) -> None:
        self._start_up.mark("first_byte")
        if progress.done_bytes == progress.total_bytes:
            self._start_up.mark("last_byte")
