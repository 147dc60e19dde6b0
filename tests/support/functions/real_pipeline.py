"""The packaged model (SmolLM2-135M) on a local platform, in a thread of its own: for tests that are clients.

It is a pipeline of three stages, or a member of a fleet.
"""

import asyncio
import json
import os
import secrets
import threading
import urllib.request
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import psutil
import yaml
from click.testing import CliRunner
from rich.console import Console

from knative.cluster.objects import canary_config_map
from knative.commands.local_fleet import LocalFleet
from knative.commands.local_pipeline import ensure_published, local_pipeline
from knative.commands.model_choice import DEFAULT_MODEL
from knative.commands.state_folder import RunningPlatform, StateFolder
from knative.commands.status import status
from knative.local.kubelet.containers import NamedData
from knative.local.platform import Platform
from knative.render.services import services
from knative.spec.kubernetes_object import KubernetesObject
from knative.spec.pipeline_spec import Autoscaling, GatewayAutoscaling, PipelineSpec
from storage.models.publisher import publish
from storage.store.embedded import EmbeddedStore
from storage.store.object_store import ObjectStore
from tests.support.knative.platform import running_platform
from tests.support.storage.published import save_checkpoint

STAGES = 3
DEVICES = 2  # of the fleet
T = TypeVar("T")


@dataclass(frozen=True)
class RealPipeline:
    url: str
    model: str
    api_key: str | None
    store: ObjectStore
    _platform: Platform
    _loop: asyncio.AbstractEventLoop
    _folder: Path

    def replicas(self) -> list[int]:
        """Ready ones of each stage."""

        def count() -> list[int]:
            stages = [service for (_, name), service in sorted(self._platform.services.items()) if name[:-1].endswith("-s")]
            return [sum(len(revision.ready_pods) for revision in service.revisions) for service in stages]

        return self._in_loop(count)

    @contextmanager
    def applied(self, objects: Sequence[KubernetesObject]) -> Iterator[None]:
        """More objects meanwhile."""
        self._wait(self._platform.apply(objects))
        try:
            yield
        finally:
            self._wait(self._platform.delete(objects[::-1]))

    @contextmanager
    def paused_store(self) -> Iterator[None]:
        """The store answers nothing meanwhile, so a stage that starts waits for its weights."""
        folder = str((self._folder / "store").resolve())
        (process,) = [each for each in psutil.Process().children() if folder in each.cmdline()]
        process.suspend()
        try:
            yield
        finally:
            process.resume()

    def status(self) -> str:
        """What `python -m knative status` prints."""
        with StateFolder(self._folder / "state") as state:
            state.publish(RunningPlatform(os.getpid(), self._platform.admin_url, self.url))
            return CliRunner().invoke(status, ["--state", str(state.path)], catch_exceptions=False).stdout

    @contextmanager
    def asking(self, model: str) -> Iterator[None]:
        """Another client asks the model meanwhile. Its answer must be complete at the end."""
        body = {"model": model, "prompt": "hello", "max_tokens": 8}
        request = urllib.request.Request(
            f"{self.url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with ThreadPoolExecutor(1) as executor:
            asked = executor.submit(urllib.request.urlopen, request, timeout=300)
            yield
            asked.result().close()

    def _in_loop(self, what: Callable[[], T]) -> T:
        async def run() -> T:
            return what()

        return self._wait(run())

    def _wait(self, what: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(what, self._loop).result(20)


@dataclass(frozen=True)
class RealFleet(RealPipeline):
    canary: Sequence[KubernetesObject]


@contextmanager
def real_pipeline(folder: Path, *, with_key: bool = False, **gateway: Any) -> Iterator[RealPipeline]:
    """At zero, with a store of its own, adapters and batches; stages fall asleep soon. gateway: more of the spec's gateway."""
    with EmbeddedStore(folder / "store") as embedded:
        store = ObjectStore(embedded.settings)
        manifest = ensure_published(store, None, None, Console(quiet=True))
        spec = _spec(local_pipeline(store, manifest, STAGES, None, {}).pipeline.spec, with_key, gateway)
        local = local_pipeline(store, manifest, STAGES, spec, {})
        with _in_a_thread(folder, services(local.pipeline), local.secrets) as (platform, loop):
            yield RealPipeline(platform.url(spec.name), spec.model.name, local.api_key, store, platform, loop, folder)


@contextmanager
def real_fleet(folder: Path, names: Sequence[str], canary_percent: int) -> Iterator[RealFleet]:
    """A fleet at zero, with two devices: the packaged model in one stage, and tiny models of these names in two each.

    A canary of the first tiny one, in one stage, is not applied yet.
    """
    with EmbeddedStore(folder / "store") as embedded:
        store = ObjectStore(embedded.settings)
        save_checkpoint(folder / "tiny")
        for name in names:
            publish(folder / "tiny", store, name, "float32")
        scaling = {"window_seconds": 6, "scale_down_delay_seconds": 0}
        kv_key = secrets.token_hex(32)

        def local_fleet(cuts: Mapping[str, str], named_secrets: NamedData) -> LocalFleet:
            members = [
                {
                    "name": name,
                    "model": {"name": name, "dtype": "float32"},  # slow, so that a long answer lasts
                    "cut": cut,
                    "stage": {"autoscaling": scaling, "kv_cache": "256Mi"},
                }
                for name, cut in cuts.items()
            ]
            fleet = {
                "kind": "Fleet", "name": "models", "image": "local", "store": {"endpoint": embedded.settings.endpoint_url},
                "max_devices": DEVICES, "gateway": {"autoscaling": {**scaling, "max_scale": 1}}, "members": members,
            }  # fmt: skip
            (folder / "fleet.yaml").write_text(yaml.safe_dump(fleet))
            return LocalFleet(folder / "fleet.yaml", store, named_secrets, folder / "weights", kv_key, Console(quiet=True))

        local = local_fleet({DEFAULT_MODEL: "0:30", **dict.fromkeys(names, "0:3,3:6")}, {})
        of_canary = local_fleet({names[0]: "0:6"}, local.secrets).objects
        canary = [each for each in of_canary if each["kind"] == "Service" and each["metadata"]["name"] != "models"]
        canary += [canary_config_map(each, canary_percent) for each in of_canary if each["kind"] == "ConfigMap"]
        with _in_a_thread(folder, local.objects, local.secrets) as (platform, loop):
            yield RealFleet(platform.url("models"), DEFAULT_MODEL, None, store, platform, loop, folder, canary)


def _spec(spec: PipelineSpec, with_key: bool, gateway: dict[str, Any]) -> PipelineSpec:
    """Scales as a test has time for: over six seconds, at what a few conversations bring about, and down at once."""
    quick = {"window_seconds": 6, "scale_down_delay_seconds": 0}
    stage = msgspec.structs.replace(spec.stage, autoscaling=Autoscaling(target=0.4, max_scale=2, **quick))
    scaling = GatewayAutoscaling(max_scale=1, **quick)
    keys = "api-keys" if with_key else None
    gateway_spec = msgspec.structs.replace(spec.gateway, autoscaling=scaling, api_keys_secret=keys, jobs="jobs", **gateway)
    return msgspec.structs.replace(spec, stage=stage, gateway=gateway_spec, adapters=4)


@contextmanager
def _in_a_thread(
    folder: Path, objects: list[KubernetesObject], named_secrets: NamedData
) -> Iterator[tuple[Platform, asyncio.AbstractEventLoop]]:
    started = threading.Event()
    box: dict[str, Any] = {}

    async def serve() -> None:
        stop = asyncio.Event()
        async with running_platform(folder, *objects, secrets=named_secrets) as platform:
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
