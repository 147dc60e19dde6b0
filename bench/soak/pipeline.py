"""The pipeline of a soak: SmolLM2 in fp32 on a local platform, each stage with one pod, so that a kill stops the stage."""

import contextlib
import secrets
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Final, Self
from urllib.parse import urlsplit

from bench.pipeline import running_platform
from bench.soak.records import GATEWAY
from knative.commands.local_pipeline import LocalPipeline
from knative.commands.state_folder import RunningPlatform, StateFolder
from knative.local.kubelet.pods import PodTiming
from knative.local.platform import Platform, PlatformOptions
from knative.render.services import services
from knative.spec.pipeline_spec import (
    Autoscaling,
    GatewayAutoscaling,
    GatewaySpec,
    ModelSpec,
    PipelineSpec,
    Resources,
    StageSpec,
    StoreSpec,
)
from storage.store.embedded import EmbeddedStore
from storage.store.settings import StoreSettings

MODEL: Final = "smollm2-135m-instruct"
KEYS_SECRET: Final = "soak-keys"
# Short back-off: otherwise a pod that is killed again and again would be down for most of the run.
_TIMING: Final = PodTiming(restart_backoff_seconds=0.5, restart_backoff_max_seconds=5.0)
_ALWAYS_ONE: Final = Autoscaling(min_scale=1, max_scale=1)


def spec_of(stages: int) -> PipelineSpec:
    """All other fields have their defaults. fp32: answers must be equal token for token."""
    return PipelineSpec(
        name="soak",
        model=ModelSpec(name=MODEL, dtype="float32"),
        stages=stages,
        image="lamina:local",
        stage=StageSpec(resources=Resources(cpu="2", memory="2Gi"), busy_threads=1, kv_cache="128Mi", autoscaling=_ALWAYS_ONE),
        gateway=GatewaySpec(
            micro_batch_sequences=16,
            api_keys_secret=KEYS_SECRET,
            autoscaling=GatewayAutoscaling(min_scale=1, max_scale=1),
        ),
        store=StoreSpec(endpoint="http://127.0.0.1"),
    )


def services_of(local: LocalPipeline) -> dict[str, str]:
    """Name in the records → name of the Service."""
    stages = range(len(local.pipeline.cut))
    return {GATEWAY: local.pipeline.spec.name, **{f"stage {index}": local.pipeline.stage_name(index) for index in stages}}


@contextlib.asynccontextmanager
async def serving(state: StateFolder, local: LocalPipeline, store: StoreSettings) -> AsyncIterator[Platform]:
    options = PlatformOptions(secrets=local.secrets, logs=state.logs, timing=_TIMING)
    async with running_platform(options, services(local.pipeline)) as platform:
        url = platform.url(local.pipeline.spec.name)
        state.publish(RunningPlatform(platform.status()["pid"], platform.admin_url, url, store))
        yield platform


class ReturningStore:
    """The embedded store, which can stop and start again at the same address. A context manager."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._keys = (secrets.token_hex(10), secrets.token_hex(20))
        self._store = EmbeddedStore(folder, keys=self._keys)
        self.settings = self._store.settings

    def leave(self) -> None:
        self._store.close()

    def come_back(self) -> None:
        """Raises StoreUnreachable."""
        port = urlsplit(self.settings.endpoint_url).port or 0
        self._store = EmbeddedStore(self._folder, port=port, keys=self._keys)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._store.close()
