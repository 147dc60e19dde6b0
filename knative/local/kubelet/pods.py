"""A pod on one machine: a container and its queue-proxy. The container is restarted when it ends and drained at scale-in."""

import asyncio
import contextlib
import logging
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Final

from knative.local.kubelet.container_life import ContainerLife
from knative.local.kubelet.containers import Container
from knative.local.kubelet.processes import free_port, kill_group
from knative.local.proxies.network import EmulatedNetwork
from knative.local.proxies.queue_proxy import QueueProxy
from knative.local.proxies.serving_certs import ServingCerts

_log = logging.getLogger(__name__)

TLS_PORT_KEY: Final = "LAMINA_TLS_PORT"  # docs/reference.md
_BACKOFF_RESET_SECONDS: Final = 600.0  # a container that ran this long starts with the shortest back-off again


@dataclass(frozen=True, slots=True)
class PodTiming:
    """Times for draining and restarting pods. The defaults are those of kubelet and queue-proxy."""

    drain_quiet_seconds: float = 30.0  # time without new requests after which a leaving pod gets SIGTERM
    # Pause before the second restart in a row, doubled each time up to the maximum. The first restart is immediate.
    restart_backoff_seconds: float = 10.0
    restart_backoff_max_seconds: float = 300.0


class Phase(StrEnum):
    STARTING = "starting"
    READY = "ready"
    NOT_READY = "not ready"
    BACK_OFF = "back-off"
    LEAVING = "leaving"
    GONE = "gone"


class LocalPod:
    """One pod: a container's process and its queue-proxy. It calls `on_change` whenever `phase` changes."""

    def __init__(
        self,
        name: str,
        container: Container,
        timing: PodTiming,
        log: Path,
        on_change: Callable[[], None],
        network: EmulatedNetwork | None = None,
        certs: ServingCerts | None = None,
    ) -> None:
        self.name = name
        self.proxy = QueueProxy(container.limits, lambda: self.ready, network, certs)
        self.log = log
        self.phase = Phase.STARTING
        self.restarts = 0
        self.trouble = ""  # why it is not ready: the container's end, the readiness probe's failure, or both
        self.last_end = ""  # why the container last ended; kept after its restart
        self.readiness = ""  # body of the last readiness probe that passed; Lamina's functions tell the phases of their start
        # A function that takes TLS connections itself gets a port for them, as it would have one of the pod's address.
        self._own_tls_port = free_port() if TLS_PORT_KEY in container.environ else 0
        self._container = container
        self._timing = timing
        self._on_change = on_change
        self._life: ContainerLife | None = None
        self._task: asyncio.Task[None] | None = None

    @property
    def ready(self) -> bool:
        return self.phase is Phase.READY

    @property
    def leaving(self) -> bool:
        return self.phase in (Phase.LEAVING, Phase.GONE)

    @property
    def pid(self) -> int | None:
        process = self._life.process if self._life is not None else None
        return None if process is None else process.pid

    @property
    def metrics_port(self) -> int | None:
        return None if self._life is None else self._life.metrics_port

    @property
    def tls_port(self) -> int:
        """Port for requests by TLS: the container's own, else the queue-proxy's; 0: there is none."""
        return self._own_tls_port or self.proxy.tls_port

    async def start(self, folder: Path) -> None:
        """Starts the queue-proxy and then, in a task, the container in `folder`. Returns before it runs; see `phase`."""
        await self.proxy.start()
        self._on_change()
        self._task = asyncio.create_task(self._keep_running(folder), name=f"pod {self.name}")

    async def leave(self) -> None:
        """Removes the pod at scale-in: it serves until no request has come for `drain_quiet_seconds`, then it is stopped.

        The whole takes at most the request timeout; after that the pod is killed.
        """
        if self.leaving:
            return
        self._enter(Phase.LEAVING)
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._container.limits.timeouts.timeout_seconds
        if self.readiness:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(deadline):
                    await self.proxy.quiet(self._timing.drain_quiet_seconds)
        await self.stop(deadline - loop.time())

    async def stop(self, grace_seconds: float) -> None:
        """Sends SIGTERM, after `grace_seconds` SIGKILL to all processes. A pod that was never ready has no grace."""
        self._enter(Phase.LEAVING)
        if self._task is not None:
            if (pid := self.pid) is None:
                self._task.cancel()  # between two lives of the container
            else:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGTERM)
                await asyncio.wait([self._task], timeout=max(0.0, grace_seconds if self.readiness else 0.0))
                kill_group(pid)
            await asyncio.wait([self._task])
        self.proxy.close()
        self._enter(Phase.GONE)

    async def _keep_running(self, folder: Path) -> None:
        loop, backoff = asyncio.get_running_loop(), 0.0
        while not self.leaving:
            began = loop.time()
            self._enter(Phase.STARTING)
            self._life = ContainerLife(self._placed(), self.log, self.proxy.connect, self._probed)
            self.trouble = self.last_end = await self._life.run(folder, self.name)
            self._life = None
            self.proxy.connect(None)
            if self.leaving:
                return
            backoff = 0.0 if loop.time() - began >= _BACKOFF_RESET_SECONDS else backoff
            self.restarts += 1
            _log.warning("pod %s: %s; restart %d in %g s", self.name, self.trouble, self.restarts, backoff)
            self._enter(Phase.BACK_OFF)
            await asyncio.sleep(backoff)
            backoff = min(max(2 * backoff, self._timing.restart_backoff_seconds), self._timing.restart_backoff_max_seconds)

    def _placed(self) -> Container:
        """The container, with the ports of this pod if it takes TLS connections itself."""
        if not self._own_tls_port:
            return self._container
        own = {TLS_PORT_KEY: str(self._own_tls_port), "LAMINA_QUEUE_PROXY_PORT": str(self.proxy.port)}
        return replace(self._container, environ={**self._container.environ, **own})

    def _probed(self, passed: bool, text: str) -> None:
        if passed:
            self.trouble, self.readiness = "", text or "ready"
            self._enter(Phase.READY)
        else:
            previous_end = f"{self.last_end}; " if self.last_end and self.phase is Phase.STARTING else ""
            self.trouble = f"{previous_end}readiness probe: {text}"
            self._enter(Phase.NOT_READY if self.phase is Phase.READY else self.phase)

    def _enter(self, phase: Phase) -> None:
        """Changes the phase and calls `on_change`. A leaving pod can only become GONE: any other change is ignored."""
        if phase is self.phase or self.phase is Phase.GONE or (self.phase is Phase.LEAVING and phase is not Phase.GONE):
            return
        self.phase = phase
        self._on_change()
