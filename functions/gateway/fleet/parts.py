"""The members' parts of this gateway: each is built on first use, and closed when it is idle and memory is needed."""

import gc
import logging
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

from prometheus_client import CollectorRegistry

from eventing.problems import NotReady
from functions.configuration.config import GatewayConfig
from functions.configuration.settings import ConfigError
from functions.gateway.build import start_scheduler
from functions.gateway.fleet.members import Version
from functions.gateway.function import GatewayFunction
from functions.gateway.stages.endpoints import EndpointsWatch
from functions.hosting.startup import StartUp, trim_memory

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIApplication

_log = logging.getLogger(__name__)

_LOOK_SECONDS: Final = 1.0  # between two looks at the memory
_LOAD_SECONDS: Final = 60.0  # how long a request waits for tokenizer and template
_RETRY_SECONDS: Final = 2.0  # a part that could not be loaded is not tried again sooner
_PAGE_BYTES: Final = 4096

# Entered for each line of a member's batches; raises NotReady while lines must wait. Gets whether the batch is late.
Turn = Callable[[Version, bool], AbstractContextManager[object]]
PartState = Literal["loading", "loaded", "failed"]


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * _PAGE_BYTES


class Part:
    """One version's part of the gateway: tokenizer, chat template, scheduler, routes, API keys and limits."""

    def __init__(self, version: Version, watch: EndpointsWatch | None, turn: Turn) -> None:
        self.version = version
        self._turn = turn
        self.in_flight = 0  # requests; guarded by the lock of Parts, like `used_at`
        self.used_at = time.monotonic()
        self.failed_at = 0.0  # when it could not be built or loaded; 0: that did not happen
        self.retired = False  # closed after its last request
        self.function: GatewayFunction | None = None
        self._watch = watch
        self._lock = threading.Lock()

    @property
    def state(self) -> PartState:
        if self.failed_at:
            return "failed"
        return "loaded" if self.function is not None and self.function.await_ready(0.0) else "loading"

    @property
    def is_idle(self) -> bool:
        if self.in_flight or self.function is None:
            return not self.in_flight
        if self.function.worker is not None and self.function.worker.runs:
            return False
        status = self.function.running.scheduler.status()
        return not status.waiting and not status.running

    def load(self, *, wakes: bool = True) -> "WSGIApplication":
        """Builds the part if necessary, and waits up to _LOAD_SECONDS until it can answer. Raises NotReady.

        If `wakes`, and the part is not built yet, its stages start at once.
        """
        config = self.version.config
        with self._lock:
            if self.function is None:
                if config is None:
                    raise NotReady(f"member {self.version.member} cannot be served: {self.version.trouble}")
                self.function = self._build(config, wakes=wakes)
            function = self.function
        if not function.await_ready(_LOAD_SECONDS):
            if self.failed_at:
                raise NotReady(f"member {self.version.member} cannot be loaded; the log of this gateway says why")
            raise NotReady(f"member {self.version.member} is still being loaded; ask again later")
        return function.service.application

    def close(self) -> None:
        with self._lock:
            if self.function is not None:
                self.function.drain()
                self.function.close()
                self.function = None

    def _build(self, config: GatewayConfig, *, wakes: bool) -> GatewayFunction:
        try:
            running = start_scheduler(config, self._watch)
            if wakes:
                running.scheduler.wake()
            function = GatewayFunction(config, StartUp(), running, partial(self._turn, self.version))
        except ConfigError as error:
            self.failed_at = time.monotonic()
            raise NotReady(f"member {self.version.member} cannot be served: {error}") from error
        function.start(self._failed)
        return function

    def _failed(self, _status: int) -> None:
        self.failed_at = time.monotonic()


@dataclass(eq=False)
class Parts:
    """The parts of all members that are loaded: builds, shares and evicts them. Thread-safe."""

    _watch: EndpointsWatch | None
    _memory_bytes: int  # of the process, beyond which idle parts are given up
    _turn: Turn
    evictions: int = 0

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._parts: dict[Version, Part] = {}
        self._gone: weakref.WeakSet[Version] = weakref.WeakSet()
        self._stopped = threading.Event()
        self.thread = threading.Thread(target=self._keep_memory, name="fleet-memory", daemon=True)

    def loaded(self) -> list[Part]:
        with self._lock:
            return list(self._parts.values())

    def registries(self) -> Iterator[tuple[str, CollectorRegistry]]:
        """Yields the model and the metrics of each part that is built."""
        for part in self.loaded():
            if (function := part.function) is not None:
                yield part.version.model, function.metrics.registry

    @contextmanager
    def use(self, version: Version) -> Iterator[Part]:
        """Context manager that yields the part for this version. The part is not closed before the context ends."""
        with self._lock:
            part, now = self._parts.get(version), time.monotonic()
            if part is not None and part.failed_at and now - part.failed_at > _RETRY_SECONDS and not part.in_flight:
                threading.Thread(target=part.close, name="fleet-close", daemon=True).start()
                part = None
            if part is None:
                part = Part(version, self._watch, self._turn)
                part.retired = version in self._gone  # found before it was replaced
                if not part.retired:
                    self._parts[version] = part
            part.in_flight += 1
            part.used_at = now
        try:
            yield part
        finally:
            with self._lock:
                part.in_flight -= 1
                part.used_at = time.monotonic()
                over = part.retired and not part.in_flight
            if over:
                part.close()

    def retire(self, versions: Sequence[Version]) -> None:
        """Closes the parts of versions that were removed or replaced, after their last requests."""
        for version in versions:
            with self._lock:
                self._gone.add(version)
                part = self._parts.pop(version, None)
                if part is not None:
                    part.retired = True
                over = part is not None and not part.in_flight
            if part is not None and over:
                part.close()

    def evict(self) -> bool:
        """Closes the idle part that was used least recently. Returns whether there was one."""
        with self._lock:
            idle = sorted((part for part in self._parts.values() if part.is_idle), key=lambda part: part.used_at)
            if not idle:
                return False
            part = self._parts.pop(idle[0].version)
            self.evictions += 1
        part.close()
        _log.info("gave up the part of %s, idle for %.0f s", part.version.member, time.monotonic() - part.used_at)
        del part, idle
        gc.collect()
        trim_memory()
        return True

    def close(self) -> None:
        self._stopped.set()
        self.thread.join(_LOOK_SECONDS)
        with self._lock:
            parts, self._parts = list(self._parts.values()), {}
        closing = [threading.Thread(target=part.close, name="fleet-close", daemon=True) for part in parts]
        for thread in closing:
            thread.start()
        for thread in closing:
            thread.join()

    def _keep_memory(self) -> None:
        while not self._stopped.wait(_LOOK_SECONDS):
            try:
                while resident_bytes() > self._memory_bytes and self.evict():
                    pass
            except Exception:  # noqa: BLE001 - without this thread memory would grow for ever
                _log.exception("giving up idle members failed")
