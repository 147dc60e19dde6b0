"""A revision: one template of a Service, and as many pods as its autoscaler wants."""

import asyncio
import logging
import secrets
from collections.abc import Coroutine, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any, Final

from knative.local.autoscaler.hpa import CpuSeconds, HpaRevisionAutoscaler
from knative.local.autoscaler.kpa import TICK_SECONDS
from knative.local.autoscaler.revision_autoscaler import revision_autoscaler
from knative.local.autoscaler.revision_settings import RevisionSettings
from knative.local.http.messages import HttpError
from knative.local.http.server import Exchange
from knative.local.kubelet.containers import LocalData, read_container
from knative.local.kubelet.pods import LocalPod, Phase, PodTiming
from knative.local.proxies.activator import Activator
from knative.local.proxies.network import EmulatedNetwork
from knative.local.proxies.serving_certs import ServingCerts
from knative.local.serving.endpoint_slices import WatchedObjects, endpoint_slice

_log = logging.getLogger(__name__)

_SCRAPE_SECONDS: Final = 1.0


@dataclass(frozen=True, slots=True)
class PlatformContext:
    """Settings and objects that all revisions of a platform share."""

    timing: PodTiming
    slices: WatchedObjects
    folder: Path  # working folder of the processes
    logs: Path
    activator_queue_depth: int
    cpu: CpuSeconds  # what the class HPA scales by
    network: EmulatedNetwork
    certs: ServingCerts | None


@dataclass(frozen=True, slots=True)
class RevisionName:
    namespace: str
    service: str
    revision: str


class Revision:
    """A revision with its pods, its activator and its autoscaler. `start` begins to scale it, `stop` ends that and all pods."""

    def __init__(
        self,
        name: RevisionName,
        template: Mapping[str, Any],
        settings: RevisionSettings,
        local: LocalData,
        context: PlatformContext,
    ) -> None:
        """template: the Service's `spec.template`. Raises UnsupportedManifest or SettingsError."""
        self.name = name
        self.template = template
        self.pods: list[LocalPod] = []  # oldest first, leaving ones included
        self.reachable = True  # a route leads here
        self.failure: str | None = None  # why no pod became ready within the progress deadline; requests then get 503
        self.concurrency = 0.0  # of the whole revision in the last second
        # Knative's runtime contract; PORT is set for each container.
        runtime_environ = {"K_SERVICE": name.service, "K_CONFIGURATION": name.service, "K_REVISION": name.revision}
        self._container = read_container(template, local, runtime_environ)
        self._context = context
        self._settings = settings
        limits = self._container.limits
        depth = context.activator_queue_depth
        self.activator = Activator(limits.container_concurrency, limits.timeouts, depth, self._wake)
        self._now = asyncio.get_running_loop().time
        self.autoscaler = revision_autoscaler(settings, template, ready=0, now=self._now(), cpu=context.cpu)
        self._without_ready_pod_since: float | None = None
        self._reported_early = 0
        self._stopping = False
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def ready_pods(self) -> list[LocalPod]:
        return [pod for pod in self.pods if pod.ready]

    @property
    def staying_pods(self) -> list[LocalPod]:
        return [pod for pod in self.pods if not pod.leaving]

    @property
    def initialized(self) -> bool:
        """Whether as many pods as the initial scale have been ready once, so that traffic may move here."""
        return self.autoscaler.status.initialized or not max(self._settings.initial_scale, self._settings.min_scale)

    def start(self) -> None:
        self._scale_to(self._settings.initial_scale)
        self._spawn(self._reconcile_forever(), "reconcile")

    async def stop(self, grace_seconds: float) -> None:
        """Sends SIGTERM to every pod, and SIGKILL after `grace_seconds`. Held requests get 503."""
        self._stopping = True
        for task in self._tasks:
            task.cancel()
        self.activator.fail_waiting("the platform is stopping")
        await asyncio.gather(*(pod.stop(grace_seconds) for pod in self.pods))
        if self._tasks:
            await asyncio.wait(self._tasks)

    async def serve(self, exchange: Exchange) -> None:
        """Forwards a request to a pod, which it may have to wait for. Raises HttpError."""
        if refusal := "the platform is stopping" if self._stopping else self.failure:
            raise HttpError(HTTPStatus.SERVICE_UNAVAILABLE, refusal)
        await self.activator.serve(exchange)

    async def _reconcile_forever(self) -> None:
        """Reads the load every second and decides on replicas every two seconds, as Knative's autoscaler does."""
        due = self._now()
        while True:
            for _ in range(round(TICK_SECONDS / _SCRAPE_SECONDS)):
                due += _SCRAPE_SECONDS
                await asyncio.sleep(due - self._now())
                self._scrape()
            self._check_progress()
            self._decide()

    def _scrape(self) -> None:
        now, ready = self._now(), self.ready_pods
        reports = [pod.proxy.report(now) for pod in ready]
        held = self.activator.meter.report(now)
        # The request that woke the revision was reported when it came (activator, concurrency_reporter.go).
        early, self._reported_early = self._reported_early, 0
        self.concurrency = max(0.0, held.average - early) + sum(report.average for report in reports)
        arrivals = held.arrivals - early + sum(report.arrivals for report in reports)
        if isinstance(self.autoscaler, HpaRevisionAutoscaler):
            self.autoscaler.observe(now, [(pod.pid, pod.ready) for pod in self.staying_pods])
        elif ready or held.average or held.arrivals:
            self.autoscaler.record(now, self.concurrency, arrivals / _SCRAPE_SECONDS)

    def _wake(self) -> None:
        """Starts a pod for the first request at zero, without waiting for the next decision. The activator calls it."""
        if self.staying_pods:
            return
        self._reported_early = 1
        self.autoscaler.record(self._now(), 1.0, 1.0)
        self._decide()

    def _decide(self) -> None:
        now, ready = self._now(), len(self.ready_pods)
        self.autoscaler.decide(now, ready)
        wanted = self.autoscaler.reconcile(
            now,
            replicas=len(self.staying_pods),
            ready=ready,
            reachable=self.reachable,
            backed_by_activator=self.activator.in_path,
        )
        self.activator.in_path = wanted.proxy
        self._scale_to(wanted.replicas)

    def _scale_to(self, replicas: int) -> None:
        staying = self.staying_pods
        for _ in range(replicas - len(staying)):
            self._add_pod()
        # As a ReplicaSet does it: pods that are not ready go first, then the youngest; load plays no part.
        youngest_first = list(reversed(staying))
        expendable = sorted(youngest_first, key=lambda pod: pod.ready)
        for pod in expendable[: max(0, len(staying) - replicas)]:
            self._spawn(pod.leave(), f"leave {pod.name}")

    def _add_pod(self) -> None:
        name = f"{self.name.revision}-{secrets.token_hex(3)}"
        log = self._context.logs / f"{name}.log"
        context = self._context
        pod = LocalPod(name, self._container, context.timing, log, self._pods_changed, context.network, context.certs)
        self.pods.append(pod)
        if self._without_ready_pod_since is None and not self.ready_pods:
            self._without_ready_pod_since = self._now()
        self._spawn(pod.start(self._context.folder), f"start {name}")

    def _pods_changed(self) -> None:
        for pod in self.pods:
            if pod.proxy.port:
                self._publish(pod)
        self.pods = [pod for pod in self.pods if pod.phase is not Phase.GONE]
        ready = self.ready_pods
        if ready or not self.staying_pods:
            self._without_ready_pod_since, self.failure = None, None
        elif self._without_ready_pod_since is None:
            self._without_ready_pod_since = self._now()
        self.activator.set_pods([pod.proxy for pod in ready])

    def _publish(self, pod: LocalPod) -> None:
        serving = pod.ready or (pod.phase is Phase.LEAVING and bool(pod.readiness))
        conditions = {"ready": pod.ready, "serving": serving, "terminating": pod.leaving}
        ports = (pod.proxy.port, pod.tls_port)
        found = endpoint_slice(self.name.service, self.name.revision, self.name.namespace, pod.name, conditions, *ports)
        slices = self._context.slices
        slices.remove(found) if pod.phase is Phase.GONE else slices.put(found)

    def _check_progress(self) -> None:
        since, deadline = self._without_ready_pod_since, self._settings.progress_deadline_seconds
        if since is None or self._now() - since <= deadline or self.failure is not None:
            return
        trouble = next((pod.trouble for pod in reversed(self.pods) if pod.trouble), "no probe has answered")
        self.failure = f"ProgressDeadlineExceeded: {self.name.revision} had no ready pod for {deadline:g} seconds; {trouble}"
        _log.error("%s", self.failure)
        self.activator.fail_waiting(self.failure)

    def _spawn(self, work: Coroutine[Any, Any, None], name: str) -> None:
        task = asyncio.create_task(work, name=f"{self.name.revision}: {name}")
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("%s failed", task.get_name(), exc_info=error)
