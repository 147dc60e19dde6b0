"""The packaged model (SmolLM2-135M) in three stages on a local platform, in a thread of its own: for tests that are clients."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from rich.console import Console

from knative.commands.local_pipeline import LocalPipeline, ensure_published, local_pipeline
from knative.local.platform import Platform
from knative.render.services import services
from knative.spec.pipeline_spec import Autoscaling, GatewayAutoscaling, PipelineSpec
from storage.store.embedded import EmbeddedStore
from storage.store.object_store import ObjectStore
from tests.support.knative.platform import running_platform

STAGES = 3
T = TypeVar("T")


@dataclass(frozen=True)
class RealPipeline:
    url: str
    model: str
    api_key: str | None
    _platform: Platform
    _loop: asyncio.AbstractEventLoop

    def replicas(self) -> list[int]:
        """Ready ones of each stage."""

        def count() -> list[int]:
            stages = [service for (_, name), service in sorted(self._platform.services.items()) if name[:-1].endswith("-s")]
            return [sum(len(revision.ready_pods) for revision in service.revisions) for service in stages]

        return self._in_loop(count)

    def _in_loop(self, what: Callable[[], T]) -> T:
        async def run() -> T:
            return what()

        return asyncio.run_coroutine_threadsafe(run(), self._loop).result(20)


@contextmanager
def real_pipeline(folder: Path, *, with_key: bool = False, **gateway: Any) -> Iterator[RealPipeline]:
    """At zero, with a store of its own; stages fall asleep soon. gateway: more of the spec's gateway."""
    with EmbeddedStore(folder / "store") as embedded:
        store = ObjectStore(embedded.settings)
        manifest = ensure_published(store, None, None, Console(quiet=True))
        spec = _spec(local_pipeline(store, manifest, STAGES, None, {}).pipeline.spec, with_key, gateway)
        local = local_pipeline(store, manifest, STAGES, spec, {})
        with _in_a_thread(folder, local) as (platform, loop):
            yield RealPipeline(platform.url(spec.name), spec.model.name, local.api_key, platform, loop)


def _spec(spec: PipelineSpec, with_key: bool, gateway: dict[str, Any]) -> PipelineSpec:
    """Scales as a test has time for: over six seconds, at what a few conversations bring about, and down at once."""
    quick = {"window_seconds": 6, "scale_down_delay_seconds": 0}
    stage = msgspec.structs.replace(spec.stage, autoscaling=Autoscaling(target=0.4, max_scale=2, **quick))
    scaling = GatewayAutoscaling(max_scale=1, **quick)
    keys = "api-keys" if with_key else None
    gateway_spec = msgspec.structs.replace(spec.gateway, autoscaling=scaling, api_keys_secret=keys, **gateway)
    return msgspec.structs.replace(spec, stage=stage, gateway=gateway_spec)


@contextmanager
def _in_a_thread(folder: Path, local: LocalPipeline) -> Iterator[tuple[Platform, asyncio.AbstractEventLoop]]:
    started = threading.Event()
    box: dict[str, Any] = {}

    async def serve() -> None:
        stop = asyncio.Event()
        async with running_platform(folder, *services(local.pipeline), secrets=local.secrets) as platform:
            box.update(platform=platform, loop=asyncio.get_running_loop(), stop=stop)
            started.set()
            await stop.wait()

    thread = threading.Thread(target=lambda: asyncio.run(serve()), name="platform")
    thread.start()
    try:
        assert started.wait(60), "the platform did not start"
        yield box["platform"], box["loop"]
    finally:
        box["loop"].call_soon_threadsafe(box["stop"].set)
        thread.join(30)
