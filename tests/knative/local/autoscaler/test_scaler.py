"""From desired scale to replicas: the cases of Knative's scaler and reconciler tests, as facts."""

from dataclasses import replace

import pytest

from knative.local.autoscaler.kpa import DeciderSpec
from knative.local.autoscaler.revision_autoscaler import RevisionAutoscaler
from knative.local.autoscaler.revision_settings import RevisionSettings, revision_settings
from knative.local.autoscaler.scaler import (
    UNKNOWN,
    Activity,
    RevisionStatus,
    ScaleTarget,
    in_proxy_mode,
    next_status,
    scale_target,
)

GRACE, WINDOW, DEADLINE = 60.0, 300.0, 120.0
NOW = 10_000.0
ACTIVE, INACTIVE, ACTIVATING = Activity.ACTIVE, Activity.INACTIVE, Activity.ACTIVATING


def settings(**changes: float) -> RevisionSettings:
    base = replace(
        revision_settings({}),
        decider=DeciderSpec(target_value=1, total_value=1, stable_window_seconds=changes.pop("window", WINDOW)),
        scale_to_zero_grace_period_seconds=GRACE,
        progress_deadline_seconds=DEADLINE,
    )
    return replace(base, **changes)  # type: ignore[arg-type]


def status(activity: Activity, seconds: float, *, initialized: bool = True, proxied: float | None = None) -> RevisionStatus:
    """An activity that began so many seconds ago."""
    return RevisionStatus(activity, NOW - seconds, initialized, None if proxied is None else NOW - proxied)


LONG_ACTIVE = status(ACTIVE, WINDOW)


@pytest.mark.parametrize(
    ("configured", "before", "desired", "want", "apply"),
    [
        pytest.param({}, status(ACTIVE, WINDOW - 1), 0, 1, True, id="active for less than the window: one pod stays"),
        pytest.param({"window": 30}, status(ACTIVE, 29), 0, 1, True, id="the same with the revision's own window"),
        pytest.param({}, LONG_ACTIVE, 0, 0, False, id="active for the window: inactive first"),
        pytest.param({}, status(ACTIVE, WINDOW, proxied=5), 0, 0, False, id="the same, already in proxy mode"),
        pytest.param({}, status(INACTIVE, GRACE), 0, 0, True, id="after the grace period"),
        pytest.param({}, status(INACTIVE, GRACE - 1), 0, 0, False, id="just before the grace period"),
        pytest.param({}, status(INACTIVE, GRACE - 1, proxied=GRACE - 1), 0, 0, False, id="proxied not long enough"),
        pytest.param({}, status(INACTIVE, GRACE - 1, proxied=GRACE), 0, 0, True, id="proxied for the grace period"),
        pytest.param(
            {"scale_to_zero_pod_retention_period_seconds": 2 * GRACE},
            status(INACTIVE, GRACE),
            *(0, 0, False),
            id="the last pod is retained",
        ),
        pytest.param(
            {"scale_to_zero_pod_retention_period_seconds": GRACE},
            status(INACTIVE, GRACE),
            *(0, 0, True),
            id="retained long enough",
        ),
        pytest.param(
            {"scale_to_zero_pod_retention_period_seconds": 42},
            status(INACTIVE, GRACE - 1, proxied=GRACE),
            *(0, 0, True),
            id="retained and proxied long enough",
        ),
        pytest.param({}, status(ACTIVATING, (DEADLINE + 30) / 2), 0, -1, False, id="still activating"),
        pytest.param({}, status(ACTIVATING, DEADLINE + 31), 0, 0, True, id="activation has failed"),
        pytest.param({"min_scale": 2}, status(INACTIVE, GRACE), 0, 2, True, id="min-scale"),
        pytest.param({}, LONG_ACTIVE, 10, 10, True, id="scales up"),
        pytest.param({"max_scale": 8}, LONG_ACTIVE, 10, 8, True, id="max-scale"),
        pytest.param({}, status(INACTIVE, GRACE / 2), 10, 10, True, id="wakes an inactive revision"),
        pytest.param({}, status(INACTIVE, 0), -1, -1, False, id="no data, inactive"),
        pytest.param({}, status(ACTIVE, 0), -1, -1, False, id="no data, active"),
        pytest.param({}, status(ACTIVATING, 1), -1, -1, False, id="no data, activating"),
        pytest.param({"min_scale": 2}, status(ACTIVATING, 1), -1, 2, True, id="no data, activating, min-scale"),
        pytest.param({"initial_scale": 2}, status(ACTIVATING, 0, initialized=False), 1, 2, True, id="initial scale"),
        pytest.param(
            {"initial_scale": 5, "max_scale": 3},
            status(ACTIVATING, 0, initialized=False),
            *(1, 5, True),
            id="initial scale beats max-scale",
        ),
        pytest.param({"initial_scale": 2}, status(ACTIVE, 120), 0, 1, True, id="initial scale was reached"),
        pytest.param({"enable_scale_to_zero": False}, status(INACTIVE, GRACE), 0, 1, True, id="never to zero"),
        pytest.param({"enable_scale_to_zero": False}, LONG_ACTIVE, -1, -1, False, id="never to zero, no data"),
    ],
)
def test_scale_target(configured: dict[str, float], before: RevisionStatus, desired: int, want: int, apply: bool) -> None:
    assert scale_target(settings(**configured), before, desired, NOW) == ScaleTarget(want, apply)


@pytest.mark.parametrize(
    ("configured", "before", "expected"),
    [
        ({"min_scale": 2}, status(INACTIVE, GRACE), ScaleTarget(0, True)),
        ({"scale_to_zero_pod_retention_period_seconds": 10 * GRACE}, status(INACTIVE, GRACE), ScaleTarget(0, True)),
        ({"scale_to_zero_pod_retention_period_seconds": 10 * GRACE}, status(INACTIVE, GRACE - 1), ScaleTarget(0, False)),
        ({"initial_scale": 2}, status(ACTIVE, 120, initialized=False), ScaleTarget(1, True)),
    ],
)
def test_an_unreachable_revision_has_no_floor(
    configured: dict[str, float], before: RevisionStatus, expected: ScaleTarget
) -> None:
    assert scale_target(settings(**configured), before, 0, NOW, reachable=False) == expected


def test_the_last_pod_waits_for_the_activator() -> None:
    before = status(INACTIVE, GRACE)
    assert scale_target(settings(), before, 0, NOW, backed_by_activator=False) == ScaleTarget(0, False)
    always = replace(settings(), decider=replace(settings().decider, target_burst_capacity=-1))
    assert scale_target(always, before, 0, NOW, backed_by_activator=False) == ScaleTarget(0, True), "it always is then"


@pytest.mark.parametrize(
    ("want", "ready", "min_scale", "before", "after"),
    [
        (0, 3, 0, ACTIVE, INACTIVE),
        (0, 0, 2, ACTIVATING, INACTIVE),
        (3, 1, 2, INACTIVE, ACTIVATING),
        (3, 2, 2, INACTIVE, ACTIVE),
        (-1, 0, 0, INACTIVE, INACTIVE),
        (-1, 0, 0, ACTIVATING, ACTIVATING),
        (-1, 0, 0, ACTIVE, ACTIVATING),
        (-1, 1, 0, INACTIVE, INACTIVE),
        (-1, 1, 1, ACTIVATING, ACTIVE),
        (-1, 1, 1, ACTIVE, ACTIVE),
    ],
)
def test_activity(want: int, ready: int, min_scale: int, before: Activity, after: Activity) -> None:
    got = next_status(settings(min_scale=min_scale), status(before, 5), want, ready, NOW)
    assert got.activity is after
    assert got.since == (NOW - 5 if before is after else NOW)


def test_initial_scale_zero_starts_inactive() -> None:
    got = next_status(settings(initial_scale=0), status(ACTIVATING, 0, initialized=False), UNKNOWN, 0, NOW)
    assert (got.activity, got.initialized) == (INACTIVE, True)


def test_the_initial_scale_must_be_ready_once() -> None:
    configured, fresh = settings(initial_scale=3), status(ACTIVATING, 0, initialized=False)
    waiting = next_status(configured, fresh, 3, 2, NOW)
    assert (waiting.activity, waiting.initialized) == (ACTIVATING, False)
    ready = next_status(configured, waiting, 3, 3, NOW)
    assert (ready.activity, ready.initialized) == (ACTIVE, True)
    assert next_status(configured, ready, 1, 1, NOW).activity is ACTIVE


@pytest.mark.parametrize(
    ("want", "excess", "proxy"), [(0, 10, True), (1, 0, False), (1, -1, True), (-1, 10, True), (3, 5, False)]
)
def test_the_activator_is_in_the_path_at_zero_and_below_the_target_burst(want: int, excess: int, proxy: bool) -> None:
    assert in_proxy_mode(want, excess) is proxy


class Life:
    """A revision under simulated load: pods are ready a second after they are asked for."""

    def __init__(self, container_concurrency: int, **annotations: str) -> None:
        keys = {f"autoscaling.knative.dev/{name.replace('_', '-')}": value for name, value in annotations.items()}
        template = {"metadata": {"annotations": keys}, "spec": {"containerConcurrency": container_concurrency}}
        self.autoscaler = RevisionAutoscaler(revision_settings(template), ready=0, now=0.0)
        self.replicas = self.autoscaler.settings.initial_scale
        self.ready = 0
        self.seconds = 0
        self.history: list[int] = []

    def run(self, seconds: int, load: float) -> None:
        for _ in range(seconds):
            now = float(self.seconds)
            if load or self.ready:
                self.autoscaler.record(now, load, load)
            if self.seconds % 2 == 0:
                self.autoscaler.decide(now, self.ready)
                answer = self.autoscaler.reconcile(now, replicas=self.replicas, ready=self.ready)
                self.replicas = answer.replicas
            self.ready = min(self.replicas, self.ready + 1) if self.replicas else 0
            self.history.append(self.replicas)
            self.seconds += 1


def test_a_life_from_first_request_to_zero() -> None:
    life = Life(8, target="2", window="10s", max_scale="6")
    life.run(10, load=1)
    assert life.replicas == 1
    life.run(30, load=20)
    assert life.replicas == 6, "max-scale"
    assert life.autoscaler.panicking
    life.run(60, load=0)
    assert life.autoscaler.status.activity is INACTIVE
    assert life.replicas == 0
    down = [pods for pods in life.history[40:] if pods < 6]
    assert down == sorted(down, reverse=True), "no flapping"
    assert 12 <= life.history[40:].index(0) <= 20, "the window; the activator was in the path long enough before"
    life.run(4, load=1)
    assert life.replicas == 1


def test_to_zero_the_activator_must_have_been_in_the_path_for_the_grace_period() -> None:
    life = Life(8, target="2", window="10s", target_burst_capacity="0")
    life.run(20, load=1)
    assert life.autoscaler.status.proxied_since is None
    life.run(60, load=0)
    assert 40 <= life.history[20:].index(0) <= 46, "window and grace period"


def test_the_metric_rps_scales_by_requests_per_second() -> None:
    life = Life(8, metric="rps", target="10", window="10s")
    life.run(12, load=50)
    assert life.replicas == 8, "50 / (10 · 0.7), rounded up"
