"""Reads a stage's model from the store while heavy libraries are still being imported. Imports none of these itself."""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import msgspec

from functions.configuration.config import StageConfig
from functions.hosting.publication import read_publication
from functions.hosting.startup import StartUp
from storage.loading.weight_cache import WeightCache
from storage.loading.weight_loader import LoadedObject, LoadProgress, iterate_layers, stage_objects
from storage.models.model_repository import read_file
from storage.store.object_reader import ObjectReader

_Opened = tuple[dict[str, Any], Iterator[LoadedObject]]


class ArrivingModel:
    """A model that is being read: checks the published model and reads the objects of the stage's layers, in threads.

    The threads start in the constructor.
    """

    def __init__(self, config: StageConfig, start_up: StartUp) -> None:
        self._config = config
        self._start_up = start_up
        self._opened: Future[_Opened] = Future()
        # Not a ThreadPoolExecutor, for whose threads the process would wait when it ends.
        threading.Thread(target=self._run, name="open-model", daemon=True).start()

    def opened(self) -> _Opened:
        """Waits until the published model is checked. Returns its config.json, and an iterator of objects as they arrive.

        Raises WrongPublication or a StorageError.
        """
        return self._opened.result()

    def _run(self) -> None:
        try:
            self._opened.set_result(self._open())
        except BaseException as error:  # noqa: BLE001 - the future passes it on
            self._opened.set_exception(error)

    def _open(self) -> _Opened:
        config = self._config
        reader = ObjectReader(config.store)
        manifest = read_publication(config, reader, config.layers)
        self._start_up.mark("connect")
        model_config = msgspec.json.decode(read_file(reader, manifest, "config.json"), type=dict[str, Any])
        if config.layer_group == "sleep":
            if config.sleep_bytes_per_second is not None:
                weights = sum(manifest.objects[name].bytes for name in stage_objects(manifest, *config.layers))
                time.sleep(weights / config.sleep_bytes_per_second)
            return model_config, iter(())
        cache = WeightCache(Path(config.weights_cache), config.weights_cache_bytes) if config.weights_cache else None
        return model_config, iterate_layers(
            reader,
            manifest,
            *config.layers,
            cache=cache,
            on_progress=self._progressed,
            map_files=config.weights_budget_bytes is not None,
        )

    def _progressed(self, progress: LoadProgress) -> None:
        self._start_up.mark("first_byte")
        self._start_up.loaded_bytes, self._start_up.total_bytes = progress.done_bytes, progress.total_bytes
        if progress.done_bytes == progress.total_bytes:
            self._start_up.mark("last_byte")
