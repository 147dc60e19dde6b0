"""One run of a container's process from start to end, with its probes and its memory limit."""

import asyncio
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Final

from knative.local.kubelet.containers import Container
from knative.local.kubelet.probes import Probe, run_probe
from knative.local.kubelet.processes import Process, free_port, kill_group, memory_bytes, start_process

_MEMORY_CHECK_SECONDS: Final = 1.0


class ContainerLife:
    """One run of a container's process. Call `run` once: it starts the process, waits for its end, and returns the cause.

    While it waits it calls `on_port` and `on_ready` in the event loop's thread.
    """

    def __init__(self, container: Container, log: Path, on_port: Callable[[int], None], on_ready: Callable[[bool, str], None]):
        """on_port: called with the port when the process runs.

        on_ready: called after readiness probes with whether the container is ready, and the text of the probe's reply or error.
        """
        self.process: Process | None = None
        self.metrics_port: int | None = None
        self._container = container
        self._log = log
        self._on_port = on_port
        self._on_ready = on_ready
        self._killed_because: str | None = None

    async def run(self, folder: Path, name: str) -> str:
        port, self.metrics_port = free_port(), free_port()
        # A pod on one machine has no address of its own: it listens on loopback, at ports of its own.
        places = {"PORT": str(port), "LAMINA_LISTEN": "127.0.0.1", "LAMINA_METRICS_PORT": str(self.metrics_port)}
        environ = {**self._container.environ, **places, "HOSTNAME": name}
        try:
            process = await start_process(self._container.command, environ, folder, self._log)
        except OSError as error:
            return f"cannot run {self._container.command[0]}: {error.strerror}"
        self.process = process
        self._on_port(port)
        watches = [asyncio.create_task(self._watch_readiness(self._container.readiness, port, self.metrics_port))]
        if self._container.liveness is not None:
            watches.append(asyncio.create_task(self._watch_liveness(self._container.liveness, process, port)))
        if self._container.memory_limit_bytes is not None:
            watches.append(asyncio.create_task(self._watch_memory(self._container.memory_limit_bytes, process)))
        try:
            status = await process.wait()
        finally:
            for watch in watches:
                watch.cancel()
            kill_group(process.pid)  # other processes of its session as well
        how = f"killed by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
        tail = last_line(self._log)
        return self._killed_because or (f"{how}: {tail}" if tail else how)

    async def _watch_readiness(self, probe: Probe, port: int, metrics_port: int) -> None:
        await asyncio.sleep(probe.initial_delay_seconds)
        passed, failed, was_ready, details = 0, 0, False, ""
        while True:
            current = probe if was_ready else probe.until_ready
            result = await run_probe(current, port)
            passed, failed = (passed + 1, 0) if result.passed else (0, failed + 1)
            if passed == probe.success_threshold and not details:
                at_metrics_port = await run_probe(probe, metrics_port)  # Lamina's functions tell more there
                details = at_metrics_port.text if at_metrics_port.passed else ""
            was_ready = was_ready or passed >= probe.success_threshold
            if result.passed and passed >= probe.success_threshold:
                self._on_ready(True, details or result.text)
            elif not was_ready or failed >= probe.failure_threshold:
                self._on_ready(False, result.text)
            await asyncio.sleep((probe if was_ready else current).period_seconds)

    async def _watch_liveness(self, probe: Probe, process: Process, port: int) -> None:
        await asyncio.sleep(probe.initial_delay_seconds)
        failures = 0
        while failures < probe.failure_threshold:
            await asyncio.sleep(probe.period_seconds)
            result = await run_probe(probe, port)
            failures = 0 if result.passed else failures + 1
        self._kill(process, f"liveness probe failed {failures} times: {result.text}")

    async def _watch_memory(self, limit: int, process: Process) -> None:
        while (seen := memory_bytes(process.pid)) <= limit:
            await asyncio.sleep(_MEMORY_CHECK_SECONDS)
        self._kill(
            process, f"OOMKilled: {seen / 2**20:.0f} MiB in use, {limit / 2**20:.0f} MiB allowed by resources.limits.memory"
        )

    def _kill(self, process: Process, reason: str) -> None:
        self._killed_because = reason
        kill_group(process.pid)


def last_line(log: Path) -> str:
    """The last line of a log that is not blank, "" if there is none. Only the last 4 KiB are read."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - 4096))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.strip() for line in reversed(lines) if line.strip()), "")
