"""The gateway as a function: it serves requests while a thread loads the tokenizer, and reports its health."""

import logging
import socket
import threading
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Final

from eventing.problems import NotReady
from functions.configuration.config import GatewayConfig
from functions.gateway.answers.adapters import ServedModels
from functions.gateway.answers.authentication import KeyRing
from functions.gateway.answers.metrics import GatewayMetrics
from functions.gateway.answers.service import AnswerService
from functions.gateway.app import MAX_REQUEST_BYTES, client_limits, configured_jobs, create_app, gateway_admission
from functions.gateway.build import RunningScheduler
from functions.gateway.jobs.lines import LineAnswerer
from functions.gateway.jobs.worker import BatchMetrics, BatchWorker
from functions.gateway.page.pipeline_state import PipelineWatch, StageDescription
from functions.gateway.scheduling.metrics import SchedulerCollector
from functions.gateway.text.tokenizer import ModelText
from functions.hosting.answering import Service
from functions.hosting.management import Management
from functions.hosting.publication import WrongPublication, read_publication
from functions.hosting.startup import StartUp
from storage.errors import StorageError
from storage.store.object_reader import ObjectReader
from storage.store.payload_store import PayloadStore

_log: Final = logging.getLogger(__name__)

_FAILED_STATUS: Final = 1
_RUNNING_THREADS: Final = 512  # for running answers, one each: far more than the stages of any pipeline compute at once
_BATCHES_SECONDS: Final = 5.0  # at the end, for lines of batches to be given up and stored
_REQUEST_BYTES: Final = 8 * MAX_REQUEST_BYTES  # most bytes of all request bodies in memory together


class GatewayFunction:
    """The gateway of one pipeline: its HTTP service, scheduler and metrics, from start to drain and close."""

    def __init__(
        self,
        config: GatewayConfig,
        start_up: StartUp,
        running: RunningScheduler,
        turn: Callable[[bool], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        """The HTTP service answers NotReady until `start` has loaded the tokenizer. `close` also closes `running`.

        `turn` returns a context manager that is entered for each line of a batch, and raises NotReady while lines must wait.
        Raises ConfigError for a file of API keys that cannot be used.
        """
        counts = config.limits_store is not None
        self._keys = KeyRing(config.api_keys, config.api_key_files or (), takes_budgets=counts)
        self._config = config
        self._start_up = start_up
        self._models = ServedModels(config.model, PayloadStore(config.store) if config.adapters else None)
        self.metrics = GatewayMetrics()
        self.metrics.queue_limit.set(config.queue_limit)
        self.metrics.aim(config.objective)
        start_up.report_to(self.metrics.phase_ended)
        self._answer_service: AnswerService | None = None
        self._loaded = threading.Event()  # the tokenizer is loaded, or loading it has failed
        self.running = running
        self._draining = False
        if self._keys.is_open:
            _log.warning("open to everybody: neither LAMINA_API_KEYS nor LAMINA_API_KEY_FILES is set")
        self.worker: BatchWorker | None = None
        jobs, changed = configured_jobs(config), None
        if jobs is not None:
            answerer = LineAnswerer(self._ready_answer_service, config, turn)
            waiting = lambda: running.scheduler.stats().waiting  # noqa: E731
            metrics = BatchMetrics(self.metrics.registry)
            self.worker = BatchWorker(jobs.batches, answerer, waiting, jobs.events.tell, jobs.hold, metrics)
            changed = self.worker.woken.set
        app = create_app(
            config,
            self._ready_answer_service,
            self.metrics,
            self._keys,
            watch=self._pipeline_watch(),
            jobs=jobs,
            models=self._models,
            batches_changed=changed or (lambda: None),
        )
        self.service = Service(
            app,
            Management(self.metrics.registry, sick=running.scheduler.sick, ready=self._ready),
            gateway_admission(config, self._keys, app),
            threads=config.queue_limit + _RUNNING_THREADS,
            request_bytes=_REQUEST_BYTES,
        )
        names = [f"{first}:{last}" for (first, last), _ in config.stages]
        for name, service in zip(names, running.services, strict=True):
            refused = self.metrics.refused_addresses.labels(name)
            if running.watch is not None:
                refused.set_function(partial(running.watch.refused, service))
        self.metrics.registry.register(SchedulerCollector(self.running.scheduler.stats, names))

    def start(self, stop: Callable[[int], None]) -> None:
        """Starts a thread that loads the tokenizer and the chat template, and returns at once.

        If loading fails, the thread logs the cause and calls `stop` with the exit status 1. `stop` ends the process.
        """
        threading.Thread(target=self._load, args=(stop,), name="start-up", daemon=True).start()

    def await_ready(self, seconds: float) -> bool:
        """Waits until the tokenizer is loaded. Returns False if that takes longer than `seconds`, or if loading failed."""
        return self._loaded.wait(seconds) and self._answer_service is not None

    def drain(self) -> None:
        """Makes `/readyz` report not ready, so that new requests go to other gateways.

        Requests that still arrive are answered.
        """
        self._draining = True
        if self.worker is not None:
            self.worker.stop()

    def close(self) -> None:
        """Stops the scheduler and exports the remaining traces. Call it only after the last request has been answered."""
        if self.worker is not None:
            self.worker.stop()
            self.worker.join(_BATCHES_SECONDS)
        self.running.close()

    def _load(self, stop: Callable[[int], None]) -> None:
        try:
            reader = ObjectReader(self._config.store)
            manifest = read_publication(self._config, reader)
            self._start_up.mark("connect")
            parses = self._config.parse_control_tokens == "on"
            text = ModelText.load(reader, manifest, self._config.tool_parser, parses)
            reader.close()
        except (StorageError, WrongPublication) as error:
            _log.error("the gateway cannot start: %s", error)
            stop(_FAILED_STATUS)
        except Exception:  # noqa: BLE001 - logged, and told to the server
            _log.exception("the gateway cannot start")
            stop(_FAILED_STATUS)
        else:
            self._start_up.mark("last_byte")
            self.metrics.ready.set(1)
            limits, running = client_limits(self._config, self._keys), self.running
            self._answer_service = AnswerService(
                text, running.scheduler, self.metrics, running.tracer, limits, self._models, manifest.embedder
            )
            if self.worker is not None:
                self.worker.start()
            _log.info("ready after %.2f s", self._start_up.phases()["last_byte"])
        finally:
            self._loaded.set()

    def _pipeline_watch(self) -> PipelineWatch:
        config = self._config
        targets = config.stage_targets or [0.0] * len(config.stages)
        stages = zip(self.running.services, config.cut, targets, strict=True)
        return PipelineWatch(
            model=config.model,
            pipeline=config.pipeline,
            queue_limit=config.queue_limit,
            stages=tuple(StageDescription(service, layers, target or None) for service, layers, target in stages),
            status=self.running.scheduler.status,
            ready=lambda: self._answer_service is not None,
            draining=lambda: self._draining,
            adapters=self._models.digests if config.adapters else None,
            has_batches=self._config.jobs_store is not None,
        )

    def _ready_answer_service(self) -> AnswerService:
        if self._answer_service is None:
            raise NotReady(f"{socket.gethostname()} is still loading the tokenizer of {self._config.model}")
        return self._answer_service

    def _ready(self) -> tuple[bool, Mapping[str, object]]:
        return self._answer_service is not None and not self._draining, {"start_up": self._start_up.phases()}
