"""Starts a stage's engine from the configuration and from the model, which is still being read."""

import os
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING

from functions.configuration.config import StageConfig
from functions.configuration.pass_times import PassTimes
from functions.hosting.publication import read_publication
from functions.hosting.startup import StartUp, without_collection
from functions.stage.engine.threads import PassThreads, set_openmp, thread_count
from functions.stage.serving.adapters import adapter_loader
from functions.stage.serving.app import StageMetrics
from functions.stage.serving.arriving import ArrivingModel
from storage.models.model_repository import read_file
from storage.store.object_reader import ObjectReader

if TYPE_CHECKING:
    from eventing.http.pod_tls import PodTLS
    from functions.stage.engine.engine import Engine
    from functions.stage.kv.build import Tiers
    from functions.stage.models.layer_group import LayerGroup
    from functions.stage.models.vector_head import VectorHead
    from storage.loading.weight_loader import RawTensor


class UnservableModel(Exception):
    """The layers cannot run here, because of architecture, dtype or missing tensors. The message says why."""


@dataclass(frozen=True, slots=True)
class StartedEngine:
    """A started engine, which has already run one step, and the tiers of its KV cache."""

    engine: "Engine"
    tiers: "Tiers"


def bring_up(
    config: StageConfig, arriving: ArrivingModel, start_up: StartUp, metrics: StageMetrics, tls: "PodTLS | None" = None
) -> StartedEngine:
    """Starts the engine and returns once it has run one step. Raises WrongPublication, UnservableModel or a StorageError.

    tls: given if other instances are reached over https.
    """
    threads = thread_count(config.threads)
    os.environ["OPENBLAS_NUM_THREADS"] = "1"  # of numpy, which multiplies no matrices here; read when numpy is loaded
    with without_collection():
        from functions.grammars.compiler import GrammarCompiler
        from functions.stage.engine.engine import Engine
        from functions.stage.engine.kv_tiers import ComputeRate
        from functions.stage.kv.build import tiers_of

    group, vector_head = _layer_group(config, arriving, threads, start_up, metrics)
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
        adapters=config.adapters,
        load_adapter=adapter_loader(config) if config.adapters else None,
        on_adapter=metrics.observe_adapter,
        wire_dtype="I8" if config.wire_dtype == "int8" else None,
        vector_head=vector_head,
        on_evicted=None if tiers.writer is None else tiers.writer.evicted,
        on_pass=metrics.observe_pass,
        on_reuse=metrics.observe_reuse,
    )
    start_up.mark("place")
    engine.start()
    engine.warm_up()
    start_up.mark("warm_up")
    return StartedEngine(engine, tiers)


def _read_tokenizer(config: StageConfig) -> str:
    """Reads the model's tokenizer.json and returns its text. Called only for the first grammar: most pods never need it.

    Raises a StorageError or WrongPublication.
    """
    with closing(ObjectReader(config.store)) as reader:
        return read_file(reader, read_publication(config, reader, config.layers), "tokenizer.json").decode()


def _layer_group(
    config: StageConfig, arriving: ArrivingModel, threads: int, start_up: StartUp, metrics: StageMetrics
) -> "tuple[LayerGroup, VectorHead]":
    from functions.stage.models.build import UnsupportedDtype
    from functions.stage.models.layer_group import MissingTensors
    from storage.errors import ArchitectureUnsupported

    try:
        return _built(config, arriving, threads, start_up, metrics)
    except (ArchitectureUnsupported, UnsupportedDtype, MissingTensors, ValueError) as error:
        what = f"layers {config.layers[0]}:{config.layers[1]} of {config.model} in {config.dtype} as {config.layer_group}"
        raise UnservableModel(f"{what}: {error}") from error


def _built(
    config: StageConfig, arriving: ArrivingModel, threads: int, start_up: StartUp, metrics: StageMetrics
) -> "tuple[LayerGroup, VectorHead]":
    from functions.stage.models.build import Kind, build_layer_group, choose, empty_group, import_group
    from functions.stage.models.vector_head import VectorHead

    model_config, objects = arriving.opened()
    vector_head = VectorHead(model_config)
    kind: Kind = config.layer_group  # type: ignore[assignment]  # the parser allows nothing else
    with without_collection():
        choice = choose(
            kind, model_config, config.dtype, config.device, lambda: set_openmp(os.environ, threads), config.kv_dtype
        )
        import_group(choice)
    start_up.mark("import")
    if choice.kind in ("native", "llama"):
        # Packs each layer as it arrives, so that memory holds little more than the weights.
        group = empty_group(
            choice,
            model_config,
            *config.layers,
            config.dtype,
            config.kv_cache_bytes,
            config.kv_dtype,
            config.weights_budget_bytes,
        )
        for loaded in objects:
            vector_head.place(loaded.tensors)
            group.place(loaded.tensors)
        start_up.mark("last_byte")
        group.finish()
        if config.weights_budget_bytes is not None and choice.kind == "native":
            metrics.watch_experts(group.cold_experts)
        if group.last_layer == group.num_layers:
            vector_head.finish()
        return group, vector_head
    tensors: dict[str, RawTensor] = {}
    for loaded in objects:
        tensors |= loaded.tensors
    start_up.mark("last_byte")
    built = build_layer_group(
        choice.kind,
        model_config,
        tensors,
        *config.layers,
        config.dtype,
        choice.device,
        config.kv_cache_bytes,
        config.sleep_pass_times or PassTimes(fixed_seconds=config.sleep_seconds),
        sleep_bytes_per_second=config.sleep_bytes_per_second,
    )
    return built, vector_head
