"""Emulated runs: one way under one trace on the real system, whose stages sleep for passes and weights instead of computing."""

import asyncio
import contextlib
import hashlib
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from pathlib import Path
from typing import Final

import msgspec
import numpy as np
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console

from bench.evaluation.gateway import Hops
from bench.evaluation.outcome import Cost, Outcome, outcome_of
from bench.evaluation.replay import ARRAYS, BEGUN
from bench.evaluation.setting import STATIC, Setting
from bench.evaluation.simulator import Overheads, Simulation, World
from bench.evaluation.trace import Trace
from bench.pipeline import read_page
from knative.commands.local_pipeline import LocalPipeline, ensure_published, local_pipeline
from knative.local.kubelet.pods import LocalPod
from knative.local.platform import ROOT, Platform, PlatformOptions, running_platform
from knative.render.services import services
from storage.checkpoints.safetensors_format import ALIGNMENT, TensorSpan
from storage.models.model_repository import (
    PART_BYTES,
    ModelManifest,
    StoredFile,
    StoredObject,
    encode_manifest,
    manifest_key,
    object_names,
)
from storage.store.object_store import ObjectStore

_LOOK_SECONDS: Final = 0.5
_READY_SECONDS: Final = 180.0
_PAGE_SECONDS: Final = 1.0


Disturbance = Callable[[Callable[[], list[list[LocalPod]]]], Coroutine[None, None, None]]


class NotReady(RuntimeError):
    """Pods that a way always keeps did not start. The logs say why."""


class EmulatedRun:
    """One run: call `run` once."""

    def __init__(
        self,
        setting: Setting,
        way: str,
        trace: Trace,
        store: ObjectStore,
        folder: Path,
        tail_seconds: float,
        disturb: Disturbance | None = None,
    ) -> None:
        """folder: for logs and the files of the replaying process. tail_seconds: how long pods count after the last arrival.

        disturb: runs beside the trace, until it is cancelled; it gets a function that returns the pods of each stage.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self._setting, self._way, self._folder = setting, way, folder
        self._trace = trace.within(setting.context_tokens)
        manifest = publish_emulated(store, setting)
        cut = setting.cut(way)
        self._local: LocalPipeline = local_pipeline(store, manifest, len(cut), setting.spec(way), {})
        self._plans = setting.plans(way)
        self.passes: list[tuple[float, float]] = []  # per stage at the end: seconds in passes, and their number
        self._tail_seconds = tail_seconds
        self._disturb = disturb
        self.gaps = np.zeros(0)  # at the end: seconds from each token of an answer to its next
        self.errors = 0  # at the end: answers that ended with an error
        self._busy: dict[int, float] = {}  # process id → seconds in passes
        self._seen: set[str] = set()
        self._cold_starts = 0
        self._replica_seconds = [0.0] * len(cut)

    async def run(self) -> Outcome:
        """Raises NotReady."""
        options = PlatformOptions(secrets=self._local.secrets, logs=self._folder, cpu=self._busy.get)
        async with running_platform(options, services(self._local.pipeline)) as platform:
            await self._all_awake(platform)
            self._seen = {pod.name for pods in self._pods(platform) for pod in pods}
            seconds = self._trace.seconds + self._tail_seconds
            times_file = self._folder / "times.npz"
            async with self._asking(platform.url(self._local.pipeline.spec.name), times_file) as asking:
                beside = [asyncio.create_task(self._read_busy(platform))]
                if self._disturb is not None:
                    beside.append(asyncio.create_task(self._disturb(lambda: list(self._pods(platform)))))
                try:
                    await self._count(platform, seconds)
                finally:
                    for task in beside:
                        task.cancel()
                    await asyncio.gather(*beside, return_exceptions=True)
                self.passes = [await asyncio.to_thread(passes_of, pods) for pods in self._pods(platform)]
                if await asking.wait():
                    raise RuntimeError(f"the replaying process ended with status {asking.returncode}")
        times = np.load(times_file)
        first, last, prompts, self.gaps = times["first"], times["last"], int(times["prompts"]), times["gaps"]
        self.errors = int(times["errors"])
        tokens = prompts + int(self._trace.answer_tokens[np.isfinite(last)].sum())
        cost = Cost(
            replica_seconds=sum(self._replica_seconds),
            byte_seconds=sum(held * plan.weight_bytes for held, plan in zip(self._replica_seconds, self._plans, strict=True)),
            cold_starts=self._cold_starts,
            network_bytes=float(tokens * self._setting.network_bytes_per_token(self._way)),
        )
        return outcome_of(self._trace, first, last, seconds, cost, slowness=self._setting.slowness)

    def _pods(self, platform: Platform) -> Iterator[list[LocalPod]]:
        """The pods of each stage, in any state."""
        for name in self._local.pipeline.stage_names:
            service = platform.services[self._local.pipeline.spec.namespace, name]
            yield [pod for revision in service.revisions for pod in revision.pods]

    async def _all_awake(self, platform: Platform) -> None:
        """Waits for the gateway and for the pods that the way always keeps."""
        spec = self._local.pipeline.spec
        least = max(1, spec.stage.autoscaling.min_scale)  # the gateway wakes its stages when it starts
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
        """Counts replica-seconds and cold starts for `seconds`."""
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

    async def _read_busy(self, platform: Platform) -> None:
        """For the HPA class: its metric is the load of a device, which the system cannot see for an emulated one."""
        if self._local.pipeline.spec.stage.autoscaling.autoscaler_class != "hpa":
            return
        while True:
            await asyncio.sleep(_PAGE_SECONDS)
            for pod in (pod for pods in self._pods(platform) for pod in pods):
                if pod.ready and pod.pid is not None and pod.metrics_port:
                    self._busy[pod.pid], _ = await asyncio.to_thread(passes_of, [pod])

    @contextlib.asynccontextmanager
    async def _asking(self, url: str, times_file: Path) -> AsyncIterator[Process]:
        """The replaying process, from the beginning of the trace."""
        trace_file = self._folder / "trace.npz"
        np.savez(trace_file, **{name: getattr(self._trace, name) for name in ARRAYS})
        command = ["-m", "bench.evaluation.replay", url, str(trace_file), str(times_file), str(self._tail_seconds)]
        process = await asyncio.create_subprocess_exec(sys.executable, *command, cwd=ROOT, stdout=PIPE)
        try:
            assert process.stdout is not None
            if (await process.stdout.readline()).decode().strip() != BEGUN:
                raise RuntimeError(f"the replaying process ended with status {await process.wait()}")
            yield process
        finally:
            if process.returncode is None:
                process.terminate()
                await process.wait()


def passes_of(pods: Sequence[LocalPod]) -> tuple[float, float]:
    """Seconds in passes, and their number, of all these pods; a pod that does not answer counts nothing."""
    found = {"_sum": 0.0, "_count": 0.0}
    for pod in pods:
        with contextlib.suppress(OSError):
            page = read_page(f"http://127.0.0.1:{pod.metrics_port}", _PAGE_SECONDS) if pod.metrics_port else ""
            for family in text_string_to_metric_families(page):
                for sample in family.samples:
                    if (kind := sample.name.removeprefix("lamina_stage_compute_seconds")) in found:
                        found[kind] += sample.value
    return found["_sum"], found["_count"]


_PUBLICATION: Final = "emulated"
_CONFIG: Final = "config.json"


def publish_emulated(store: ObjectStore, setting: Setting) -> ModelManifest:
    """Publishes the model's shape and sizes with the default model's tokenizer, without weights. Raises a StorageError.

    The stages emulate their devices and read no objects; the sizes decide how long a pod takes to start.
    """
    base = ensure_published(store, None, setting.dtype, Console(quiet=True))
    config = msgspec.json.encode({**setting.config, "vocab_size": base.vocab_size})
    key = f"models/{setting.model}/{setting.dtype}/{_PUBLICATION}/{_CONFIG}"
    store.put(key, config)
    shape = setting.shape
    sizes = [shape.embedding_bytes, *shape.layer_bytes, shape.head_bytes]
    manifest = msgspec.structs.replace(
        base,
        name=setting.model,
        publication=_PUBLICATION,
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        context_length=setting.context_tokens,
        tied=False,
        objects={
            name: _object(f"models/{setting.model}/{name}", name, size)
            for name, size in zip(object_names(shape.num_layers), sizes, strict=True)
        },
        files={**base.files, _CONFIG: StoredFile(key, len(config), hashlib.sha256(config).hexdigest())},
    )
    store.put(manifest_key(setting.model, setting.dtype), encode_manifest(manifest))
    return manifest


def _object(key: str, name: str, size: int) -> StoredObject:
    size -= size % ALIGNMENT
    tensor = TensorSpan("U8", (size - ALIGNMENT,), ALIGNMENT, size)
    return StoredObject(key, size, PART_BYTES, ("0" * 64,) * -(-size // PART_BYTES), {name: tensor})


_REQUESTS: Final = 30
_A_SECOND: Final = 0.5
_PROMPT_TOKENS: Final = 1024
_ANSWER_TOKENS: Final = 64
_TAIL_SECONDS: Final = 25.0
_FIT_ROUNDS: Final = 16
_FIT_STEP: Final = 0.5  # part of an error that a round corrects


def measure_overheads(setting: Setting, store: ObjectStore, folder: Path) -> Overheads:
    """What an emulated run costs beyond its profile on this machine, measured from outside under a steady load.

    The load has prompts and answers at the same time, since hops of decode steps are slower while hidden states of prompts,
    megabytes each, pass through the same cores. The run is a static pipeline.
    """
    arrivals = 1.0 + np.arange(_REQUESTS) / _A_SECOND
    trace = Trace("steady", arrivals, np.full(_REQUESTS, _PROMPT_TOKENS), np.full(_REQUESTS, _ANSWER_TOKENS))
    run = EmulatedRun(setting, STATIC, trace, store, folder, _TAIL_SECONDS)
    outcome = asyncio.run(run.run())
    measured = [seconds / passes for seconds, passes in run.passes if passes]
    return fit_overheads(setting, STATIC, trace, outcome, float(np.mean(measured)))


def fit_overheads(setting: Setting, way: str, trace: Trace, outcome: Outcome, mean_pass_seconds: float) -> Overheads:
    """The overheads with which the simulation of a run has its mean pass and its medians of first token and token."""
    num_stages = len(setting.cut(way))
    tokens = _PROMPT_TOKENS + num_stages * setting.chunk_tokens(way)  # on the way to a first token
    overheads = Overheads()
    for _ in range(_FIT_ROUNDS):
        simulation = Simulation(setting, way, trace, World(overheads=overheads))
        said, _ = simulation.run()
        pods = [pod for fleet in simulation.fleets for pod in fleet.pods.values() if pod.passes]
        mean_pass = sum(pod.busy_seconds for pod in pods) / sum(pod.passes for pod in pods)
        token = outcome.token_seconds[0] - said.token_seconds[0]
        first = outcome.first_token_seconds[0] - said.first_token_seconds[0]
        hops = overheads.hops
        overheads = Overheads(
            pass_seconds=max(0.0, overheads.pass_seconds + mean_pass_seconds - mean_pass),
            hops=Hops(
                max(0.0, hops.hop_seconds + _FIT_STEP * token / num_stages),
                max(0.0, hops.hop_token_seconds + _FIT_STEP * first / tokens),
            ),
        )
    return overheads
