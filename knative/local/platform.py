"""Knative on one machine: runs the Services of manifests as processes that scale with their requests.

One event loop holds everything that Knative runs besides the functions: ingress, activator, queue-proxies, autoscaler, brokers,
and the part of the Kubernetes API that watchers of pods need. The functions are processes of their own and end with it.
"""

import asyncio
import errno
import logging
import os
import re
import shutil
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from knative.local.admin import Admin, render_metrics, service_status
from knative.local.autoscaler.hpa import CpuSeconds, cpu_seconds
from knative.local.autoscaler.revision_settings import revision_settings
from knative.local.errors import ManifestRefused, PortInUse, UnsupportedManifest
from knative.local.eventing.local_eventing import LocalEventing
from knative.local.kubelet.containers import LAMINA_FUNCTION, LocalData, NamedData, write_secrets
from knative.local.kubelet.pods import PodTiming
from knative.local.proxies.network import EmulatedNetwork
from knative.local.proxies.serving_certs import SERVING_CERTS, ServingCerts
from knative.local.serving.endpoint_slices import WatchedObjects
from knative.local.serving.revisions import PlatformContext, Revision, RevisionName
from knative.local.serving.services import LocalService
from knative.local.serving.unsupported import ignored, refuse_unsupported
from knative.webhook.autoscaling_annotations import AutoscalerConfig
from knative.webhook.check import is_knative_service, validate
from knative.webhook.feature_flags import ENABLED, POD_FIELDS, FeatureFlags

_log = logging.getLogger(__name__)

_CLUSTER_URL: Final = re.compile(r"http://[-a-z0-9]+\.[-a-z0-9]+\.svc\.cluster\.local")
ROOT: Final = Path(__file__).resolve().parents[2]  # Lamina's folder, where `python -m functions` is found
# Fields that say where and as which user a pod runs. They have no effect here, and each cluster decides itself.
_PLACEMENT_FIELDS: Final = (
    "affinity", "nodeSelector", "priorityClassName", "runtimeClassName", "schedulerName", "securityContext", "tolerations",
    "topologySpreadConstraints",
)  # fmt: skip
_PLACEMENT_ALLOWED: Final = FeatureFlags({POD_FIELDS[name]: ENABLED for name in _PLACEMENT_FIELDS})
# Knative's defaults, except that new Services begin at zero: on one machine nothing starts without a request.
FROM_ZERO: Final = AutoscalerConfig(allow_zero_initial_scale=True, initial_scale=0)


@dataclass(frozen=True, kw_only=True, slots=True)
class PlatformOptions:
    """The settings of a platform that hold for all of its Services, as a cluster's own configuration does."""

    ports: Mapping[str, int] = field(default_factory=dict)  # Service → port of its URL; for others the system chooses one
    secrets: NamedData = field(default_factory=dict)
    secret_folders: Mapping[str, Path] = field(default_factory=dict)  # folders of Secrets; pods that mount one see changes
    config_maps: NamedData = field(default_factory=dict)
    logs: Path
    autoscaler: AutoscalerConfig = FROM_ZERO
    features: FeatureFlags = _PLACEMENT_ALLOWED
    timing: PodTiming = field(default_factory=PodTiming)
    folder: Path = ROOT  # working folder of the processes
    entrypoint: tuple[str, ...] = LAMINA_FUNCTION  # command of containers that name none; (): they are refused
    activator_queue_depth: int = 10_000  # requests held for one revision; more get 503
    cpu: CpuSeconds = cpu_seconds  # what the class HPA scales by: CPU seconds, or busy seconds of emulated devices
    network: EmulatedNetwork = field(default_factory=EmulatedNetwork)  # in front of each pod's port; the activator bypasses it


class Platform:
    """Runs Services, Brokers, Triggers and Sequences in one event loop.

    Call `start`, then `apply` for manifests and for each change of them, and `stop` at the end.
    """

    def __init__(self, options: PlatformOptions) -> None:
        self.services: dict[tuple[str, str], LocalService] = {}  # (namespace, name) → Service
        self.eventing = LocalEventing(self._find, options.logs)
        self._options = options
        self._made_secrets = Path(tempfile.mkdtemp(prefix="lamina-secrets-"))  # only its owner can read it
        # Secret → folder, as pods that mount it see it.
        self.secret_folders = write_secrets(options.secrets, options.secret_folders, self._made_secrets)
        slices = WatchedObjects()
        self._config_maps = WatchedObjects("ConfigMap", "v1")
        self._leases = WatchedObjects("Lease", "coordination.k8s.io/v1")
        self._admin = Admin(
            {"endpointslices": slices, "configmaps": self._config_maps},
            self._leases,
            self.status,
            lambda: render_metrics(self.services.values()),
        )
        self._context = PlatformContext(
            timing=options.timing,
            slices=slices,
            folder=options.folder,
            logs=options.logs,
            activator_queue_depth=options.activator_queue_depth,
            cpu=options.cpu,
            network=options.network,
            certs=self._serving_certs(),
        )

    def _serving_certs(self) -> ServingCerts | None:
        """Like Knative's queue-proxy, those here serve TLS if the Secret with their certificate exists."""
        folder = self.secret_folders.get(SERVING_CERTS)
        try:
            return None if folder is None else ServingCerts(folder)
        except OSError as error:
            raise UnsupportedManifest(f"Secret {SERVING_CERTS}: no certificate with its key: {error}") from error

    async def start(self) -> None:
        await self._admin.server.start()
        self.admin_url = self._admin.server.url

    async def apply(self, manifests: Sequence[dict[str, Any]]) -> None:
        """Creates or changes Services, Brokers, Triggers, Sequences, and a fleet's ConfigMaps and Lease; others are ignored.

        Raises ManifestRefused, UnsupportedManifest, SettingsError, UnknownRevision or PortInUse.
        """
        found = []
        for manifest in filter(is_knative_service, manifests):
            metadata = manifest.get("metadata") or {}
            if violations := validate(manifest, self._options.autoscaler, self._options.features):
                raise ManifestRefused(f"{metadata.get('name', 'a Service')}: {'; '.join(map(str, violations))}")
            refuse_unsupported(manifest)
            for each in ignored(manifest):
                _log.warning("%s: not emulated: %s", metadata["name"], each)
            found.append((metadata.get("namespace", "default"), metadata["name"], manifest))
        for namespace, name, _ in found:  # all URLs exist before any environment names them
            if (namespace, name) not in self.services:
                await self._listen(name, namespace)
        for namespace, name, manifest in found:
            self.services[namespace, name].apply(manifest)
        urls = self._replacements()
        for manifest in (each for each in manifests if each["kind"] == "ConfigMap"):
            data = (manifest.get("data") or {}).items()
            local = {name: _CLUSTER_URL.sub(lambda found: urls.get(found[0], found[0]), value) for name, value in data}
            self._config_maps.put({**manifest, "data": local})
        for manifest in (each for each in manifests if each["kind"] == "Lease"):
            if self._leases.get(manifest["metadata"]["namespace"], manifest["metadata"]["name"]) is None:
                self._leases.put(manifest)
        await self.eventing.apply(manifests)

    async def delete(self, manifests: Sequence[dict[str, Any]], grace_seconds: float = 5.0) -> None:
        """Deletes these Services and ConfigMaps. Pods may finish their work within `grace_seconds`."""
        for manifest in manifests:
            if manifest["kind"] == "ConfigMap":
                self._config_maps.remove(manifest)
                continue
            service = self.services.pop((manifest["metadata"]["namespace"], manifest["metadata"]["name"]), None)
            if service is not None:
                await service.stop(grace_seconds)

    async def stop(self, grace_seconds: float = 5.0) -> None:
        """Ends every pod: SIGTERM to all, SIGKILL after `grace_seconds` to those that run. Deliveries in progress are lost."""
        await self.eventing.stop()
        await asyncio.gather(*(service.stop(grace_seconds) for service in self.services.values()))
        self._admin.server.close()
        shutil.rmtree(self._made_secrets, ignore_errors=True)

    def url(self, name: str, namespace: str = "default") -> str:
        return self.services[namespace, name].server.url

    def status(self) -> dict[str, Any]:
        services = [service_status(service) for service in self.services.values()]
        members = [
            {
                "name": each["metadata"]["name"],
                "model": each["data"].get("LAMINA_MODEL", ""),
                "services": each["data"].get("LAMINA_STAGE_SERVICES", "").split(","),
                "annotations": each["metadata"].get("annotations") or {},
            }
            for each in self._config_maps.all()
        ]
        return {"pid": os.getpid(), "services": services, "members": members, "eventing": self.eventing.status()}

    def _replacements(self) -> dict[str, str]:
        """Cluster-local URL → local URL of each Service, in place of cluster DNS."""
        return {f"http://{each.name}.{each.namespace}.svc.cluster.local": each.server.url for each in self.services.values()}

    def _find(self, namespace: str, name: str) -> str | None:
        service = self.services.get((namespace, name))
        return None if service is None else service.server.url

    async def _listen(self, name: str, namespace: str) -> None:
        service = LocalService(name, namespace, self._make_revision)
        port = self._options.ports.get(name, 0)
        try:
            await service.server.start(port)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            raise PortInUse(f"port {port} of 127.0.0.1 is in use by another process; choose another with --port") from error
        self.services[namespace, name] = service

    def _make_revision(self, name: RevisionName, template: Mapping[str, Any]) -> Revision:
        settings = revision_settings(template, self._options.autoscaler)
        services = self.services.values()
        serving = any(revision.staying_pods for service in services for revision in service.revisions)
        if serving and not settings.initial_scale:
            # While other pods serve, a new revision starts warm, as on a cluster: else traffic would move to zero pods.
            settings = replace(settings, initial_scale=1)

        local = LocalData(
            self._options.secrets,
            self._options.config_maps,
            replacements=self._replacements(),
            in_cluster={"LAMINA_KUBERNETES_API": self.admin_url, "LAMINA_POD_NETWORK": "127.0.0.0/8", "LAMINA_POD_PORT": "0"},
            secret_folders=self.secret_folders,
            entrypoint=self._options.entrypoint,
        )
        return Revision(name, template, settings, local, self._context)


@asynccontextmanager
async def running_platform(
    options: PlatformOptions, manifests: Sequence[dict[str, Any]], grace_seconds: float = 5.0
) -> AsyncIterator[Platform]:
    """A platform in this process, with these manifests applied. It stops at the end; see `Platform.stop`."""
    platform = Platform(options)
    await platform.start()
    try:
        await platform.apply(manifests)
        yield platform
    finally:
        await platform.stop(grace_seconds)
