"""The annotations that Knative's autoscaler reads, and its defaults (config-autoscaler).

Some keys have an older spelling, which Knative reads if the newer one is absent.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

GROUP: Final = "autoscaling.knative.dev"
KPA: Final = f"kpa.{GROUP}"
HPA: Final = f"hpa.{GROUP}"


@dataclass(frozen=True, slots=True)
class Annotation:
    """One annotation in all spellings of its key."""

    keys: tuple[str, ...]  # the preferred one first

    @property
    def key(self) -> str:
        return self.keys[0]

    def get(self, annotations: Mapping[str, str]) -> tuple[str, str | None]:
        """Returns (key in use, value), or (preferred key, None) if the annotation is absent."""
        for key in self.keys:
            if key in annotations:
                return key, annotations[key]
        return self.key, None

    def value(self, annotations: Mapping[str, str]) -> str | None:
        return self.get(annotations)[1]


def _annotation(*names: str) -> Annotation:
    return Annotation(tuple(f"{GROUP}/{name}" for name in names))


CLASS: Final = _annotation("class")
METRIC: Final = _annotation("metric")
TARGET: Final = _annotation("target")
TARGET_UTILIZATION_PERCENTAGE: Final = _annotation("target-utilization-percentage", "targetUtilizationPercentage")
TARGET_BURST_CAPACITY: Final = _annotation("target-burst-capacity", "targetBurstCapacity")
WINDOW: Final = _annotation("window")
METRIC_AGGREGATION_ALGORITHM: Final = _annotation("metric-aggregation-algorithm", "metricAggregationAlgorithm")
PANIC_WINDOW_PERCENTAGE: Final = _annotation("panic-window-percentage", "panicWindowPercentage")
PANIC_THRESHOLD_PERCENTAGE: Final = _annotation("panic-threshold-percentage", "panicThresholdPercentage")
MIN_SCALE: Final = _annotation("min-scale", "minScale")
MAX_SCALE: Final = _annotation("max-scale", "maxScale")
INITIAL_SCALE: Final = _annotation("initial-scale", "initialScale")
ACTIVATION_SCALE: Final = _annotation("activation-scale")
SCALE_DOWN_DELAY: Final = _annotation("scale-down-delay", "scaleDownDelay")
SCALE_TO_ZERO_POD_RETENTION_PERIOD: Final = _annotation("scale-to-zero-pod-retention-period", "scaleToZeroPodRetentionPeriod")
PROGRESS_DEADLINE: Final = Annotation(("serving.knative.dev/progress-deadline",))

AUTOSCALING: Final = (
    CLASS, METRIC, TARGET, TARGET_UTILIZATION_PERCENTAGE, TARGET_BURST_CAPACITY, WINDOW, METRIC_AGGREGATION_ALGORITHM,
    PANIC_WINDOW_PERCENTAGE, PANIC_THRESHOLD_PERCENTAGE, MIN_SCALE, MAX_SCALE, INITIAL_SCALE, ACTIVATION_SCALE,
    SCALE_DOWN_DELAY, SCALE_TO_ZERO_POD_RETENTION_PERIOD,
)  # fmt: skip
"""Every annotation of the group that Knative reads."""
HPA_IGNORES: Final = (
    TARGET_UTILIZATION_PERCENTAGE, TARGET_BURST_CAPACITY, METRIC_AGGREGATION_ALGORITHM, PANIC_WINDOW_PERCENTAGE,
    PANIC_THRESHOLD_PERCENTAGE, ACTIVATION_SCALE, SCALE_DOWN_DELAY, SCALE_TO_ZERO_POD_RETENTION_PERIOD,
)  # fmt: skip
"""Annotations that a revision of the HPA class does not read."""

TARGET_MIN: Final = 0.01
WINDOW_MIN_SECONDS: Final = 6
WINDOW_MAX_SECONDS: Final = 3600


@dataclass(frozen=True, slots=True)
class AutoscalerConfig:
    """config-autoscaler: the settings for all revisions, with Knative's defaults."""

    enable_scale_to_zero: bool = True
    allow_zero_initial_scale: bool = False
    pod_autoscaler_class: str = KPA
    container_concurrency_target_fraction: float = 0.7
    container_concurrency_target_default: float = 100.0
    requests_per_second_target_default: float = 200.0
    target_utilization: float = 0.7  # for metrics other than concurrency
    target_burst_capacity: float = 211.0
    max_scale_up_rate: float = 1000.0
    max_scale_down_rate: float = 2.0
    panic_window_percentage: float = 10.0
    panic_threshold_percentage: float = 200.0
    stable_window_seconds: float = 60.0
    scale_to_zero_grace_period_seconds: float = 30.0
    scale_to_zero_pod_retention_period_seconds: float = 0.0
    scale_down_delay_seconds: float = 0.0
    initial_scale: int = 1
    min_scale: int = 0
    max_scale: int = 0  # 0: unbounded
    max_scale_limit: int = 0  # highest max-scale that an annotation may ask for; 0: no limit
    progress_deadline_seconds: float = 600.0  # from config-deployment: how long a revision may take to become ready
