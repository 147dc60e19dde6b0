"""The autoscaler of one revision: the platform records its load every second and asks for replicas every two seconds.

each second      record(now, concurrency, requests_per_second)
every 2 s, and at once when a request finds the revision at zero
                 decide(now, ready), then reconcile(now, replicas, ready, …), whose answer the platform carries out
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from knative.local.autoscaler.hpa import CpuSeconds, HpaRevisionAutoscaler, cpu_request, cpu_seconds
from knative.local.autoscaler.kpa import Autoscaler, Decision
from knative.local.autoscaler.revision_settings import RevisionSettings
from knative.local.autoscaler.scaler import (
    UNKNOWN,
    Activity,
    Reconciliation,
    RevisionStatus,
    in_proxy_mode,
    next_status,
    scale_target,
)
from knative.webhook.autoscaling_annotations import HPA


def revision_autoscaler(
    settings: RevisionSettings, template: Mapping[str, Any], *, ready: int, now: float, cpu: CpuSeconds = cpu_seconds
) -> "RevisionAutoscaler | HpaRevisionAutoscaler":
    """Makes the autoscaler for the class in `settings`, KPA or HPA. Raises SettingsError.

    template: the Service's `spec.template`, whose CPU request the class HPA needs. ready: number of pods that are ready
    already. cpu: returns a process's CPU seconds, for the class HPA.
    """
    if settings.autoscaler_class == HPA:
        return HpaRevisionAutoscaler(settings, cpu_request(template), now=now, cpu=cpu)
    return RevisionAutoscaler(settings, ready=ready, now=now)


class RevisionAutoscaler:
    """The autoscaler of a revision of the class KPA: it scales by requests, also to zero.

    Not thread-safe. `now` is in seconds of a monotonic clock.
    """

    def __init__(self, settings: RevisionSettings, *, ready: int, now: float) -> None:
        """ready: number of ready pods; 0 for a new revision, which starts with `settings.initial_scale` replicas."""
        self.settings = settings
        self.status = RevisionStatus(Activity.ACTIVATING, now)
        self.desired_scale = UNKNOWN
        burst = settings.decider.target_burst_capacity
        initial_capacity = settings.initial_scale * settings.decider.total_value
        self.excess_burst_capacity = int(burst) if burst in (-1, 0) else int(initial_capacity - burst)
        self.last_decision: Decision | None = None  # None before any data
        self._autoscaler = Autoscaler(
            settings.decider,
            settings.metric_aggregation_algorithm,
            ready=ready,
            now=now,
            pods_report=settings.pods_report,
        )

    @property
    def panicking(self) -> bool:
        return self._autoscaler.state.panic_since is not None

    def record(self, now: float, concurrency: float, requests_per_second: float) -> None:
        """Records the load of the whole revision in this second: requests in its pods and requests that the activator holds."""
        self._autoscaler.record(now, requests_per_second if self.settings.metric == "rps" else concurrency)

    def decide(self, now: float, ready: int) -> Decision | None:
        """Updates `desired_scale` from the recorded load. Returns None, and changes nothing, if the load is unknown."""
        decision = self._autoscaler.decide(now, ready)
        if decision is not None:
            self.last_decision = decision
            self.desired_scale = decision.desired_scale
            self.excess_burst_capacity = decision.excess_burst_capacity
        return decision

    def reconcile(
        self, now: float, *, replicas: int, ready: int, reachable: bool = True, backed_by_activator: bool = True
    ) -> Reconciliation:
        """Returns how many replicas to keep and whether the activator shall be in the path.

        replicas, ready: pods that the platform keeps now, and how many of them are ready. reachable: whether a route leads to
        the revision. backed_by_activator: whether the activator is in the path now.
        """
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
        return Reconciliation(target.want if target.apply else replicas, proxy)
