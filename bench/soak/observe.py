"""Records the processes' resources during a soak, and their gauges while they rest."""

import asyncio
import contextlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

from bench.records import Recorder
from bench.soak.judge import has_returned
from bench.soak.records import FREE, Ended, Plan, Resources, Rest, Usage, is_gateway, named_pods
from knative.commands.local_pods import read_metrics
from knative.local.kubelet.processes import memory_bytes
from knative.local.platform import Platform

_EVERY_SECONDS: Final = 1.0
SETTLE_SECONDS: Final = 150.0  # for all services to come to rest after the last request
_REST_SECONDS: Final = 40.0  # idle threads and connections end meanwhile, and a gateway returns its free memory
KV_RESIDENT: Final = "lamina_stage_kv_resident_bytes"
GAUGES: Final[Mapping[str, tuple[str, ...]]] = {
    "gateway": ("lamina_gateway_running_sequences", "lamina_gateway_waiting_sequences"),
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
            pods = self._pods()
            await asyncio.gather(*(self._gauges_of(service, pod) for service, pod in pods.items() if not is_gateway(service)))
            for service, pod in pods.items():
                self._look(service, pod)
            await asyncio.sleep(_EVERY_SECONDS)

    def _pods(self) -> dict[str, Mapping[str, Any]]:
        return named_pods(self.platform.status(), self.plan.services)

    def _look(self, service: str, pod: Mapping[str, Any]) -> None:
        if pod["restarts"] > self._restarts.get(pod["name"], 0):
            self._restarts[pod["name"]] = pod["restarts"]
            self.recorder.write(Ended(self.recorder.now, service, pod["last_end"]))
        if (uses := self._uses(pod)) is not None:
            self.recorder.write(Usage(self.recorder.now, service, pod["pid"], uses))

    def _uses(self, pod: Mapping[str, Any]) -> Resources | None:
        return None if pod["pid"] is None else read_resources(pod["pid"], self._kv_bytes.get(pod["pid"], 0))

    async def rest(self, moment: Literal["before", "after"], before: Sequence[Rest] = ()) -> list[Rest]:
        """Records the processes as soon as they have rested for some seconds, or after SETTLE_SECONDS.

        They rest if nothing is held and, given how they rested before, each uses no more than then (`has_returned`).
        """
        until = self.recorder.now + SETTLE_SECONDS
        rested = 0.0  # since when
        while True:
            found = [
                Rest(self.recorder.now, moment, service, await self._gauges_of(service, pod), self._uses(pod))
                for service, pod in self._pods().items()
            ]
            now = self.recorder.now
            rested = (rested or now) if self._rests(found, before) else 0.0
            if (rested and now - rested >= _REST_SECONDS) or now >= until:
                break
            await asyncio.sleep(_EVERY_SECONDS)
        for each in found:
            self.recorder.write(each)
        return found

    def _rests(self, found: Sequence[Rest], before: Sequence[Rest]) -> bool:
        if {each.service for each in found if each.gauges} != set(self.plan.services):
            return False
        if any(value for each in found for name, value in each.gauges.items() if name != FREE):
            return False
        now = {each.service: each for each in found}
        return all(
            then.gauges == now[then.service].gauges and has_returned(then.uses, now[then.service].uses) for then in before
        )

    async def _gauges_of(self, service: str, pod: Mapping[str, Any]) -> dict[str, float]:
        """Empty: it does not answer. A stage that is busy or hangs keeps its last figure of KV: it uses no more meanwhile."""
        samples = await asyncio.to_thread(read_metrics, pod)
        if not samples:
            return {}
        self._kv_bytes[pod["pid"]] = int(samples[KV_RESIDENT])  # 0 for a gateway
        return {name: samples[name] for name in GAUGES["gateway" if is_gateway(service) else "stage"]}


def read_resources(pid: int, kv_bytes: int = 0) -> Resources | None:
    """None: the process has ended, and may not be reaped yet."""
    with contextlib.suppress(OSError, KeyError):
        lines = (line.partition(":") for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        status = {name: value.split() for name, _, value in lines}
        descriptors, resident = len(os.listdir(f"/proc/{pid}/fd")), memory_bytes(pid)
        if resident:
            return Resources(int(status["Threads"][0]), descriptors, int(status["VmHWM"][0]) * 1024, resident, kv_bytes)
    return None
