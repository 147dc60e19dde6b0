"""Starts a stage's engine from its configuration. Weights are read while libraries are still being imported."""

import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from functions.configuration.config import StageConfig
from functions.configuration.pass_times import PassTimes
from functions.hosting.publication import read_publication
from functions.hosting.startup import StartUp, without_collection
from functions.stage.engine.threads import PassThreads, set_openmp, thread_count
from functions.stage.serving.app import StageMetrics
from storage.loading.weight_cache import WeightCache
from storage.loading.weight_loader import LoadedObject, LoadProgress, iterate_layers, stage_objects
from storage.models.model_repository import read_file
from storage.store.object_reader import ObjectReader

if TYPE_CHECKING:
    from eventing.http.pod_tls import PodTLS
    from functions.stage.engine.engine import Engine
    from functions.stage.kv.build import Tiers
    from functions.stage.models.layer_group import LayerGroup
    from storage.loading.weight_loader import RawTensor

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class ArrivingModel:
    """A model's config.json, and the objects of this stage's layers, which are still being read."""

    config: dict[str, Any]
    objects: Iterator[LoadedObject]


class UnservableModel(Exception):
    """The layers cannot run here, because of architecture, dtype or missing tensors; the message says which."""


@dataclass(frozen=True, slots=True)
class StartedEngine:
    """An engine that has run one step, and the tiers of its KV cache."""

    engine: "Engine"
    tiers: "Tiers"


def bring_up(config: StageConfig, start_up: StartUp, metrics: StageMetrics, tls: "PodTLS | None" = None) -> StartedEngine:
    """Starts the engine and returns once it has run one step. Raises WrongPublication, UnservableModel or a StorageError.

    tls: given if other instances are reached by https.
    """
    threads = thread_count(config.threads)
    os.environ["OPENBLAS_NUM_THREADS"] = "1"  # of numpy, which multiplies no matrices here; read when numpy is loaded
    opening = _in_background(lambda: open_model(config, start_up, metrics), "open-model")
    with without_collection():
        from functions.grammars.compiler import GrammarCompiler
        from functions.stage.engine.engine import Engine
        from functions.stage.engine.kv_tiers import ComputeRate
        from functions.stage.kv.build import tiers_of

    group = _layer_group(config, opening, threads, start_up)
    rate = ComputeRate()
    tiers = tiers_of(config, group.kv, rate, metrics.observe_restore, metrics.kept_bytes.inc, tls)

    engine = Engine(
        group,
        num_stages=len(config.cut),
        max_merge=config.max_merge,
        idle_sequence_seconds=config.idle_sequence_seconds,
        max_memory_waiters=config.max_memory_waiters,
        threads=PassThreads(threads, 0 if group.shares_work else config.busy_threads),
        grammars=GrammarCompiler(lambda: _read_tokenizer(config)) if group.last_layer == group.num_layers else None,
        tiers=tiers.tiers,
        rate=rate,
        wire_dtype="I8" if config.wire_dtype == "int8" else None,
        on_evicted=None if tiers.writer is None else tiers.writer.evicted,
        on_pass=metrics.observe_pass,
        on_reuse=metrics.observe_reuse,
    )
    start_up.mark("place")
    engine.start()
    engine.warm_up()
    start_up.mark("warm_up")
    return StartedEngine(engine, tiers)


def open_model(config: StageConfig, start_up: StartUp, metrics: StageMetrics) -> ArrivingModel:
    """Checks that the publication is the configured one, and starts reading its objects."""
    reader = ObjectReader(config.store)
    manifest = read_publication(config, reader, config.layers)
    start_up.mark("connect")
    model_config = msgspec.json.decode(read_file(reader, manifest, "config.json"), type=dict[str, Any])
    if config.layer_group == "sleep":
        if config.sleep_bytes_per_second is not None:
            weights = sum(manifest.objects[name].bytes for name in stage_objects(manifest, *config.layers))
            time.sleep(weights / config.sleep_bytes_per_second)
        return ArrivingModel(model_config, iter(()))

    def loaded(progress: LoadProgress) -> None:
        start_up.mark("first_byte")
        start_up.loaded_bytes, start_up.total_bytes = progress.done_bytes, progress.total_bytes
        metrics.loaded_bytes.set(progress.done_bytes)
        metrics.weights_bytes.set(progress.total_bytes)
        if progress.done_bytes == progress.total_bytes:
            start_up.mark("last_byte")

    cache = WeightCache(Path(config.weights_cache), config.weights_cache_bytes) if config.weights_cache else None
    objects = iterate_layers(reader, manifest, *config.layers, cache=cache, on_progress=loaded)
    return ArrivingModel(model_config, objects)


def _read_tokenizer(config: StageConfig) -> str:
    """Reads the model's tokenizer.json. Called for the first grammar, since most pods never need it.

    Raises a StorageError or WrongPublication.
    """
    with closing(ObjectReader(config.store)) as reader:
        return read_file(reader, read_publication(config, reader, config.layers), "tokenizer.json").decode()


def _in_background(action: Callable[[], T], name: str) -> "Future[T]":
    """Runs `action` in a daemon thread and returns the future of its result.

    The process would wait for a ThreadPoolExecutor's threads when it ends.
    """
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(action())
        except BaseException as error:  # noqa: BLE001 - the future passes it on
            future.set_exception(error)

    threading.Thread(target=run, name=name, daemon=True).start()
    return future


def _layer_group(config: StageConfig, opening: "Future[ArrivingModel]", threads: int, start_up: StartUp) -> "LayerGroup":
    from functions.stage.models.build import UnsupportedDtype
    from functions.stage.models.families import UnsupportedArchitecture
    from functions.stage.models.layer_group import MissingTensors
    from storage.checkpoints.llama_config import UnsupportedConfig

    try:
        return _built(config, opening, threads, start_up)
    except (
        UnsupportedArchitecture,
        UnsupportedConfig,
        UnsupportedDtype,
        MissingTensors,
        ValueError,
    ) as error:
        what = f"layers {config.layers[0]}:{config.layers[1]} of {config.model} in {config.dtype} as {config.layer_group}"
        raise UnservableModel(f"{what}: {error}") from error


def _built(config: StageConfig, opening: "Future[ArrivingModel]", threads: int, start_up: StartUp) -> "LayerGroup":
    from functions.stage.models.build import Kind, build_layer_group, choose, empty_group, import_group

    model = opening.result()
    kind: Kind = config.layer_group  # type: ignore[assignment]  # the parser allows nothing else
    with without_collection():
        choice = choose(kind, model.config, config.dtype, config.device, lambda: set_openmp(os.environ, threads))
        import_group(choice)
    start_up.mark("import")
    if choice.kind in ("native", "llama"):
        # Packs each layer as it arrives, so that memory holds little more than the weights.
        group = empty_group(choice, model.config, *config.layers, config.dtype, config.kv_cache_bytes)
        for loaded in model.objects:
            group.place(loaded.tensors)
        start_up.mark("last_byte")
        group.finish()
        return group
    tensors: dict[str, RawTensor] = {}
    for loaded in model.objects:
        tensors |= loaded.tensors
    start_up.mark("last_byte")
    return build_layer_group(
        choice.kind,
        model.config,
        tensors,
        *config.layers,
        config.dtype,
        choice.device,
        config.kv_cache_bytes,
        config.sleep_pass_times or PassTimes(fixed_seconds=config.sleep_seconds),
    )
