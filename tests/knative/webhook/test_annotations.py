"""Annotations: the cases of Knative's own validation tests, as facts."""

import pytest

from knative.webhook.autoscaling_annotations import AutoscalerConfig
from knative.webhook.check import validate
from tests.support.knative.manifests import service

GROUP = "autoscaling.knative.dev/"
AT = "spec.template.metadata.annotations."
KPA, HPA = "kpa.autoscaling.knative.dev", "hpa.autoscaling.knative.dev"


def refused(annotations: dict[str, str], config: AutoscalerConfig | None = None) -> dict[str, str]:
    """Short name of the annotation → reason."""
    full = {key if "/" in key else GROUP + key: value for key, value in annotations.items()}
    found = validate(service(annotations=full), config or AutoscalerConfig())
    return {violation.field.removeprefix(AT).removeprefix(GROUP): violation.reason for violation in found}


@pytest.mark.parametrize(
    "annotations",
    [
        {},
        {"class": "some.other.domain"},
        {"min-scale": "0", "max-scale": "0"},
        {"min-scale": "5"},
        {"max-scale": "2"},
        {"min-scale": "2", "max-scale": "5"},
        {"min-scale": "1", "activation-scale": "2", "max-scale": "3"},
        {"metric-aggregation-algorithm": "linear", "class": KPA},
        {"metric-aggregation-algorithm": "", "class": KPA},
        {"metric-aggregation-algorithm": "random", "class": "of-keys"},
        {"panic-threshold-percentage": "210"},
        {"target": "11"},
        {"target-burst-capacity": "0"},
        {"target-burst-capacity": "19870709"},
        {"target-burst-capacity": "-1"},
        {"window": "7s", "class": KPA},
        {"scale-to-zero-pod-retention-period": "0"},
        {"scale-to-zero-pod-retention-period": "21m31s"},
        {"scale-to-zero-pod-retention-period": "500ms"},
        {"scale-down-delay": "0"},
        {"scale-down-delay": "21m31s"},
        {"panic-threshold-percentage": "125", "panic-window-percentage": "75", "min-scale": "5", "window": "1984s"},
        {"metric": "rps"},
        {"metric": "concurrency"},
        {"metric": "cpu", "class": HPA},
        {"metric": "custom", "class": HPA},
        {"metric": "rps", "class": "other"},
        {"initial-scale": "2"},
        {"serving.knative.dev/progress-deadline": "10m"},
        {"queue.sidecar.serving.knative.dev/resource-percentage": "20"},
        {"networking.knative.dev/ingress-class": "x"},
    ],
)
def test_accepted(annotations: dict[str, str]) -> None:
    assert refused(annotations) == {}


@pytest.mark.parametrize(
    ("annotations", "field", "reason"),
    [
        ({"class": "unsupported.knative.dev"}, "class", "unsupported"),
        ({"min-scale": "-1"}, "min-scale", "expected 0 <= -1 <= 2147483647"),
        ({"max-scale": "2147483648"}, "max-scale", "expected 0 <= 2147483648 <= 2147483647"),
        ({"min-scale": "foo"}, "min-scale", "invalid value: foo"),
        ({"min-scale": "1.0"}, "min-scale", "invalid value: 1.0"),
        ({"min-scale": " 1"}, "min-scale", "invalid value"),
        ({"min-scale": "5", "max-scale": "2"}, "max-scale", "max-scale=2 is less than min-scale=5"),
        ({"minScale": "5", "maxScale": "2"}, "max-scale", "max-scale=2 is less than min-scale=5"),
        ({"minScale": "x"}, "minScale", "invalid value: x"),
        ({"min-scale": "3", "activation-scale": "2"}, "activation-scale", "greater than activation-scale=2"),
        ({"max-scale": "1", "activation-scale": "2"}, "activation-scale", "less than activation-scale=2"),
        ({"activation-scale": "1"}, "activation-scale", "must be greater than 1"),
        ({"activation-scale": "many"}, "activation-scale", "invalid value"),
        ({"metric-aggregation-algorithm": "random", "class": KPA}, "metric-aggregation-algorithm", "random"),
        ({"panic-window-percentage": "202"}, "panic-window-percentage", "expected 1 <= 202 <= 100"),
        ({"panic-window-percentage": "fifty"}, "panic-window-percentage", "invalid value: fifty"),
        ({"panic-threshold-percentage": "109"}, "panic-threshold-percentage", "expected 110 <= 109 <= 1000"),
        ({"target": "-11"}, "target", "target -11 should be at least 0.01"),
        ({"target": "100}"}, "target", "invalid value: 100}"),
        ({"target-burst-capacity": "-11"}, "target-burst-capacity", "invalid value: -11"),
        ({"target-utilization-percentage": "101"}, "target-utilization-percentage", "expected 1 <= 101 <= 100"),
        ({"window": "jerry"}, "window", "invalid value: jerry"),
        ({"window": "60"}, "window", "invalid value: 60"),
        ({"window": "1s"}, "window", "expected 6s <= 1s <= 1h0m0s"),
        ({"window": "365h"}, "window", "expected 6s <= 365h <= 1h0m0s"),
        ({"window": "1m9s82ms"}, "window", "second precision"),
        ({"scale-to-zero-pod-retention-period": "311m"}, "scale-to-zero-pod-retention-period", "expected 0s <= 311m"),
        ({"scale-to-zero-pod-retention-period": "-42s"}, "scale-to-zero-pod-retention-period", "expected 0s <= -42s"),
        ({"scale-down-delay": "42.5s"}, "scale-down-delay", "second precision"),
        ({"metric": "cpu"}, "metric", "invalid value: cpu"),
        ({"metric": "", "class": HPA}, "metric", "invalid value: "),
        ({"initial-scale": "0"}, "initial-scale", "0 not allowed by cluster"),
        ({"initial-scale": "-1"}, "initial-scale", "must be greater than 0"),
        ({"initial-scale": "x"}, "initial-scale", "invalid value: x"),
        ({"serving.knative.dev/progress-deadline": "1.5s"}, "serving.knative.dev/progress-deadline", "second precision"),
        ({"serving.knative.dev/progress-deadline": "-1s"}, "serving.knative.dev/progress-deadline", "must be positive"),
        ({"serving.knative.dev/progress-deadline": "soon"}, "serving.knative.dev/progress-deadline", "invalid value"),
    ],
)
def test_refused(annotations: dict[str, str], field: str, reason: str) -> None:
    found = refused(annotations)
    assert reason in found[field]
    assert len(found) == (2 if "less than min-scale" in reason else 1)


def test_all_violations_are_reported_at_once() -> None:
    assert set(
        refused(
            {"panic-threshold-percentage": "fifty", "panic-window-percentage": "-11", "min-scale": "-4", "max-scale": "never"}
        )
    ) == {"panic-threshold-percentage", "panic-window-percentage", "min-scale", "max-scale"}


def test_the_clusters_configuration_counts() -> None:
    limited = AutoscalerConfig(max_scale_limit=10)
    assert "expected 1 <= 11 <= 10" in refused({"max-scale": "11"}, limited)["max-scale"]
    assert "unlimited" in refused({"max-scale": "0"}, limited)["max-scale"]
    assert refused({"max-scale": "9"}, limited) == {}
    assert refused({"initial-scale": "0"}, AutoscalerConfig(allow_zero_initial_scale=True)) == {}
    assert refused({"metric": "cpu"}, AutoscalerConfig(pod_autoscaler_class=HPA)) == {}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("networking.knative.dev/bogus", "x"),
        ("queue.sidecar.serving.knative.dev/resource-percentage", "200"),
        ("queue.sidecar.serving.knative.dev/resource-percentage", "much"),
        ("queue.sidecar.serving.knative.dev/memory-resource-limit", "1 GB"),
    ],
)
def test_other_groups(key: str, value: str) -> None:
    (violation,) = validate(service(annotations={key: value}))
    assert key in str(violation)


@pytest.mark.parametrize(("value", "reason"), [("fast", "invalid"), ("1ms", "precision"), ("-5s", "positive")])
def test_rollout_duration_of_the_service(value: str, reason: str) -> None:
    annotated = {"name": "v", "annotations": {"serving.knative.dev/rollout-duration": value}}
    (violation,) = validate(service() | {"metadata": annotated})
    assert reason in violation.reason
    assert violation.field == "metadata.annotations.serving.knative.dev/rollout-duration"
