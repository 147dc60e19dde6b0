"""Knative on one machine: Service manifests in, processes that scale with their requests out.

One event loop holds everything that Knative runs beside the functions: ingress, activator, queue-proxies, autoscaler, brokers,
and the part of the Kubernetes API that the gateway watches. The functions are processes of their own, and none outlives it.
"""

import asyncio
import errno
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from knative.local.admin import Admin
from knative.local.autoscaler.hpa import CpuSeconds, cpu_seconds
from knative.local.autoscaler.revision_settings import revision_settings
from knative.local.errors import ManifestRefused, PortInUse
from knative.local.eventing.local_eventing import LocalEventing
from knative.local.kubelet.containers import LocalData, NamedData
from knative.local.kubelet.pods import PodTiming
from knative.local.kubelet.secret_folders import SecretFolders
from knative.local.metrics import render_metrics
from knative.local.proxies.network import Network
from knative.local.serving.emulated import ignored, refuse_unsupported
from knative.local.serving.endpoint_slices import EndpointSlices
from knative.local.serving.revisions import Revision, RevisionName, Surroundings
from knative.local.serving.services import LocalService
from knative.local.status import platform_status
from knative.webhook.autoscaling_annotations import AutoscalerConfig
from knative.webhook.check import is_knative_service, validate
from knative.webhook.feature_flags import ENABLED, POD_FIELDS, FeatureFlags

_log = logging.getLogger(__name__)

ROOT: Final = Path(__file__).resolve().parents[2]
"""Where `python -m functions` is found."""
_OF_A_NODE: Final = (
    "affinity",
    "nodeSelector",
    "priorityClassName",
    "runtimeClassName",
    "schedulerName",
    "securityContext",
    "tolerations",
    "topologySpreadConstraints",
)


def from_zero() -> AutoscalerConfig:
    """Knative's defaults, but what comes first begins at zero: on one machine nothing shall start that nobody asked for."""
    return AutoscalerConfig(allow_zero_initial_scale=True, initial_scale=0)


def _without_a_meaning_here() -> FeatureFlags:
    """Fields that say where and as whom a pod runs: whether a cluster lets them through is that cluster's affair."""
    return FeatureFlags({POD_FIELDS[field]: ENABLED for field in _OF_A_NODE})


@dataclass(frozen=True, kw_only=True, slots=True)
class PlatformOptions:
    """What a cluster has as its own configuration."""

    ports: Mapping[str, int] = field(default_factory=dict)
    """Service → port of its URL; those not named get one that the system chooses."""
    secrets: NamedData = field(default_factory=dict)
    secret_folders: Mapping[str, Path] = field(default_factory=dict)
    """Of those secrets that lie in files, each in a folder of its own: who has one mounted sees changes there."""
    config_maps: NamedData = field(default_factory=dict)
    logs: Path
    autoscaler: AutoscalerConfig = field(default_factory=from_zero)
    features: FeatureFlags = field(default_factory=_without_a_meaning_here)
    timing: PodTiming = field(default_factory=PodTiming)
    folder: Path = ROOT
    activator_queue_depth: int = 10_000
    """Requests that one revision may hold; beyond it 503."""
    cpu: CpuSeconds = cpu_seconds
    """What the HPA class scales by: where devices are emulated, how long they were busy."""
    network: Network = field(default_factory=Network)
    """Between pods, for requests that go straight to one: of every pod's link. The activator's way stays loopback."""


class Platform:
    """`start`, `apply`, `stop`; one event loop."""

    def __init__(self, options: PlatformOptions) -> None:
        self.services: dict[tuple[str, str], LocalService] = {}
        """(namespace, name) → Service."""
        self.eventing = LocalEventing(self._find, options.logs)
        self._options = options
        self._secrets = SecretFolders(options.secrets, options.secret_folders)
        self._slices = EndpointSlices()
        self._admin = Admin(self._slices, self.status, lambda: render_metrics(self.services.values()))
        self._around = Surroundings(
            timing=options.timing,
            slices=self._slices,
            folder=options.folder,
            logs=options.logs,
            activator_queue_depth=options.activator_queue_depth,
            cpu=options.cpu,
            network=options.network,
        )

    @property
    def admin_url(self) -> str:
        return self._admin.url

    async def start(self) -> None:
        await self._admin.start()

    async def apply(self, manifests: Sequence[dict[str, Any]]) -> None:
        """Creates or changes Services, Brokers, Triggers and Sequences; other kinds are left to a cluster.

        Raises ManifestRefused, UnsupportedManifest, SettingsError, UnknownRevision or PortInUse.
        """
        found = [manifest for manifest in manifests if is_knative_service(manifest)]
        for manifest in found:
            if violations := validate(manifest, self._options.autoscaler, self._options.features):
                raise ManifestRefused(f"{manifest['metadata']['name']}: {'; '.join(map(str, violations))}")
            refuse_unsupported(manifest)
            for each in ignored(manifest):
                _log.warning("%s: not emulated: %s", manifest["metadata"]["name"], each)
        for manifest in found:  # all URLs exist before any environment names them
            await self._listen(manifest["metadata"]["name"], manifest["metadata"].get("namespace", "default"))
        for manifest in found:
            metadata = manifest["metadata"]
            self.services[metadata.get("namespace", "default"), metadata["name"]].apply(manifest)
        await self.eventing.apply(manifests)

    async def stop(self, grace_seconds: float = 5.0) -> None:
        """Ends every pod: SIGTERM to all, SIGKILL to those that are still there after the grace."""
        await self.eventing.stop()
        await asyncio.gather(*(service.stop(grace_seconds) for service in self.services.values()))
        self._admin.close()
        self._secrets.remove()

    def secret_folder(self, name: str) -> Path:
        """Where a Secret lies for those that mount it. Raises KeyError."""
        return self._secrets.folders[name]

    def url(self, name: str, namespace: str = "default") -> str:
        return self.services[namespace, name].url

    def status(self) -> dict[str, Any]:
        return platform_status(os.getpid(), self.services.values()) | {"eventing": self.eventing.status()}

    def _find(self, namespace: str, name: str) -> str | None:
        service = self.services.get((namespace, name))
        return None if service is None else service.url

    async def _listen(self, name: str, namespace: str) -> None:
        if (namespace, name) in self.services:
            return
        service = LocalService(name, namespace, self._make_revision)
        port = self._options.ports.get(name, 0)
        try:
            await service.listen(port)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            raise PortInUse(f"port {port} of 127.0.0.1 is in use by another process; choose another with --port") from error
        self.services[namespace, name] = service

    def _make_revision(self, name: RevisionName, template: Mapping[str, Any]) -> Revision:
        settings = revision_settings(template, self._options.autoscaler)
        if self._any_pods and not settings.initial_scale:
            # Beside pods that serve, what is new is warmed first, as on a cluster: else traffic would move to zero pods.
            settings = replace(settings, initial_scale=1)
        return Revision(name, template, settings, self._local_data(), self._around)

    @property
    def _any_pods(self) -> bool:
        return any(revision.staying_pods for service in self.services.values() for revision in service.revisions)

    def _local_data(self) -> LocalData:
        in_cluster = {
            "LAMINA_KUBERNETES_API": self.admin_url,
            "LAMINA_POD_NETWORK": "127.0.0.0/8",
            "LAMINA_POD_PORT": "0",
        }
        replacements = {service.cluster_url: service.url for service in self.services.values()}
        data = self._options.secrets, self._options.config_maps
        return LocalData(*data, replacements, in_cluster, self._secrets.folders)
