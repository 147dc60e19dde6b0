"""The HPA class on CPU, after the documented algorithm."""

import select
import subprocess
import sys
import time

import pytest

from knative.local.autoscaler.hpa import (
    HorizontalPodAutoscaler,
    HpaRevisionAutoscaler,
    HpaSpec,
    cpu_request,
    cpu_seconds,
    hpa_spec,
    recommend,
)
from knative.local.autoscaler.revision_autoscaler import RevisionAutoscaler, revision_autoscaler
from knative.local.autoscaler.revision_settings import SettingsError, revision_settings

SPEC = HpaSpec(target_percent=50, min_replicas=1, max_replicas=10)


@pytest.mark.parametrize(
    ("cpu_percent", "silent", "unready", "pods"),
    [
        pytest.param([100, 100], 0, 0, 4, id="twice the target doubles"),
        pytest.param([25, 25], 0, 0, 1, id="half the target halves"),
        pytest.param([60], 0, 0, 2, id="rounded up"),
        pytest.param([55, 55], 0, 0, 2, id="within tolerance above"),
        pytest.param([45, 45], 0, 0, 2, id="within tolerance below"),
        pytest.param([0, 0], 0, 0, 0, id="idle"),
        pytest.param([], 1, 2, 3, id="nobody reports"),
        pytest.param([100, 100], 2, 0, 4, id="the silent count as idle when scaling out"),
        pytest.param([25, 25], 2, 0, 3, id="the silent count as at the target when scaling in"),
        pytest.param([100, 100], 0, 1, 4, id="pods still starting damp scaling out"),
        pytest.param([100, 100], 0, 4, 6, id="pods still starting can bring it to a stop"),
        pytest.param([25, 25], 0, 1, 1, id="pods still starting do not hinder scaling in"),
    ],
)
def test_recommendation(cpu_percent: list[float], silent: int, unready: int, pods: int) -> None:
    assert recommend(SPEC, cpu_percent, silent=silent, unready=unready) == pods


def test_scaling_in_waits_for_the_highest_of_five_minutes() -> None:
    hpa = HorizontalPodAutoscaler(SPEC)
    assert hpa.decide(0, [100] * 4) == 8
    assert [hpa.decide(now, [5] * 8) for now in range(15, 300, 15)] == [8] * 19
    assert hpa.decide(300, [5] * 8) == 1


def test_scaling_out_is_at_most_double_or_four_more_in_fifteen_seconds() -> None:
    hpa = HorizontalPodAutoscaler(HpaSpec(target_percent=50, min_replicas=1, max_replicas=100))
    assert hpa.decide(0, [1000]) == 5
    assert hpa.decide(5, [1000] * 5) == 5, "the four were spent"
    assert hpa.decide(15, [1000] * 5) == 10
    assert hpa.decide(30, [1000] * 10) == 20


def test_bounds() -> None:
    hpa = HorizontalPodAutoscaler(HpaSpec(target_percent=50, min_replicas=2, max_replicas=3, down_stabilization_seconds=0))
    assert hpa.decide(0, [400, 400]) == 3
    assert hpa.decide(15, [0, 0, 0]) == 2


def annotated(**annotations: str) -> HpaSpec:
    keys = {f"autoscaling.knative.dev/{name.replace('_', '-')}": value for name, value in annotations.items()}
    keys["autoscaling.knative.dev/class"] = "hpa.autoscaling.knative.dev"
    return hpa_spec(revision_settings({"metadata": {"annotations": keys}}))


def test_annotations() -> None:
    assert annotated() == HpaSpec(80, 1, 2**31 - 1)
    spec = annotated(target="49.5", min_scale="2", max_scale="5", window="30s")
    assert spec == HpaSpec(50, 2, 5, up_stabilization_seconds=30, down_stabilization_seconds=30)
    with pytest.raises(SettingsError, match="memory"):
        annotated(metric="memory")


TEMPLATE = {
    "metadata": {
        "annotations": {
            "autoscaling.knative.dev/class": "hpa.autoscaling.knative.dev",
            "autoscaling.knative.dev/target": "50",
            "autoscaling.knative.dev/max-scale": "3",
        }
    },
    "spec": {"containers": [{"image": "registry.example/app", "resources": {"requests": {"cpu": "500m"}}}]},
}


def test_a_busy_process_adds_pods() -> None:
    autoscaler = revision_autoscaler(revision_settings(TEMPLATE), TEMPLATE, ready=0, now=0.0)
    assert isinstance(autoscaler, HpaRevisionAutoscaler)
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    idle = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        began = time.monotonic()
        while (cpu_seconds(busy.pid) or 0) < 0.3 and time.monotonic() < began + 120:
            autoscaler.observe(time.monotonic() - began, [(busy.pid, True), (None, False)])
            select.select([], [], [], 0.02)
        now = time.monotonic() - began
        autoscaler.observe(now, [(busy.pid, True), (None, False)])
        (percent,) = autoscaler.cpu_percent
        assert percent > 0, "of half a core; how much depends on what else runs"
        autoscaler.cpu_percent = [max(percent, 200.0)]
        autoscaler.decide(14.0, 1)
        assert autoscaler.desired_scale == 1, "not before its period"
        autoscaler.decide(15.0, 1)
        assert autoscaler.desired_scale == 3
        answer = autoscaler.reconcile(15.0, replicas=2, ready=1)
        assert (answer.replicas, answer.proxy) == (3, False)
        assert autoscaler.reconcile(16.0, replicas=3, ready=0).proxy
        for second in (20.0, 21.0):
            autoscaler.observe(second, [(idle.pid, True)])
        assert autoscaler.cpu_percent == [pytest.approx(0, abs=10)]
    finally:
        for process in (busy, idle):
            process.kill()
            process.communicate()
    assert cpu_seconds(busy.pid) is None


def test_the_class_decides_which_autoscaler() -> None:
    assert isinstance(revision_autoscaler(revision_settings({}), {}, ready=0, now=0.0), RevisionAutoscaler)


def test_the_hpa_class_needs_a_cpu_request() -> None:
    assert cpu_request(TEMPLATE) == 0.5
    with pytest.raises(SettingsError, match=r"containers\[0\].resources.requests.cpu"):
        cpu_request({"spec": {"containers": [{"image": "x"}]}})
