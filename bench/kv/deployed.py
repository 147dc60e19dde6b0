"""A pipeline on the local platform whose pods `bench.kv` starts and stops, with two gateways before the same stages.

The gateway `plain` has LAMINA_PREFIX_SHARING=off: it neither uses nor fills the prefix cache.
"""

import asyncio
import copy
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from tokenizers import Tokenizer

from bench.kv.client import Server
from bench.pipeline import ALWAYS_ONE, NUM_STAGES, local_spec, running_platform
from functions.stage.engine.threads import usable_cores
from knative.commands.local_pipeline import Sharing, ensure_published, local_pipeline
from knative.commands.local_pods import read_metrics
from knative.local.kubelet.pods import LocalPod, PodTiming
from knative.local.platform import Platform, PlatformOptions
from knative.local.serving.revisions import Revision
from knative.render.resolved_pipeline import ResolvedPipeline
from knative.render.services import services
from knative.spec.pipeline_spec import KV_PREFIX, PipelineSpec
from knative.webhook.autoscaling_annotations import AutoscalerConfig
from storage.kv.kv_store import Retention, prune
from storage.models.model_repository import read_file
from storage.store.embedded import EmbeddedStore
from storage.store.object_store import ObjectStore
from storage.store.payload_store import PayloadStore

HOLDING: Final = "bench"
PLAIN: Final = "bench-plain"
TIMING: Final = PodTiming(drain_quiet_seconds=5.0)  # not Knative's 30 s: runs of the benchmark wait for drains
_FROM_ZERO: Final = AutoscalerConfig(allow_zero_initial_scale=True, initial_scale=0, scale_to_zero_grace_period_seconds=0.5)
_KV_CACHE: Final = "640Mi"
_WAIT_SECONDS: Final = 120.0


@dataclass(frozen=True, slots=True)
class Deployed:
    platform: Platform
    pipeline: ResolvedPipeline
    tokenizer: Tokenizer
    drains: list[asyncio.Task[None]] = field(default_factory=list)

    @property
    def holding(self) -> Server:
        return self._server(HOLDING)

    @property
    def plain(self) -> Server:
        return self._server(PLAIN)

    @property
    def stages(self) -> list[Revision]:
        return [self._revision(self.pipeline.stage_name(index)) for index in range(NUM_STAGES)]

    async def another_pod(self, stage: Revision) -> LocalPod:
        """Starts a second pod and waits until it is ready."""
        _scale(stage, 2)
        await until(lambda: len(stage.ready_pods) == 2, f"a second pod of {stage.name.service}")
        return stage.ready_pods[-1]

    def scale_in(self, stage: Revision) -> None:
        """The oldest pod drains like an evicted one; the others stay."""
        oldest = stage.ready_pods[0]
        _scale(stage, len(stage.ready_pods) - 1)
        self.drains.append(asyncio.create_task(oldest.leave()))

    async def to_zero(self, *, gateways: bool) -> None:
        """Scales all stages to zero; returns when no process is left and their keys and values are stored."""
        gone = self.stages + ([self._revision(name) for name in (HOLDING, PLAIN)] if gateways else [])
        for revision in gone:
            _scale(revision, 0)
        await until(lambda: not any(revision.pods for revision in gone), "nothing left of the stages")

    async def stay_up(self) -> None:
        """Keeps one pod of each service from now on."""
        revisions = [*self.stages, *(self._revision(name) for name in (HOLDING, PLAIN))]
        for revision in revisions:
            _scale(revision, 1)
        await until(lambda: all(revision.ready_pods for revision in revisions), "a pod of each")

    def _server(self, name: str) -> Server:
        return Server(self.platform.url(name, self.pipeline.spec.namespace), self.pipeline.spec.model.name, {})

    def _revision(self, name: str) -> Revision:
        return self.platform.services[self.pipeline.spec.namespace, name].revisions[-1]


def _scale(revision: Revision, pods: int) -> None:
    """0: scales to zero without requests, and to one with them."""
    settings = revision.autoscaler.settings
    revision.autoscaler.settings = replace(settings, min_scale=pods, max_scale=max(1, pods))


async def tokens_computed(pod: LocalPod) -> int:
    """Tokens that a pod has computed."""
    samples = await asyncio.to_thread(read_metrics, {"metrics_port": pod.metrics_port})
    return int(samples["lamina_stage_tokens_total"])


async def until(what: Callable[[], bool], name: str) -> None:
    """Raises TimeoutError, which names the condition."""
    deadline = time.monotonic() + _WAIT_SECONDS
    while not what():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{name} did not come within {_WAIT_SECONDS:g} s; the logs of the pods say more")
        await asyncio.sleep(0.02)


@asynccontextmanager
async def deployed(dtype: str, state: Path) -> AsyncIterator[Deployed]:
    """Starts everything, without keys and values of an earlier run."""
    logs = state / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    with EmbeddedStore(state / "store") as embedded:
        with PayloadStore(embedded.settings) as objects:
            prune(objects, KV_PREFIX, Retention(0, timedelta(0)), datetime.now(UTC))
        store = ObjectStore(embedded.settings)
        manifest = ensure_published(store, None, dtype, Console(quiet=True))
        local = local_pipeline(store, manifest, NUM_STAGES, _spec(manifest.name, dtype), {})
        tokenizer = Tokenizer.from_str(read_file(store, manifest, "tokenizer.json").decode())
        options = PlatformOptions(secrets=local.secrets, logs=logs, timing=TIMING, autoscaler=_FROM_ZERO)
        async with running_platform(options, _with_a_plain_gateway(services(local.pipeline))) as platform:
            running = Deployed(platform, local.pipeline, tokenizer)
            await running.stay_up()
            yield running


def _with_a_plain_gateway(manifests: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    (gateway,) = (each for each in manifests if each["metadata"]["name"] == HOLDING)
    plain = copy.deepcopy(gateway)
    plain["metadata"]["name"] = PLAIN
    for variable in plain["spec"]["template"]["spec"]["containers"][0]["env"]:
        if variable["name"] == "LAMINA_PREFIX_SHARING":
            variable["value"] = "off"
    return [*manifests, plain]


def _spec(model: str, dtype: str) -> PipelineSpec:
    cores = usable_cores()
    sharing = Sharing(cores, NUM_STAGES)
    quick = {"window_seconds": 6, "scale_down_delay_seconds": 0, **ALWAYS_ONE}
    return local_spec(
        HOLDING,
        model={"name": model, "dtype": dtype},
        stages=NUM_STAGES,
        stage={
            "resources": {"cpu": str(cores), "memory": "3Gi"},
            "busy_threads": sharing.busy_threads,
            "kv_cache": _KV_CACHE,
            "autoscaling": quick,
        },
        gateway={
            "micro_batch_sequences": sharing.micro_batch_sequences,
            "draft_tokens": 0,
            "prefix_sharing": "pipeline",
            "stages_at_once": sharing.stages_at_once,
            "autoscaling": {"target": 100, **quick},
        },
        kv_store={"secret": "bench-kv"},
    )
