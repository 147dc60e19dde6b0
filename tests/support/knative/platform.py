"""A local platform whose pods are the echo app: manifests, a running platform, polling with a deadline."""

import asyncio
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp

from knative.local.kubelet.pods import PodTiming
from knative.local.platform import Platform, PlatformOptions
from knative.local.platform import running_platform as started_platform
from knative.local.serving.revisions import Revision
from knative.webhook.autoscaling_annotations import AutoscalerConfig

QUICK = PodTiming(drain_quiet_seconds=0.2, restart_backoff_seconds=0.2, restart_backoff_max_seconds=0.5)
FROM_ZERO = AutoscalerConfig(allow_zero_initial_scale=True, initial_scale=0, scale_to_zero_grace_period_seconds=0.5)
DEADLINE_SECONDS = 120.0


def echo_service(name: str = "echo", *, concurrency: int = 8, timeout: int = 120, **parts: Any) -> dict[str, Any]:
    """parts: environment, annotations (short names), traffic, container and pod (more fields of each)."""
    annotations = {f"autoscaling.knative.dev/{key}": value for key, value in parts.get("annotations", {}).items()}
    annotations |= parts.get("full_annotations", {})
    container = {
        "image": "registry.example/echo:1",
        "command": [sys.executable, "-m", "tests.support.knative.echo_app"],
        "env": [{"name": key, "value": value} for key, value in parts.get("environment", {}).items()],
        "readinessProbe": {"httpGet": {"path": "/readyz"}},
        **parts.get("container", {}),
    }
    spec = {"containerConcurrency": concurrency, "timeoutSeconds": timeout, "containers": [container], **parts.get("pod", {})}
    service: dict[str, Any] = {
        "apiVersion": "serving.knative.dev/v1",
        "kind": "Service",
        "metadata": {"name": name, "namespace": "default"},
        "spec": {"template": {"metadata": {"annotations": annotations}, "spec": spec}},
    }
    if "traffic" in parts:
        service["spec"]["traffic"] = parts["traffic"]
    return service


@asynccontextmanager
async def running_platform(logs: Path, /, *manifests: dict[str, Any], **options: Any) -> AsyncIterator[Platform]:
    settings: dict[str, Any] = {"logs": logs, "timing": QUICK, "autoscaler": FROM_ZERO} | options
    async with started_platform(PlatformOptions(**settings), manifests, 1.0) as platform:
        yield platform


@asynccontextmanager
async def client() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=DEADLINE_SECONDS)) as session:
        yield session
    await asyncio.sleep(0)


async def fetch(session: aiohttp.ClientSession, url: str) -> tuple[int, str]:
    async with session.get(url) as reply:
        return reply.status, await reply.text()


async def until(what: Callable[[], bool], seconds: float = DEADLINE_SECONDS) -> None:
    """Polls; fails after the deadline."""
    async with asyncio.timeout(seconds):
        while not what():
            await asyncio.sleep(0.02)


def revision(platform: Platform, name: str = "echo", index: int = -1) -> Revision:
    return platform.services["default", name].revisions[index]
