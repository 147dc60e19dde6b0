"""The class HPA on CPU: the Horizontal Pod Autoscaler's documented algorithm, with Knative's settings for it.

    utilization = ⌊mean of the pods' CPU in percent of their request⌋
    desired     = ⌈pods × utilization / target⌉, unless the ratio is within 10 % of 1

`recommend` also allows for pods without a report. `HorizontalPodAutoscaler` adds stabilization windows, a limit on the rate of
scaling out, and the bounds. The result is never zero.
"""

import math
import os
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from knative.local.autoscaler.kpa import Decision
from knative.local.autoscaler.revision_settings import RevisionSettings, SettingsError
from knative.local.autoscaler.scaler import Activity, Reconciliation, RevisionStatus
from knative.webhook.autoscaling_annotations import METRIC
from knative.webhook.values import parse_quantity

# Maps a process id to the CPU seconds that it has used, or to busy seconds of the device that it emulates; None: unknown.
CpuSeconds = Callable[[int], float | None]

SYNC_SECONDS: Final = 15  # how often the Horizontal Pod Autoscaler decides
_LEAST_RATIO: Final = 1 - 0.1  # of utilization to target; between these the number of pods stays
_MOST_RATIO: Final = 1 + 0.1
_DEFAULT_TARGET_PERCENT: Final = 80
_DEFAULT_DOWN_STABILIZATION_SECONDS: Final = 300.0
_UP_PERIOD_SECONDS: Final = 15
_UP_PODS: Final = 4
_UP_FACTOR: Final = 2
_CPU_WINDOW_SECONDS: Final = 15.0  # window over which a pod's CPU is averaged, as by a metrics server


@dataclass(frozen=True, slots=True)
class HpaSpec:
    target_percent: int  # CPU, in percent of the request
    min_replicas: int
    max_replicas: int
    up_stabilization_seconds: float = 0.0
    down_stabilization_seconds: float = _DEFAULT_DOWN_STABILIZATION_SECONDS


def hpa_spec(settings: RevisionSettings) -> HpaSpec:
    """The settings that Knative gives to the Horizontal Pod Autoscaler of this revision.

    The annotation `window` sets both stabilization windows. Raises SettingsError for any metric but cpu.
    """
    if settings.metric != "cpu":
        raise SettingsError(f"{METRIC.key}: {settings.metric!r} has no source here; the HPA class runs on 'cpu' only")
    window = settings.window_seconds
    return HpaSpec(
        target_percent=_DEFAULT_TARGET_PERCENT if settings.target is None else math.ceil(settings.target),
        min_replicas=max(1, settings.min_scale),
        max_replicas=settings.max_scale or 2**31 - 1,
        up_stabilization_seconds=0.0 if window is None else window,
        down_stabilization_seconds=_DEFAULT_DOWN_STABILIZATION_SECONDS if window is None else window,
    )


def recommend(spec: HpaSpec, cpu_percent: Sequence[float], *, silent: int, unready: int) -> int:
    """The number of pods that the CPU load asks for, before stabilization and bounds.

    cpu_percent: CPU of each ready pod that reports, in percent of its request; if there is none, the present number is
    returned. silent: number of ready pods without a report; they count as at the target when scaling in and as idle when
    scaling out. unready: number of pods that are not ready; they count as idle when scaling out.
    """
    current = len(cpu_percent) + silent + unready
    if not cpu_percent:
        return current
    ratio = _ratio(spec, cpu_percent)
    if not silent and not (unready and ratio > 1):
        return current if _LEAST_RATIO <= ratio <= _MOST_RATIO else math.ceil(ratio * len(cpu_percent))
    assumed = [0.0] * (silent + unready) if ratio > 1 else [float(spec.target_percent)] * silent
    filled = [*cpu_percent, *assumed]
    ratio_of_all = _ratio(spec, filled)
    if _LEAST_RATIO <= ratio_of_all <= _MOST_RATIO or (ratio > 1) != (ratio_of_all > 1):
        return current
    wanted = math.ceil(ratio_of_all * len(filled))
    return max(wanted, current) if ratio > 1 else min(wanted, current)


def _ratio(spec: HpaSpec, cpu_percent: Sequence[float]) -> float:
    return math.floor(math.fsum(cpu_percent) / len(cpu_percent)) / spec.target_percent


class HorizontalPodAutoscaler:
    """Turns recommendations into replicas: it stabilizes them over time and keeps them within bounds.

    Not thread-safe. `now` is in seconds of a monotonic clock.
    """

    def __init__(self, spec: HpaSpec) -> None:
        self.spec = spec
        self._recommendations: deque[tuple[float, int]] = deque()  # (when, pods)
        self._added: deque[tuple[float, int]] = deque()  # (when, pods added) of the last scale-ups

    def decide(self, now: float, cpu_percent: Sequence[float], *, silent: int = 0, unready: int = 0) -> int:
        """The number of replicas to run: `recommend`'s answer after stabilization, rate limit and bounds.

        cpu_percent, silent, unready: as for `recommend`.
        """
        spec, current = self.spec, len(cpu_percent) + silent + unready
        wanted = self._stabilized(now, current, recommend(spec, cpu_percent, silent=silent, unready=unready))
        while self._added and self._added[0][0] <= now - _UP_PERIOD_SECONDS:
            self._added.popleft()
        at_period_start = current - sum(pods for _, pods in self._added)
        wanted = min(wanted, max(at_period_start + _UP_PODS, math.ceil(at_period_start * _UP_FACTOR), current))
        wanted = min(max(wanted, spec.min_replicas), spec.max_replicas)
        if wanted > current:
            self._added.append((now, wanted - current))
        return wanted

    def _stabilized(self, now: float, current: int, recommendation: int) -> int:
        """Damps a recommendation, so that a short change of load does not change the number of pods.

        Scaling in stops at the highest recommendation in its window, scaling out at the lowest in its own.
        """
        self._recommendations.append((now, recommendation))
        longest = max(self.spec.up_stabilization_seconds, self.spec.down_stabilization_seconds)
        while self._recommendations[0][0] <= now - longest and len(self._recommendations) > 1:
            self._recommendations.popleft()
        up_since, down_since = now - self.spec.up_stabilization_seconds, now - self.spec.down_stabilization_seconds
        lowest = min((pods for at, pods in self._recommendations if at > up_since), default=recommendation)
        highest = max((pods for at, pods in self._recommendations if at > down_since), default=recommendation)
        return min(max(current, lowest), highest)


class HpaRevisionAutoscaler:
    """The autoscaler of a revision of the class HPA, with `RevisionAutoscaler`'s interface. It scales by CPU, never to zero.

    The platform calls `observe` every second, `decide` and `reconcile` every two; the desired scale changes every 15 s only.
    """

    def __init__(self, settings: RevisionSettings, cpu_request_cores: float, *, now: float, cpu: CpuSeconds) -> None:
        """cpu_request_cores: CPU request of one pod, in cores. cpu: returns a process's CPU seconds. Raises SettingsError."""
        self.settings = settings
        self.status = RevisionStatus(Activity.ACTIVE, now)
        self.desired_scale = max(1, settings.min_scale, settings.initial_scale)
        self.excess_burst_capacity = 0
        self.last_decision: Decision | None = None
        self.panicking = False
        self.cpu_percent: list[float] = []  # of their request, for ready pods that have run long enough to measure
        self._hpa = HorizontalPodAutoscaler(hpa_spec(settings))
        self._request_cores = cpu_request_cores
        self._cpu = cpu
        self._samples: dict[int, deque[tuple[float, float]]] = {}  # process id → (when, CPU seconds)
        self._silent = self._unready = 0
        self._next_sync = now + SYNC_SECONDS

    def record(self, now: float, concurrency: float, requests_per_second: float) -> None:
        """Does nothing: this class does not scale by requests."""

    def observe(self, now: float, pods: Sequence[tuple[int | None, bool]]) -> None:
        """Samples the CPU of all pods that are not terminating. pods: for each (process id, None if it does not run; whether it
        is ready)."""
        self._samples = {pid: self._sampled(now, pid) for pid, _ in pods if pid is not None}
        found = [self._percent(pid) for pid, ready in pods if ready]
        self.cpu_percent = [percent for percent in found if percent is not None]
        self._silent = len(found) - len(self.cpu_percent)
        self._unready = len(pods) - len(found)

    def decide(self, now: float, ready: int) -> None:
        if now >= self._next_sync:
            self._next_sync = now + SYNC_SECONDS
            self.desired_scale = self._hpa.decide(now, self.cpu_percent, silent=self._silent, unready=self._unready)

    def reconcile(
        self, now: float, *, replicas: int, ready: int, reachable: bool = True, backed_by_activator: bool = True
    ) -> Reconciliation:
        """Returns the replicas of the last decision; the activator is in the path only while no pod is ready.

        The arguments are those of `RevisionAutoscaler.reconcile`; only `ready` is used.
        """
        threshold = max(1, self.settings.min_scale, 0 if self.status.initialized else self.settings.initial_scale)
        self.status = replace(self.status, initialized=self.status.initialized or ready >= threshold)
        return Reconciliation(self.desired_scale, ready == 0)

    def _sampled(self, now: float, pid: int) -> deque[tuple[float, float]]:
        samples = self._samples.get(pid) or deque()
        if (seconds := self._cpu(pid)) is not None:
            samples.append((now, seconds))
        while len(samples) > 2 and samples[1][0] <= now - _CPU_WINDOW_SECONDS:
            samples.popleft()
        return samples

    def _percent(self, pid: int | None) -> float | None:
        """Mean CPU of a process over the window, in percent of the request; None if there are fewer than two samples."""
        samples = self._samples.get(pid) if pid is not None else None
        if samples is None or len(samples) < 2:
            return None
        (first, before), (last, after) = samples[0], samples[-1]
        return 100 * (after - before) / (last - first) / self._request_cores if last > first else None


def cpu_request(template: Mapping[str, Any]) -> float:
    """CPU request of a pod with this `spec.template`, in cores. A limit without a request counts as a request.

    Raises SettingsError if a container has neither.
    """
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


def cpu_seconds(pid: int) -> float | None:
    """CPU seconds that the process and its ended children have used; None if there is no such process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()  # The name in parentheses may hold anything. proc(5): utime is field 14 of all.
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
