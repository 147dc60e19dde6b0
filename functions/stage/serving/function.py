"""The function that serves a stage: starts the engine while the server already runs, and answers probes."""

import logging
import secrets
import socket
import threading
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Final

from eventing.claim_check import ClaimCheck
from eventing.problems import NotReady
from functions.configuration.config import StageConfig
from functions.hosting.answering import Service
from functions.hosting.management import Management
from functions.hosting.publication import WrongPublication
from functions.hosting.server import listen
from functions.hosting.startup import StartUp
from functions.observing.telemetry import make_tracer
from functions.stage.serving.app import MAX_EVENT_BYTES, StageApp, StageMetrics, stage_admission
from functions.stage.serving.arriving import ArrivingModel
from functions.stage.serving.bring_up import UnservableModel, bring_up
from functions.stage.serving.handlers import EventHandlers, StageIdentity
from functions.stage.serving.scoring import Scorer
from storage.errors import StorageError
from storage.loading.memory import use_huge_pages
from storage.store.payload_store import PayloadStore

if TYPE_CHECKING:
    from functions.stage.engine.engine import Engine
    from functions.stage.kv.store_tier import KVWriter

_log: Final = logging.getLogger(__name__)

_STUCK_AFTER_SECONDS: Final = 300.0  # far longer than any pass: a chunk of a large model on a slow core takes tens of seconds
_KV_WRITE_SECONDS: Final = 20.0  # for writing cached KV at the end, within what queue-proxy's drain leaves of the grace period
_HUGE_PAGES_AFTER_SECONDS: Final = 3.0  # after the start: moving weights would delay the first token
_FAILED_STATUS: Final = 1
_THREADS: Final = 64  # far above any containerConcurrency, so that events that wait for weights do not block others
_REQUEST_BYTES: Final = 2 * MAX_EVENT_BYTES  # of all events together


class StageFunction:
    """The function that serves one stage of one pipeline. Owns the engine, the event handlers and the metrics."""

    def __init__(self, config: StageConfig, start_up: StartUp, arriving: ArrivingModel) -> None:
        """Builds the service. Raises ConfigError if the TLS files cannot be used."""
        self.instance = f"{socket.gethostname()}-{secrets.token_hex(4)}"
        self._config = config
        self._tls = config.tls.load()
        self._start_up = start_up
        self._arriving = arriving
        self._metrics = StageMetrics()
        self._metrics.loaded_bytes.set_function(lambda: start_up.loaded_bytes)
        self._metrics.weights_bytes.set_function(lambda: start_up.total_bytes)
        start_up.report_to(self._metrics.phase_ended)
        self._changed = threading.Condition()
        self._engine: Engine | None = None
        self._kv_writer: KVWriter | None = None
        self._failed = False
        self._draining = False
        self._tracer = make_tracer(config.traces_endpoint, "lamina-stage", {"lamina.pipeline": config.pipeline})
        identity = StageIdentity.of(config, self.instance)
        claims = ClaimCheck(PayloadStore(config.store), config.store.bucket)
        scorer = Scorer(identity, self.engine, claims, config.pipeline_token)
        handlers = EventHandlers(identity, self.engine, scorer.answer, start_up, self._tracer)
        self.service = Service(
            StageApp(handlers, self._metrics, *config.pipeline_tokens),
            Management(self._metrics.registry, sick=self._sick, ready=self._ready),
            stage_admission(*config.pipeline_tokens),
            threads=_THREADS,
            request_bytes=_REQUEST_BYTES,
        )

    def start(self, stop: Callable[[int], None]) -> None:
        """Starts the engine in a thread and returns. If the start fails, logs the cause and calls `stop` with status 1."""
        if self._config.tls_port is not None and not self._open_tls_port(self._config.tls_port):
            stop(_FAILED_STATUS)
            return
        threading.Thread(target=self._bring_up, args=(stop,), name="start-up", daemon=True).start()

    def drain(self) -> None:
        """Ends long waits: refuses warm-up events that wait for weights, and answers releases that wait for memory.

        The server calls this at SIGTERM.
        """
        with self._changed:
            self._draining = True
            self._changed.notify_all()
            if self._engine is not None:
                self._engine.drain()

    def close(self) -> None:
        """Writes the prefix cache to the store and stops the engine. The server calls this after the last request."""
        if self._engine is not None:
            if self._kv_writer is not None:
                self._kv_writer.drain(self._engine, _KV_WRITE_SECONDS)
            self._engine.stop(drain=False)
        self._tracer.close()

    def engine(self, wait_seconds: float) -> "Engine":
        """Returns the engine after it has run its first step. Raises NotReady if that takes longer than `wait_seconds`."""
        if self._engine is not None:
            return self._engine
        with self._changed:
            self._changed.wait_for(lambda: self._engine or self._failed or self._draining, max(0.0, wait_seconds))
            if self._engine is not None:
                return self._engine
        if self._failed:
            raise NotReady(f"the start of {self.instance} failed; its log has the cause")
        if self._draining:
            raise NotReady(f"{self.instance} was told to stop before its weights were in; another instance will answer")
        raise NotReady(f"{self.instance} is starting; ended are the phases {', '.join(self._start_up.phases())}")

    def _open_tls_port(self, port: int) -> bool:
        from functions.hosting.tls_port import serve_tls

        assert self._tls is not None, "the configuration was checked"
        try:
            listener = listen(self._config.listen, port)
        except OSError as error:
            _log.error("cannot listen on %s; choose another with LAMINA_TLS_PORT", error.strerror)
            return False
        serve_tls(listener, self._tls, self._config.queue_proxy_port)
        _log.info("TLS on port %d", port)
        return True

    def _bring_up(self, stop: Callable[[int], None]) -> None:
        try:
            ready = bring_up(self._config, self._arriving, self._start_up, self._metrics, self._tls)
        except (StorageError, WrongPublication, UnservableModel) as error:
            _log.error("the stage cannot start: %s", error)
            self._fail(stop)
            return
        except Exception:  # noqa: BLE001 - logged, and the server stops
            _log.exception("the stage cannot start")
            self._fail(stop)
            return
        engine = ready.engine
        self._metrics.watch(engine)
        self._metrics.ready.set(1)
        with self._changed:
            self._engine, self._kv_writer = engine, ready.tiers.writer
            self._changed.notify_all()
        phases = ", ".join(f"{phase} {seconds:.2f} s" for phase, seconds in self._start_up.phases().items())
        _log.info("ready: %s; layers run by %s", phases, engine.runs_by)
        time.sleep(_HUGE_PAGES_AFTER_SECONDS)
        _log.info("%d MiB are in huge pages", use_huge_pages() // 2**20)

    def _fail(self, stop: Callable[[int], None]) -> None:
        with self._changed:
            self._failed = True
            self._changed.notify_all()
        stop(_FAILED_STATUS)

    def _sick(self) -> str | None:
        if self._engine is not None and not self._engine.alive(_STUCK_AFTER_SECONDS):
            return f"the engine's thread is dead, or one pass takes longer than {_STUCK_AFTER_SECONDS:.0f} s"
        return None

    def _ready(self) -> tuple[bool, Mapping[str, object]]:
        return self._engine is not None and not self._draining, {
            "instance": self.instance,
            "start_up": self._start_up.phases(),
            "layers_run_by": None if self._engine is None else self._engine.runs_by,
        }
