"""Faults of the pipeline itself: killed stages, stages that accept connections and never answer, a store that is away.

Kills meet every stage in the first third, the first stage in the second, and the last stage in the last third, so that every
process lives long enough to show whether it grows.
"""

import asyncio
import os
import random
import signal
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from bench.records import Recorder
from bench.soak.pipeline import ReturningStore
from bench.soak.records import GATEWAY, STORE, Fault, Plan
from knative.local.kubelet.pods import LocalPod
from knative.local.platform import Platform

_LOOK_SECONDS = 0.1
_MOST_STRETCHED = 3


@dataclass
class Faults:
    platform: Platform
    store: ReturningStore
    plan: Plan
    recorder: Recorder
    kill_seconds: float
    _hanging: str | None = None
    _dice: random.Random = field(default_factory=lambda: random.Random(6))

    async def run(self) -> None:
        """Runs until the plan is over. Stopped processes go on and the store comes back in any case."""
        async with asyncio.TaskGroup() as faults:
            faults.create_task(self._kill())
            faults.create_task(self._hang())
            faults.create_task(self._send_store_away())

    @property
    def _stages(self) -> list[str]:
        return [service for service in self.plan.services if service != GATEWAY]

    def _pod(self, service: str) -> LocalPod | None:
        """The ready pod; None: it has none."""
        found = self.platform.services["default", self.plan.services[service]].revisions[-1].ready_pods
        return found[0] if found else None

    async def _kill(self) -> None:
        over = self.recorder.now + self.plan.seconds
        while over - self.recorder.now > self.kill_seconds:
            await self._rest()
            left = over - self.recorder.now
            victims = victims_at(1 - left / self.plan.seconds, self._stages)
            service = self._dice.choice(victims)
            pod = self._pod(service)
            if service == self._hanging or pod is None or pod.pid is None:
                continue
            with suppress(ProcessLookupError):  # it has just been killed otherwise
                os.kill(pod.pid, signal.SIGKILL)
                self.recorder.write(Fault(self.recorder.now, "kill", service, self.recorder.now))

    async def _rest(self) -> None:
        """Waits until an honest client has been answered since the last kill, up to three times `kill_seconds`.

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
            if (pod := await self._wait_for(service, every / 4)) is not None:
                await self._stop(pod, service, every / 4)
            await asyncio.sleep(every / 4)

    async def _wait_for(self, service: str, seconds: float) -> LocalPod | None:
        until = self.recorder.now + seconds
        while (pod := self._pod(service)) is None and self.recorder.now < until:
            await asyncio.sleep(_LOOK_SECONDS)
        return pod

    async def _stop(self, pod: LocalPod, service: str, seconds: float) -> None:
        pid, began = pod.pid, self.recorder.now
        if pid is None:
            return
        try:
            os.kill(pid, signal.SIGSTOP)
        except ProcessLookupError:  # it was killed meanwhile
            return
        self._hanging = service
        try:
            await asyncio.sleep(min(30.0, seconds))
        finally:
            if pod.pid == pid:
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
            await asyncio.to_thread(self.store.leave)
            try:
                await asyncio.sleep(away)
            finally:
                await asyncio.to_thread(self.store.come_back)
                self.recorder.write(Fault(began, "away", STORE, self.recorder.now))


def answers(records: str) -> int:
    """The number of honest answers so far, which another process records."""
    return Path(records).read_bytes().count(b'"kind":"answer"')


def victims_at(share: float, stages: list[str]) -> list[str]:
    """share: the elapsed part of the run."""
    if share < 1 / 3:
        return stages
    return [stages[0]] if share < 2 / 3 else [stages[-1]]
