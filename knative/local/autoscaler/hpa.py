"""The HPA class on CPU: the Horizontal Pod Autoscaler's documented algorithm, with Knative's settings for it.

    utilization = ⌊mean of the pods' CPU in percent of their request⌋
    desired     = ⌈pods × utilization / target⌉, unless the ratio is within 10 % of 1

Then come pods that report nothing, the stabilization windows, the rate of scaling up, and the bounds. It never reaches zero.
"""

import math
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from knative.local.autoscaler.revision_settings import RevisionSettings, SettingsError
from knative.webhook.autoscaling_annotations import METRIC

SYNC_SECONDS: Final = 15
"""How often the Horizontal Pod Autoscaler decides."""
_TOLERANCE: Final = 0.1
_DEFAULT_TARGET_PERCENT: Final = 80
_DEFAULT_DOWN_STABILIZATION_SECONDS: Final = 300.0
_UP_PERIOD_SECONDS: Final = 15
_UP_PODS: Final = 4
_UP_FACTOR: Final = 2


@dataclass(frozen=True, slots=True)
class HpaSpec:
    target_percent: int
    """CPU, of the request."""
    min_replicas: int
    max_replicas: int
    up_stabilization_seconds: float = 0.0
    down_stabilization_seconds: float = _DEFAULT_DOWN_STABILIZATION_SECONDS


def hpa_spec(settings: RevisionSettings) -> HpaSpec:
    """What Knative asks of the Horizontal Pod Autoscaler; `window` is both stabilization windows. Raises SettingsError."""
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


def recommend(spec: HpaSpec, cpu_percent: Sequence[float], *, silent: int = 0, unready: int = 0) -> int:
    """Pods wanted before stabilization and bounds.

    cpu_percent: of each ready pod that reports. silent: ready pods without a report, taken at the target when scaling in and
    at nothing when scaling out. unready: pods not ready yet, taken at nothing when scaling out.
    """
    current = len(cpu_percent) + silent + unready
    if not cpu_percent:
        return current
    ratio = _ratio(spec, cpu_percent)
    if not silent and not (unready and ratio > 1):
        return current if _near_one(ratio) else math.ceil(ratio * len(cpu_percent))
    assumed = [0.0] * (silent + unready) if ratio > 1 else [float(spec.target_percent)] * silent
    filled = [*cpu_percent, *assumed]
    again = _ratio(spec, filled)
    if _near_one(again) or (ratio > 1) != (again > 1):
        return current
    wanted = math.ceil(again * len(filled))
    return max(wanted, current) if ratio > 1 else min(wanted, current)


def _ratio(spec: HpaSpec, cpu_percent: Sequence[float]) -> float:
    return math.floor(math.fsum(cpu_percent) / len(cpu_percent)) / spec.target_percent


def _near_one(ratio: float) -> bool:
    return 1 - _TOLERANCE <= ratio <= 1 + _TOLERANCE


class HorizontalPodAutoscaler:
    """Recommendations made steady. Not thread-safe. `now` is seconds of one clock that only grows."""

    def __init__(self, spec: HpaSpec) -> None:
        self.spec = spec
        self._recommendations: deque[tuple[float, int]] = deque()
        self._added: deque[tuple[float, int]] = deque()
        """(when, by how many pods) it scaled up lately."""

    def decide(self, now: float, cpu_percent: Sequence[float], *, silent: int = 0, unready: int = 0) -> int:
        """Replicas wanted; arguments as for `recommend`."""
        current = len(cpu_percent) + silent + unready
        wanted = self._stabilized(now, current, recommend(self.spec, cpu_percent, silent=silent, unready=unready))
        wanted = min(wanted, self._rate_limit(now, current))
        wanted = min(max(wanted, self.spec.min_replicas), self.spec.max_replicas)
        if wanted > current:
            self._added.append((now, wanted - current))
        return wanted

    def _stabilized(self, now: float, current: int, recommendation: int) -> int:
        """Scales in to the highest, out to the lowest recommendation of the respective window."""
        self._recommendations.append((now, recommendation))
        longest = max(self.spec.up_stabilization_seconds, self.spec.down_stabilization_seconds)
        while self._recommendations[0][0] <= now - longest and len(self._recommendations) > 1:
            self._recommendations.popleft()
        lowest = min(self._within(now, self.spec.up_stabilization_seconds))
        highest = max(self._within(now, self.spec.down_stabilization_seconds))
        return min(max(current, lowest), highest)

    def _within(self, now: float, seconds: float) -> Iterable[int]:
        newest = len(self._recommendations) - 1
        return (pods for index, (at, pods) in enumerate(self._recommendations) if at > now - seconds or index == newest)

    def _rate_limit(self, now: float, current: int) -> int:
        """Within 15 seconds pods may double, or become four more."""
        while self._added and self._added[0][0] <= now - _UP_PERIOD_SECONDS:
            self._added.popleft()
        start = current - sum(pods for _, pods in self._added)
        return max(start + _UP_PODS, math.ceil(start * _UP_FACTOR), current)
