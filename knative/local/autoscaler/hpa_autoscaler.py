"""One revision of the HPA class: the same face as `RevisionAutoscaler`, scaled by its pods' CPU instead of their requests.

each second      observe(now, pods)
every 2 s        decide(now, ready), then reconcile(now, replicas, ready, …); it changes its mind every 15 s only
"""

import os
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from knative.local.autoscaler.hpa import SYNC_SECONDS, HorizontalPodAutoscaler, hpa_spec
from knative.local.autoscaler.kpa import Decision
from knative.local.autoscaler.revision_autoscaler import Reconciliation, RevisionAutoscaler
from knative.local.autoscaler.revision_settings import RevisionSettings, SettingsError
from knative.local.autoscaler.scaler import Activity, RevisionStatus
from knative.webhook.autoscaling_annotations import HPA
from knative.webhook.values import parse_quantity

CpuSeconds = Callable[[int], float | None]
"""Process id → seconds that its processors, or the device that it stands for, were busy; None: not known."""
_CPU_WINDOW_SECONDS: Final = 15.0
"""Over which a pod's CPU is averaged, as a metrics server does."""


def revision_autoscaler(
    settings: RevisionSettings, template: Mapping[str, Any], *, ready: int, now: float, cpu: CpuSeconds | None = None
) -> "RevisionAutoscaler | HpaRevisionAutoscaler":
    """The autoscaler of the revision's class. cpu: None for what the system says of a process. Raises SettingsError."""
    if settings.autoscaler_class == HPA:
        return HpaRevisionAutoscaler(settings, cpu_request(template), now=now, cpu=cpu or cpu_seconds)
    return RevisionAutoscaler(settings, ready=ready, now=now)


def cpu_request(template: Mapping[str, Any]) -> float:
    """Cores that a pod of `spec.template` asks for; a limit without a request counts as one. Raises SettingsError."""
    cores = 0.0
    for index, container in enumerate(template["spec"]["containers"]):
        resources = container.get("resources") or {}
        cpu = (resources.get("requests") or {}).get("cpu", (resources.get("limits") or {}).get("cpu"))
        if cpu is None:
            raise SettingsError(
                f"spec.template.spec.containers[{index}].resources.requests.cpu: the HPA class scales by it; set it"
            )
        cores += float(parse_quantity(cpu))
    return cores


class HpaRevisionAutoscaler:
    """Always active, never at zero. Not thread-safe."""

    def __init__(self, settings: RevisionSettings, cpu_request_cores: float, *, now: float, cpu: CpuSeconds) -> None:
        """Raises SettingsError."""
        self.settings = settings
        self.status = RevisionStatus(Activity.ACTIVE, now)
        self.desired_scale = max(1, settings.min_scale, settings.initial_scale)
        self.excess_burst_capacity = 0
        self.last_decision: Decision | None = None
        self.panicking = False
        self.cpu_percent: list[float] = []
        """Of their request, of the ready pods that have run for long enough to say."""
        self._hpa = HorizontalPodAutoscaler(hpa_spec(settings))
        self._meter = _CpuMeter(cpu_request_cores, cpu)
        self._silent = self._unready = 0
        self._next_sync = now + SYNC_SECONDS

    def record(self, now: float, concurrency: float, requests_per_second: float) -> None:
        """Requests play no part in this class."""

    def observe(self, now: float, pods: Sequence[tuple[int | None, bool]]) -> None:
        """pods: (process id or None where none runs, ready) of every pod that stays."""
        self._meter.sample(now, [pid for pid, _ in pods if pid is not None])
        found = [self._meter.percent(pid) if pid is not None else None for pid, ready in pods if ready]
        self.cpu_percent = [percent for percent in found if percent is not None]
        self._silent = len(found) - len(self.cpu_percent)
        self._unready = len(pods) - len(found)

    def decide(self, now: float, ready: int) -> None:
        if now < self._next_sync:
            return
        self._next_sync = now + SYNC_SECONDS
        self.desired_scale = self._hpa.decide(now, self.cpu_percent, silent=self._silent, unready=self._unready)

    def reconcile(
        self, now: float, *, replicas: int, ready: int, reachable: bool = True, backed_by_activator: bool = True
    ) -> Reconciliation:
        """The activator stands in the path only while no pod is ready."""
        threshold = max(1, self.settings.min_scale, 0 if self.status.initialized else self.settings.initial_scale)
        self.status = replace(self.status, initialized=self.status.initialized or ready >= threshold)
        return Reconciliation(self.desired_scale, ready == 0, self.status.activity, None)


class _CpuMeter:
    """CPU of processes over the last seconds; None of a process that was seen for too short, or is gone."""

    def __init__(self, request_cores: float, cpu: CpuSeconds) -> None:
        self._request_cores = request_cores
        self._cpu = cpu
        self._samples: dict[int, deque[tuple[float, float]]] = {}

    def sample(self, now: float, pids: Sequence[int]) -> None:
        kept = {pid: self._samples.get(pid, deque()) for pid in pids}
        for pid, samples in kept.items():
            seconds = self._cpu(pid)
            if seconds is not None:
                samples.append((now, seconds))
            while len(samples) > 2 and samples[1][0] <= now - _CPU_WINDOW_SECONDS:
                samples.popleft()
        self._samples = kept

    def percent(self, pid: int) -> float | None:
        samples = self._samples.get(pid)
        if samples is None or len(samples) < 2:
            return None
        (first, before), (last, after) = samples[0], samples[-1]
        return 100 * (after - before) / (last - first) / self._request_cores if last > first else None


def cpu_seconds(pid: int) -> float | None:
    """CPU time of the process and of its children that have ended; None where there is no such process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()  # The name before it may hold anything. proc(5): utime is field 14 of all.
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
