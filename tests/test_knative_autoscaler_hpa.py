"""The HPA class on CPU, after the documented algorithm."""

import pytest

from knative.local.hpa import HorizontalPodAutoscaler, HpaSpec, hpa_spec, recommend
from knative.local.revision_settings import SettingsError, revision_settings

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
