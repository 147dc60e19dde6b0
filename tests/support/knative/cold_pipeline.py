"""A pipeline on the local platform with everything at zero, and each stage's store behind a proxy of its own."""

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from knative.commands.local_pipeline import LocalPipeline, local_pipeline
from knative.local.platform import Platform, PlatformOptions, running_platform
from knative.render.services import services
from storage.store.object_store import ObjectStore
from tests.support.storage.published import CUT, Published


@asynccontextmanager
async def cold_pipeline(
    published: Published,
    folder: Path,
    endpoints: Mapping[int, str],
    weights_cache: Path | None = None,
    gateway: Mapping[str, str] | None = None,
) -> AsyncIterator[tuple[Platform, LocalPipeline]]:
    """Three stages. endpoints: stage → URL of its store, if it is not the published one. gateway: its further environment."""
    local = local_pipeline(ObjectStore(published.store), published.manifest, len(CUT), None, {}, weights_cache)
    manifests = services(local.pipeline)
    for index, endpoint in endpoints.items():
        set_environment(manifests[index], {"LAMINA_STORE_ENDPOINT": endpoint})
    if gateway:
        set_environment(manifests[-1], gateway)
    async with deployed(local, manifests, folder) as platform:
        yield platform, local


@asynccontextmanager
async def deployed(local: LocalPipeline, manifests: list[dict[str, Any]], folder: Path) -> AsyncIterator[Platform]:
    """A platform with its default timing, to which the manifests are applied. folder: for logs."""
    async with running_platform(PlatformOptions(logs=folder, secrets=local.secrets), manifests, 1.0) as platform:
        yield platform


def set_environment(manifest: dict[str, Any], environ: Mapping[str, str]) -> None:
    (container,) = manifest["spec"]["template"]["spec"]["containers"]
    kept = [entry for entry in container["env"] if entry["name"] not in environ]
    container["env"] = kept + [{"name": name, "value": value} for name, value in environ.items()]


def pods_of(platform: Platform, name: str) -> list[dict[str, Any]]:
    """The pods of a Service, as `status` shows them."""
    (service,) = (each for each in platform.status()["services"] if each["name"] == name)
    return [pod for revision in service["revisions"] for pod in revision["pods"]]
