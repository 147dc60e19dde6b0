"""Cold starts on the local platform: the first token of a pipeline that has no running pod."""

import contextlib
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from bench.network import relayed
from knative.commands.ask import Question, stream_answer
from knative.commands.local_pipeline import local_pipeline
from knative.local.platform import Platform, PlatformOptions, running_platform
from knative.local.proxies.network import EmulatedNetwork
from knative.render.services import services
from storage.loading.weight_loader import stage_objects
from storage.models.model_repository import ModelManifest
from storage.store.object_store import ObjectStore

PROMPT: Final = "What is the capital of France?"


@dataclass(frozen=True, slots=True)
class Store:
    """What all runs share: the store, the published model, and a folder for logs."""

    objects: ObjectStore
    manifest: ModelManifest
    logs: Path


@dataclass(frozen=True, slots=True)
class ColdStart:
    """One request to a pipeline without a pod."""

    first_token_seconds: float  # from the client's request
    token: str
    phases: tuple[Mapping[str, float], ...]  # of each stage: phase → its end after the process's start
    largest_bytes: int  # weights of the largest stage

    @property
    def load_seconds(self) -> float:
        """Longest load phase of a stage: from the store's first answer to the last byte."""
        return max(phases["last_byte"] - phases["connect"] for phases in self.phases)


async def cold_pipeline(
    at: Store, stages: int, *, bytes_per_second: float | None = None, weights_cache: Path | None = None
) -> ColdStart:
    """bytes_per_second: of each pod, the gateway's included; None: no limit."""
    local = local_pipeline(at.objects, at.manifest, stages, None, {}, weights_cache)
    manifests = services(local.pipeline)
    with _endpoints(at.objects, bytes_per_second, len(manifests)) as endpoints:
        for manifest, endpoint in zip(manifests, endpoints, strict=True):
            _set_environment(manifest, "LAMINA_STORE_ENDPOINT", endpoint)
        options = PlatformOptions(logs=at.logs, secrets=local.secrets)
        async with running_platform(options, manifests) as platform:
            url = platform.url(local.pipeline.spec.name, local.pipeline.spec.namespace)
            began = time.perf_counter()
            token = await _first_token(url)
            seconds = time.perf_counter() - began
            phases = tuple(_phases(platform, local.pipeline.stage_name(index)) for index in range(stages))
    objects = at.manifest.objects
    largest = max(sum(objects[name].bytes for name in stage_objects(at.manifest, *layers)) for layers in local.pipeline.cut)
    return ColdStart(seconds, token, phases, largest)


async def _first_token(url: str) -> str:
    async for answer in stream_answer(url, Question(PROMPT, max_tokens=1)):
        return answer.text
    raise RuntimeError(f"{url} ended its answer without a token")


def _phases(platform: Platform, name: str) -> Mapping[str, float]:
    (service,) = (each for each in platform.status()["services"] if each["name"] == name)
    pods = [pod for revision in service["revisions"] for pod in revision["pods"]]
    if len(pods) != 1 or pods[0]["restarts"]:
        raise RuntimeError(f"{name} has {len(pods)} pods, {pods}: one that started once was expected")
    phases: Mapping[str, float] = pods[0]["readiness"]["start_up"]
    return phases


def _set_environment(manifest: dict[str, Any], name: str, value: str) -> None:
    (container,) = manifest["spec"]["template"]["spec"]["containers"]
    (entry,) = (each for each in container["env"] if each["name"] == name)
    entry["value"] = value


@contextlib.contextmanager
def _endpoints(store: ObjectStore, bytes_per_second: float | None, count: int) -> Iterator[list[str]]:
    """URLs of the store, one for each pod; with a limit each has a link of its own."""
    urls = [store.settings.endpoint_url] * count
    if bytes_per_second is None:
        yield urls
        return
    with relayed(urls, EmulatedNetwork(bytes_per_second=bytes_per_second)) as limited:
        yield limited
