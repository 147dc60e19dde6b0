"""One revision's scaling, whole: what the platform feeds each second, asks every two, and is told.

each second      record(now, concurrency, requests_per_second)
every 2 s, and at once when a request finds the revision at zero
                 decide(now, ready), then reconcile(now, replicas, ready, …) and set what it says
"""

from dataclasses import dataclass, replace

from knative.local.autoscaler.kpa import Autoscaler, Decision
from knative.local.autoscaler.revision_settings import RevisionSettings
from knative.local.autoscaler.scaler import (
    UNKNOWN,
    Activity,
    RevisionStatus,
    in_proxy_mode,
    next_status,
    scale_target,
)


@dataclass(frozen=True, slots=True)
class Reconciliation:
    """What the platform shall do now."""

    replicas: int
    """How many pods there shall be."""
    proxy: bool
    """Whether the activator shall stand in the path."""
    activity: Activity
    check_after_seconds: float | None
    """When to reconcile again at the latest; None: with the next decision."""


class RevisionAutoscaler:
    """The KPA class. Not thread-safe. `now` is seconds of one clock that only grows."""

    def __init__(self, settings: RevisionSettings, *, ready: int, now: float) -> None:
        """ready: pods ready already, 0 for a new revision; such a one starts with `settings.initial_scale` replicas."""
        self.settings = settings
        self.status = RevisionStatus(Activity.ACTIVATING, now)
        self.desired_scale = UNKNOWN
        self.excess_burst_capacity = _first_excess_burst_capacity(settings)
        self.last_decision: Decision | None = None
        """Averages and panic as last seen; None before any data."""
        self._autoscaler = Autoscaler(
            settings.decider,
            settings.metric_aggregation_algorithm,
            ready=ready,
            now=now,
            pods_report=settings.pods_report,
        )

    @property
    def panicking(self) -> bool:
        return self._autoscaler.state.panicking

    def record(self, now: float, concurrency: float, requests_per_second: float) -> None:
        """What the whole revision had in this second: in pods and, beyond those, waiting in the activator."""
        self._autoscaler.record(now, requests_per_second if self.settings.metric == "rps" else concurrency)

    def decide(self, now: float, ready: int) -> Decision | None:
        """None, and everything stays as it was, where nothing is known of the metric."""
        decision = self._autoscaler.decide(now, ready)
        if decision is not None:
            self.last_decision = decision
            self.desired_scale = decision.desired_scale
            self.excess_burst_capacity = decision.excess_burst_capacity
        return decision

    def reconcile(
        self, now: float, *, replicas: int, ready: int, reachable: bool = True, backed_by_activator: bool = True
    ) -> Reconciliation:
        """replicas: pods there are to be now. backed_by_activator: what the last `proxy` asked for is in effect."""
        if reachable != self._autoscaler.spec.reachable:
            self._autoscaler.spec = replace(self._autoscaler.spec, reachable=reachable)
        target = scale_target(
            self.settings,
            self.status,
            self.desired_scale,
            now,
            reachable=reachable,
            backed_by_activator=backed_by_activator,
        )
        proxy = in_proxy_mode(target.want, self.excess_burst_capacity)
        status = next_status(self.settings, self.status, target.want, ready, now, reachable=reachable)
        since = (self.status.proxied_since if self.status.proxied_since is not None else now) if proxy else None
        self.status = status if since == status.proxied_since else replace(status, proxied_since=since)
        return Reconciliation(
            replicas=target.want if target.apply else replicas,
            proxy=proxy,
            activity=status.activity,
            check_after_seconds=target.check_after_seconds,
        )


def _first_excess_burst_capacity(settings: RevisionSettings) -> int:
    """Before any decision: what the initial scale leaves beyond the target burst."""
    burst = settings.decider.target_burst_capacity
    if burst in (-1, 0):
        return int(burst)
    return int(settings.initial_scale * settings.decider.total_value - burst)
