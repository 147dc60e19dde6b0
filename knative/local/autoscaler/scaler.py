"""Turns the autoscaler's desired scale into replicas, as Knative does for the class KPA (pkg/reconciler/autoscaling/kpa).

It applies min-scale, max-scale and initial-scale, and scales to zero in two steps: a revision is first marked inactive (its
pods stay, the activator takes the traffic over). Its pods are removed when the activator has been in the path for the grace
period and the last pod was kept for its retention period.
"""

from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Final

from knative.local.autoscaler.revision_settings import RevisionSettings

UNKNOWN: Final = -1  # desired scale while the autoscaler has no data
_ACTIVATION_BUFFER_SECONDS: Final = 30  # added to the progress deadline, so that the pods' failure is known before they go


class Activity(StrEnum):
    """Whether a revision has the pods that it needs: the condition Active of Knative's PodAutoscaler (Unknown, True, False)."""

    ACTIVATING = "activating"
    ACTIVE = "active"
    INACTIVE = "inactive"


@dataclass(frozen=True, slots=True)
class RevisionStatus:
    """A revision's state, which one reconciliation leaves for the next."""

    activity: Activity
    since: float  # when the activity last changed
    initialized: bool = False  # as many pods as the initial scale have been ready once; it is ignored from then on
    proxied_since: float | None = None  # start of the time in which the activator gets every request; None: pods get them


@dataclass(frozen=True, slots=True)
class ScaleTarget:
    """The answer of `scale_target`: how many replicas a revision shall have, and whether that is to be applied now."""

    want: int  # pods; 0 without `apply` marks the revision inactive and leaves its pods; -1: unknown
    apply: bool  # whether replicas shall be set to `want` now


@dataclass(frozen=True, slots=True)
class Reconciliation:
    """The replicas that the platform shall keep, and whether the activator shall be in the path."""

    replicas: int
    proxy: bool  # whether the activator shall be in the path


def scale_target(
    settings: RevisionSettings,
    status: RevisionStatus,
    desired: int,
    now: float,
    *,
    reachable: bool = True,
    backed_by_activator: bool = True,
) -> ScaleTarget:
    """How many replicas a revision shall have.

    desired: the autoscaler's last answer, or UNKNOWN. now: seconds. reachable: whether a route leads to the revision.
    backed_by_activator: whether the activator answers at the revision's address; probed before the last pod is removed.
    """
    if desired < 0 and status.activity is not Activity.ACTIVATING:
        return ScaleTarget(desired, apply=False)
    least = settings.min_scale if reachable else 0
    if reachable and not status.initialized and settings.initial_scale > 1:
        least = max(least, settings.initial_scale)
    want = least if desired < least else min(desired, settings.max_scale or desired)
    if want != 0:
        return ScaleTarget(want, apply=True)
    if not settings.enable_scale_to_zero:
        return ScaleTarget(1, apply=True)
    in_activity = now - status.since
    if status.activity is Activity.ACTIVATING:
        failed = in_activity > settings.progress_deadline_seconds + _ACTIVATION_BUFFER_SECONDS
        return ScaleTarget(0, apply=True) if failed else ScaleTarget(UNKNOWN, apply=False)
    if status.activity is Activity.ACTIVE:
        # A revision stays active for at least a stable window, then with one pod at most.
        stays = in_activity < settings.decider.stable_window_seconds
        return ScaleTarget(1, apply=True) if stays else ScaleTarget(0, apply=False)
    if settings.pods_report and not backed_by_activator:
        return ScaleTarget(0, apply=False)
    retention = settings.scale_to_zero_pod_retention_period_seconds if reachable else 0.0
    proxied = 0.0 if status.proxied_since is None else now - status.proxied_since
    over = max(in_activity, proxied) >= settings.scale_to_zero_grace_period_seconds
    return ScaleTarget(0, apply=over and in_activity >= retention)


def next_status(
    settings: RevisionSettings, status: RevisionStatus, want: int, ready: int, now: float, *, reachable: bool = True
) -> RevisionStatus:
    """The status after `want` replicas were decided while `ready` pods are ready; `status` itself if nothing changes."""
    # The revision counts as active when this many pods are ready.
    threshold = max(settings.min_scale if reachable else 0, 1 if status.initialized else settings.initial_scale)
    activity = status.activity
    if want == 0 or threshold == 0:
        activity = Activity.INACTIVE
    elif want > 0 or activity is not Activity.INACTIVE:
        activity = Activity.ACTIVE if ready >= threshold else Activity.ACTIVATING
    initialized = status.initialized or ready >= threshold
    if (activity, initialized) == (status.activity, status.initialized):
        return status
    since = status.since if activity is status.activity else now
    return replace(status, activity=activity, since=since, initialized=initialized)


def in_proxy_mode(want: int, excess_burst_capacity: int) -> bool:
    """Whether the activator shall be in the path: at zero, and if the ready pods cannot take a burst of the target size."""
    return not (want > 0 and excess_burst_capacity >= 0)
