"""Faults of the pipeline itself: killed stages and gateways, stages that accept connections and never answer, a store that is
away.

Kills meet every stage in the first third, the first stage in the second, and the last stage in the last third; of the gateways
only the first after the first third. So every process lives long enough to show whether it grows.
"""

import asyncio
import os
import random
import secrets
import signal
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from bench.records import Recorder
from bench.soak.records import STORE, Fault, Plan, is_gateway, named_pods
from knative.local.platform import Platform
from storage.store.embedded import EmbeddedStore

_LOOK_SECONDS = 0.1
_MOST_STRETCHED = 3
_REPLACED_SECONDS = 120.0  # after that a killed gateway counts as replaced: health and answers tell


class ReturningStore:
    """The embedded store, which can close and come back at the same address."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._keys = (secrets.token_hex(10), secrets.token_hex(20))
        self._store = EmbeddedStore(folder, keys=self._keys)
        self.settings = self._store.settings

    def close(self) -> None:
        self._store.close()

    def come_back(self) -> None:
        """Raises StoreUnreachable."""
        port = urlsplit(self.settings.endpoint_url).port or 0
        self._store = EmbeddedStore(self._folder, port=port, keys=self._keys)


@dataclass
class Faults:
    platform: Platform
    store: ReturningStore
    plan: Plan
    recorder: Recorder
    kill_seconds: float  # between two kills of stages
    gateway_kill_seconds: float
    _hanging: str | None = None
    _dice: random.Random = field(default_factory=lambda: random.Random(6))

    async def run(self) -> None:
        """Runs until the plan is over. Stopped processes go on and the store comes back in any case."""
        async with asyncio.TaskGroup() as faults:
            faults.create_task(self._kill_stages())
            faults.create_task(self._kill_gateways())
            faults.create_task(self._hang())
            faults.create_task(self._send_store_away())

    @property
    def _stages(self) -> list[str]:
        return [service for service in self.plan.services if not is_gateway(service)]

    def _ready_pid(self, service: str) -> int | None:
        """The process of a pod that is ready; None: it is not."""
        pod = named_pods(self.platform.status(), self.plan.services).get(service)
        return pod["pid"] if pod is not None and pod["phase"] == "ready" else None

    async def _kill_stages(self) -> None:
        over = self.recorder.now + self.plan.seconds
        while over - self.recorder.now > self.kill_seconds:
            await self._rest()
            left = over - self.recorder.now
            victims = victims_at(1 - left / self.plan.seconds, self._stages)
            service = self._dice.choice(victims)
            pid = self._ready_pid(service)
            if service == self._hanging or pid is None:
                continue
            with suppress(ProcessLookupError):  # it has just been killed otherwise
                os.kill(pid, signal.SIGKILL)
                self.recorder.write(Fault(self.recorder.now, "kill", service, self.recorder.now))

    async def _kill_gateways(self) -> None:
        """Waits until the killed gateway is replaced: so another one always serves."""
        gateways = [service for service in self.plan.services if is_gateway(service)]
        began = self.recorder.now
        while self.recorder.now + self.gateway_kill_seconds < began + self.plan.seconds:
            await asyncio.sleep(self.gateway_kill_seconds)
            early = self.recorder.now < began + self.plan.seconds / 3
            service = self._dice.choice(gateways) if early else gateways[0]
            if (pid := self._ready_pid(service)) is None:
                continue
            killed = self.recorder.now
            try:
                os.kill(pid, signal.SIGKILL)
                await asyncio.sleep(_LOOK_SECONDS)
                while self._ready_pid(service) in (None, pid) and self.recorder.now - killed < _REPLACED_SECONDS:
                    await asyncio.sleep(_LOOK_SECONDS)
            finally:
                self.recorder.write(Fault(killed, "kill", service, self.recorder.now))

    async def _rest(self) -> None:
        """Waits until a client has been answered since the last kill, up to three times `kill_seconds`.

        Otherwise a soak would test the speed of the machine, and not the pipeline.
        """
        began, before = self.recorder.now, answers(self.plan.records)
        await asyncio.sleep(self.kill_seconds)
        while self.recorder.now - began < _MOST_STRETCHED * self.kill_seconds and answers(self.plan.records) == before:
            await asyncio.sleep(_LOOK_SECONDS)

    async def _hang(self) -> None:
        """Stops each stage in turn, twice."""
        every = self.plan.seconds / (2 * len(self._stages))
        for service in (*self._stages, *self._stages):
            await asyncio.sleep(every / 2)
            until = self.recorder.now + every / 4
            while (pid := self._ready_pid(service)) is None and self.recorder.now < until:
                await asyncio.sleep(_LOOK_SECONDS)
            if pid is not None:
                await self._stop(pid, service, every / 4)
            await asyncio.sleep(every / 4)

    async def _stop(self, pid: int, service: str, seconds: float) -> None:
        began = self.recorder.now
        try:
            os.kill(pid, signal.SIGSTOP)
        except ProcessLookupError:  # it was killed meanwhile
            return
        self._hanging = service
        try:
            await asyncio.sleep(min(30.0, seconds))
        finally:
            if named_pods(self.platform.status(), self.plan.services)[service]["pid"] == pid:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)
            self._hanging = None
            self.recorder.write(Fault(began, "hang", service, self.recorder.now))

    async def _send_store_away(self) -> None:
        """Stops the store three times."""
        every = self.plan.seconds / 4
        for _ in range(3):
            away = min(30.0, every / 3)
            await asyncio.sleep(every - away)
            began = self.recorder.now
            await asyncio.to_thread(self.store.close)
            try:
                await asyncio.sleep(away)
            finally:
                await asyncio.to_thread(self.store.come_back)
                self.recorder.write(Fault(began, "away", STORE, self.recorder.now))


def answers(records: str) -> int:
    """The number of answers so far, which another process records."""
    return Path(records).read_bytes().count(b'"kind":"answer"')


def victims_at(share: float, stages: list[str]) -> list[str]:
    """share: the elapsed part of the run."""
    if share < 1 / 3:
        return stages
    return [stages[0]] if share < 2 / 3 else [stages[-1]]
