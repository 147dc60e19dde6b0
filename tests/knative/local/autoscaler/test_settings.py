"""What a template's annotations mean: Knative's decider, target and metric resolution, as facts."""

from typing import Any

import pytest

from knative.local.autoscaler.kpa import DeciderSpec
from knative.local.autoscaler.revision_settings import RevisionSettings, SettingsError, revision_settings
from knative.webhook.autoscaling_annotations import AutoscalerConfig


def settings(container_concurrency: int = 0, config: AutoscalerConfig | None = None, **annotations: Any) -> RevisionSettings:
    keys = {f"autoscaling.knative.dev/{name.replace('_', '-')}": value for name, value in annotations.items()}
    template: dict[str, Any] = {"metadata": {"annotations": keys}, "spec": {"containerConcurrency": container_concurrency}}
    return revision_settings(template, config or AutoscalerConfig())


def test_defaults_equal_knatives() -> None:
    got = revision_settings({})
    assert got.decider == DeciderSpec(
        target_value=70,
        total_value=100,
        target_burst_capacity=211,
        max_scale_up_rate=1000,
        max_scale_down_rate=2,
        panic_threshold=2,
        stable_window_seconds=60,
        panic_window_seconds=6,
    )
    assert (got.autoscaler_class, got.metric) == ("kpa.autoscaling.knative.dev", "concurrency")
    assert (got.min_scale, got.max_scale, got.initial_scale) == (0, 0, 1)
    assert (got.scale_to_zero_grace_period_seconds, got.scale_to_zero_pod_retention_period_seconds) == (30, 0)


@pytest.mark.parametrize(
    ("container_concurrency", "annotations", "target", "total"),
    [
        (0, {}, 70, 100),
        (10, {}, 7, 10),
        (1, {}, 0.7, 1),
        (0, {"target": "2"}, 1.4, 2),
        (8, {"target": "2"}, 1.4, 2),
        (8, {"target": "80"}, 5.6, 8),
        (8, {"target": "2", "target_utilization_percentage": "100"}, 2, 2),
        (0, {"target": "0.01", "target_utilization_percentage": "1"}, 0.01, 0.01),
        (8, {"metric": "rps"}, 140, 200),
        (8, {"metric": "rps", "target": "50"}, 35, 50),
    ],
)
def test_target(container_concurrency: int, annotations: dict[str, Any], target: float, total: float) -> None:
    decider = settings(container_concurrency, **annotations).decider
    assert (decider.target_value, decider.total_value) == pytest.approx((target, total))


@pytest.mark.parametrize(
    ("window", "percentage", "panic"), [("60s", None, 6), ("10s", None, 1), ("6s", None, 1), ("25s", None, 3), ("1m", "50", 30)]
)
def test_panic_window_is_a_share_in_whole_seconds(window: str, percentage: str | None, panic: float) -> None:
    annotations: dict[str, Any] = {"window": window} | ({"panic_window_percentage": percentage} if percentage else {})
    assert settings(**annotations).decider.panic_window_seconds == panic


def test_every_annotation_counts() -> None:
    got = settings(
        min_scale="2",
        max_scale="+5",
        initial_scale="3",
        activation_scale="4",
        scale_down_delay="1m30s",
        scale_to_zero_pod_retention_period="1h",
        target_burst_capacity="-1",
        panic_threshold_percentage="150",
        metric_aggregation_algorithm="weighted-exponential",
    )
    assert (got.min_scale, got.max_scale, got.initial_scale, got.decider.activation_scale) == (2, 5, 3, 4)
    assert (got.decider.scale_down_delay_seconds, got.scale_to_zero_pod_retention_period_seconds) == (90, 3600)
    assert (got.decider.target_burst_capacity, got.decider.panic_threshold) == (-1, 1.5)
    assert got.metric_aggregation_algorithm == "weighted-exponential"
    assert not got.pods_report


def test_older_spellings_count_if_the_newer_is_absent() -> None:
    annotations = {"autoscaling.knative.dev/minScale": "3", "autoscaling.knative.dev/max-scale": "7"}
    got = revision_settings({"metadata": {"annotations": annotations | {"autoscaling.knative.dev/maxScale": "9"}}})
    assert (got.min_scale, got.max_scale) == (3, 7)


def test_initial_scale_zero_must_be_allowed_by_the_cluster() -> None:
    assert settings(initial_scale="0").initial_scale == 1
    assert settings(initial_scale="0", config=AutoscalerConfig(allow_zero_initial_scale=True)).initial_scale == 0


def test_the_hpa_class_scales_on_cpu_unless_told_otherwise() -> None:
    hpa: dict[str, Any] = {"class": "hpa.autoscaling.knative.dev"}
    assert settings(**hpa).metric == "cpu"


@pytest.mark.parametrize(("name", "value"), [("min_scale", "two"), ("window", "10"), ("target", "NaN"), ("max_scale", "1_0")])
def test_an_unreadable_annotation_is_named(name: str, value: str) -> None:
    with pytest.raises(SettingsError, match=name.replace("_", "-")):
        settings(**dict[str, Any]({name: value}))
