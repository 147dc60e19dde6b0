"""A pipeline on the local platform with everything at zero, pods forked, and each stage's store behind a proxy of its own."""

import asyncio
import threading
from collections.abc import AsyncIterator, Coroutine, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, TypeVar

from knative.commands.sources.local_pipeline import LocalPipeline, local_pipeline
from knative.local.kubelet.fork_starter import ForkStarter
from knative.local.platform import ROOT, Platform, PlatformOptions
from knative.render.services import services
from storage.store.object_store import ObjectStore
from tests.support.storage.published import CUT, Published

T = TypeVar("T")


class WarmParent:
    """An event loop in a thread, with one fork server for all tests of a module."""

    def __init__(self, loop: asyncio.AbstractEventLoop, starter: ForkStarter) -> None:
        self._loop = loop
        self.starter = starter

    def run(self, work: Coroutine[Any, Any, T], timeout_seconds: float) -> T:
        future = asyncio.run_coroutine_threadsafe(asyncio.wait_for(work, timeout_seconds), self._loop)
        return future.result()


@contextmanager
def warm_parent(folder: Path) -> Iterator[WarmParent]:
    ready, stop = threading.Event(), asyncio.Event()
    parents: list[WarmParent] = []

    async def live() -> None:
        async with ForkStarter(ROOT, folder / "fork-server.log") as starter:
            parents.append(WarmParent(asyncio.get_running_loop(), starter))
            ready.set()
            await stop.wait()

    thread = threading.Thread(target=asyncio.run, args=(live(),))
    thread.start()
    ready.wait()
    try:
        yield parents[0]
    finally:
        parents[0]._loop.call_soon_threadsafe(stop.set)
        thread.join()


@asynccontextmanager
async def cold_pipeline(
    published: Published,
    folder: Path,
    starter: ForkStarter,
    endpoints: Mapping[int, str],
    weights_cache: Path | None = None,
) -> AsyncIterator[tuple[Platform, LocalPipeline]]:
    """Three stages. endpoints: stage → URL of its store, where it is not the published one."""
    local = local_pipeline(ObjectStore(published.store), published.manifest, len(CUT), None, {}, weights_cache)
    manifests = services(local.pipeline)
    for index, endpoint in endpoints.items():
        set_environment(manifests[index], {"LAMINA_STORE_ENDPOINT": endpoint})
    platform = Platform(PlatformOptions(logs=folder, secrets=local.secrets, starter=starter))
    await platform.start()
    try:
        await platform.apply(manifests)
        yield platform, local
    finally:
        await platform.stop(1.0)


def set_environment(manifest: dict[str, Any], environ: Mapping[str, str]) -> None:
    (container,) = manifest["spec"]["template"]["spec"]["containers"]
    kept = [entry for entry in container["env"] if entry["name"] not in environ]
    container["env"] = kept + [{"name": name, "value": value} for name, value in environ.items()]


def pods_of(platform: Platform, name: str) -> list[dict[str, Any]]:
    """As `status` tells them."""
    (service,) = (each for each in platform.status()["services"] if each["name"] == name)
    return [pod for revision in service["revisions"] for pod in revision["pods"]]
