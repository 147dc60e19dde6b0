"""Records the processes' resources during a soak, and their gauges while they rest."""

import asyncio
import contextlib
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

from bench.records import Recorder
from bench.soak.records import FREE, GATEWAY, Ended, Plan, Rest, Usage
from knative.commands.local_pods import read_metrics
from knative.local.kubelet.processes import memory_bytes
from knative.local.platform import Platform

_EVERY_SECONDS: Final = 1.0
SETTLE_SECONDS: Final = 90.0  # for all services to come to rest after the last request
KV_RESIDENT: Final = "lamina_stage_kv_resident_bytes"
GAUGES: Final[Mapping[str, tuple[str, ...]]] = {
    GATEWAY: ("lamina_gateway_running_sequences", "lamina_gateway_waiting_sequences"),
    "stage": (FREE, "lamina_stage_sequences"),
}


@dataclass
class Observer:
    platform: Platform
    plan: Plan
    recorder: Recorder
    _restarts: dict[str, int] = field(default_factory=dict)
    _kv_bytes: dict[int | None, int] = field(default_factory=dict)  # by pid, as a stage reported last

    async def run(self) -> None:
        while True:
            pods = list(self._pods())
            await asyncio.gather(*(self._look_at_kv(pod) for service, pod in pods if service != GATEWAY))
            for service, pod in pods:
                self._look(service, pod)
            await asyncio.sleep(_EVERY_SECONDS)

    async def _look_at_kv(self, pod: Mapping[str, Any]) -> None:
        """A stage that is busy or hangs keeps its last figure: it uses no more meanwhile."""
        samples = await asyncio.to_thread(read_metrics, pod)
        if samples:
            self._kv_bytes[pod["pid"]] = int(samples[KV_RESIDENT])

    def _pods(self) -> Iterator[tuple[str, Any]]:
        """Services and pods of the platform's status."""
        names = {platform_name: name for name, platform_name in self.plan.services.items()}
        for service in self.platform.status()["services"]:
            for revision in service["revisions"]:
                yield from ((names[service["name"]], pod) for pod in revision["pods"])

    def _look(self, service: str, pod: Mapping[str, Any]) -> None:
        if pod["restarts"] > self._restarts.get(pod["name"], 0):
            self._restarts[pod["name"]] = pod["restarts"]
            self.recorder.write(Ended(self.recorder.now, service, pod["last_end"]))
        pid = pod["pid"]
        # A process that has ended and is not reaped yet has no memory.
        if pid is not None and (resident := memory_bytes(pid)) and (usage := read_usage(pid)) is not None:
            self.recorder.write(Usage(self.recorder.now, service, pid, *usage, resident, self._kv_bytes.get(pid, 0)))

    async def rest(
        self, moment: Literal["before", "after"], wanted: Mapping[str, dict[str, float]] | None = None
    ) -> dict[str, dict[str, float]]:
        """Records the gauges when they equal `wanted` (None: when nothing is held), or after SETTLE_SECONDS.

        Returns them by service.
        """
        until = self.recorder.now + SETTLE_SECONDS
        while not self._rests(seen := await self._gauges(), wanted) and self.recorder.now < until:
            await asyncio.sleep(_EVERY_SECONDS)
        for service, gauges in seen.items():
            self.recorder.write(Rest(self.recorder.now, moment, service, gauges))
        return seen

    def _rests(self, seen: dict[str, dict[str, float]], wanted: Mapping[str, dict[str, float]] | None) -> bool:
        if wanted is not None:
            return seen == wanted
        complete = len(seen) == len(self.plan.services) and all(seen.values())
        return complete and not any(value for gauges in seen.values() for name, value in gauges.items() if name != FREE)

    async def _gauges(self) -> dict[str, dict[str, float]]:
        found = {}
        for service, pod in self._pods():
            samples = await asyncio.to_thread(read_metrics, pod)
            names = GAUGES[service.partition(" ")[0]]
            found[service] = {name: samples[name] for name in names} if samples else {}
        return found


def read_usage(pid: int) -> tuple[int, int] | None:
    """(threads, open descriptors) of a process; None: it has ended."""
    with contextlib.suppress(OSError):
        found = re.search(r"^Threads:\s+(\d+)$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
        if found is not None:
            return int(found[1]), len(os.listdir(f"/proc/{pid}/fd"))
    return None
