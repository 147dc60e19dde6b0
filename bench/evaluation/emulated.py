"""One way under one trace, as it is: all is real but the devices, whose passes and weights are waited for."""

import asyncio
import contextlib
import sys
import urllib.error
import urllib.request
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Final

import numpy as np
from prometheus_client.parser import text_string_to_metric_families

from bench.evaluation.outcome import Cost, Objective, Outcome, outcome_of
from bench.evaluation.publication import publish_emulated
from bench.evaluation.replay import BEGUN
from bench.evaluation.setting import Setting
from bench.evaluation.trace import Floats, Trace
from knative.commands.local_pipeline import LocalPipeline, local_pipeline
from knative.local.kubelet.pods import LocalPod
from knative.local.platform import ROOT, Platform, PlatformOptions
from knative.render.services import services
from storage.store.object_store import ObjectStore

_LOOK_SECONDS: Final = 0.5
_READY_SECONDS: Final = 180.0
_STOP_SECONDS: Final = 5.0
_PAGE_SECONDS: Final = 1.0


class NotReady(RuntimeError):
    """Pods that a way keeps awake did not come up. The logs say why."""


class EmulatedRun:
    """`run` once."""

    def __init__(self, setting: Setting, way: str, trace: Trace, store: ObjectStore, folder: Path, tail_seconds: float) -> None:
        """folder: for logs and what is handed to the process that asks. tail_seconds: how long pods count behind the end."""
        folder.mkdir(parents=True, exist_ok=True)
        self._setting, self._way, self._folder = setting, way, folder
        self._trace = trace.within(setting.context_tokens)
        manifest = publish_emulated(store, setting)
        cut = setting.cut(way)
        self._local: LocalPipeline = local_pipeline(store, manifest, len(cut), setting.spec(way), {})
        self._plans = setting.plans(way)
        self.passes: list[tuple[float, float]] = []
        """Of each stage at the end: seconds in passes and their number."""
        self._tail_seconds = tail_seconds
        self._busy: dict[int, float] = {}
        """Of each process: seconds in passes."""
        self._seen: set[str] = set()
        self._cold_starts = 0
        self._replica_seconds = [0.0] * len(cut)

    async def run(self, objective: Objective | None = None) -> Outcome:
        """Raises NotReady."""
        options = PlatformOptions(secrets=self._local.secrets, logs=self._folder, cpu=self._busy.get)
        platform = Platform(options)
        await platform.start()
        try:
            await platform.apply(services(self._local.pipeline))
            await self._all_awake(platform)
            self._seen = {pod.name for pods in self._pods(platform) for pod in pods}
            seconds = self._trace.seconds + self._tail_seconds
            async with self._asking(platform.url(self._local.pipeline.spec.name)) as asking:
                async with self._reading_busy(platform):
                    await self._count(platform, seconds)
                self.passes = [await asyncio.to_thread(passes_of, pods) for pods in self._pods(platform)]
                first, last, prompts = await self._answered(asking)
        finally:
            await platform.stop(_STOP_SECONDS)
        tokens = prompts + int(self._trace.answer_tokens[np.isfinite(last)].sum())
        cost = Cost(
            replica_seconds=sum(self._replica_seconds),
            byte_seconds=sum(held * plan.weight_bytes for held, plan in zip(self._replica_seconds, self._plans, strict=True)),
            cold_starts=self._cold_starts,
            network_bytes=float(tokens * self._setting.network_bytes_per_token(self._way)),
        )
        return outcome_of(self._trace, first, last, seconds, cost, objective)

    def _pods(self, platform: Platform) -> Iterator[list[LocalPod]]:
        """Of each stage, those that cost something."""
        for name in self._local.pipeline.stage_names:
            service = platform.services[self._local.pipeline.spec.namespace, name]
            yield [pod for revision in service.revisions for pod in revision.pods]

    async def _all_awake(self, platform: Platform) -> None:
        """The gateway, and what the way keeps awake."""
        spec = self._local.pipeline.spec
        least = spec.stage.autoscaling.min_scale
        gateway = platform.services[spec.namespace, spec.name]
        try:
            async with asyncio.timeout(_READY_SECONDS):
                while not all(sum(pod.ready for pod in pods) >= least for pods in self._pods(platform)) or not any(
                    revision.ready_pods for revision in gateway.revisions
                ):
                    await asyncio.sleep(0.1)
        except TimeoutError as error:
            raise NotReady(f"{self._way}: not awake in {_READY_SECONDS:g} s; {self._folder} says why") from error

    async def _count(self, platform: Platform, seconds: float) -> None:
        """What pods cost, for so long from now."""
        loop = asyncio.get_running_loop()
        before = loop.time()
        end = before + seconds
        while before < end:
            await asyncio.sleep(min(_LOOK_SECONDS, end - before))
            now = loop.time()
            for index, pods in enumerate(self._pods(platform)):
                self._replica_seconds[index] += len(pods) * (now - before)
                self._cold_starts += len({pod.name for pod in pods} - self._seen)
                self._seen |= {pod.name for pod in pods}
            before = now

    @contextlib.asynccontextmanager
    async def _reading_busy(self, platform: Platform) -> AsyncIterator[None]:
        task = asyncio.create_task(self._read_busy(platform))
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _read_busy(self, platform: Platform) -> None:
        """Where the class is HPA: its metric is how busy a device is, which the system cannot tell of one that is emulated."""
        if self._local.pipeline.spec.stage.autoscaling.autoscaler_class != "hpa":
            return
        while True:
            await asyncio.sleep(_PAGE_SECONDS)
            for pod in (pod for pods in self._pods(platform) for pod in pods):
                if pod.ready and pod.pid is not None and pod.metrics_port:
                    self._busy[pod.pid], _ = await asyncio.to_thread(passes_of, [pod])

    @contextlib.asynccontextmanager
    async def _asking(self, url: str) -> AsyncIterator[Process]:
        """The process that asks, from the moment when the trace begins."""
        trace_file = self._folder / "trace.npz"
        trace = self._trace
        np.savez(
            trace_file,
            arrival_seconds=trace.arrival_seconds,
            prompt_tokens=trace.prompt_tokens,
            answer_tokens=trace.answer_tokens,
        )
        command = ["-m", "bench.evaluation.replay", url, str(trace_file), str(self._times_file), str(self._tail_seconds)]
        process = await asyncio.create_subprocess_exec(sys.executable, *command, cwd=ROOT, stdout=PIPE)
        try:
            assert process.stdout is not None
            if (await process.stdout.readline()).decode().strip() != BEGUN:
                raise RuntimeError(f"the process that asks ended with status {await process.wait()}")
            yield process
        finally:
            if process.returncode is None:
                process.terminate()
                await process.wait()

    async def _answered(self, asking: Process) -> tuple[Floats, Floats, int]:
        if await asking.wait():
            raise RuntimeError(f"the process that asks ended with status {asking.returncode}")
        times = np.load(self._times_file)
        return times["first"], times["last"], int(times["prompts"])

    @property
    def _times_file(self) -> Path:
        return self._folder / "times.npz"


def passes_of(pods: Sequence[LocalPod]) -> tuple[float, float]:
    """Seconds in passes and their number, of all these; a pod that does not answer counts nothing."""
    found = {"_sum": 0.0, "_count": 0.0}
    for pod in pods:
        for family in text_string_to_metric_families(_page(pod.metrics_port) if pod.metrics_port else ""):
            for sample in family.samples:
                if (kind := sample.name.removeprefix("lamina_stage_compute_seconds")) in found:
                    found[kind] += sample.value
    return found["_sum"], found["_count"]


def _page(metrics_port: int) -> str:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{metrics_port}/metrics", timeout=_PAGE_SECONDS) as reply:
            return str(reply.read().decode())
    except (OSError, urllib.error.URLError):
        return ""
