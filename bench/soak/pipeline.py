"""The pipeline of a soak: SmolLM2 in fp32 on a local platform, with two gateways; a stage has one pod, so a kill stops it."""

import secrets
from pathlib import Path
from typing import Final, Self
from urllib.parse import urlsplit

from bench.pipeline import ALWAYS_ONE, local_spec
from knative.local.kubelet.pods import PodTiming
from knative.spec.pipeline_spec import PipelineSpec
from storage.store.embedded import EmbeddedStore

MODEL: Final = "smollm2-135m-instruct"
KEYS_SECRET: Final = "soak-keys"
GATEWAYS: Final = 2
# Short back-off: otherwise a pod that is killed again and again would be down for most of the run.
TIMING: Final = PodTiming(restart_backoff_seconds=0.5, restart_backoff_max_seconds=5.0)


def spec_of(stages: int) -> PipelineSpec:
    """fp32: answers must be equal token for token."""
    return local_spec(
        "soak",
        model={"name": MODEL, "dtype": "float32"},
        stages=stages,
        stage={"resources": {"cpu": "2", "memory": "2Gi"}, "busy_threads": 1, "kv_cache": "128Mi", "autoscaling": ALWAYS_ONE},
        gateway={
            "micro_batch_sequences": 4,  # the greedy client's connections fill the queue
            "api_keys_secret": KEYS_SECRET,
            "autoscaling": {"min_scale": GATEWAYS, "max_scale": GATEWAYS},
        },
    )


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
