"""The autoscaler's settings of one revision: annotations of its template, else config-autoscaler, as Knative resolves them."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from knative.local.autoscaler.kpa import DeciderSpec
from knative.webhook import autoscaling_annotations as annotated
from knative.webhook.autoscaling_annotations import Annotation, AutoscalerConfig
from knative.webhook.values import NANOSECONDS, parse_duration, parse_float, parse_int

T = TypeVar("T")
D = TypeVar("D")
_BUCKET_SECONDS: Final = 1
_DEFAULTS: Final = AutoscalerConfig()


class SettingsError(ValueError):
    """The autoscaler cannot use an annotation or the CPU request of a template. The message names it."""


@dataclass(frozen=True, slots=True)
class RevisionSettings:
    """The autoscaler's settings for one revision, with all defaults filled in."""

    autoscaler_class: str
    metric: str  # concurrency or rps; with the HPA class cpu, memory or the name of a custom metric
    metric_aggregation_algorithm: str
    target: float | None  # the annotation, None if absent; the class HPA takes it as it is (cpu: percent of the request)
    decider: DeciderSpec
    window_seconds: float | None  # the annotation, None if absent; with the class HPA the stabilization window
    min_scale: int
    max_scale: int  # 0: unbounded
    initial_scale: int
    scale_to_zero_grace_period_seconds: float
    scale_to_zero_pod_retention_period_seconds: float
    enable_scale_to_zero: bool
    progress_deadline_seconds: float

    @property
    def pods_report(self) -> bool:
        """Whether the autoscaler reads the pods' queue-proxies.

        False if the target burst capacity is -1: the activator then always stays in the path and reports all requests.
        """
        return self.decider.target_burst_capacity != -1


def revision_settings(template: Mapping[str, Any], config: AutoscalerConfig = _DEFAULTS) -> RevisionSettings:
    """The settings of a revision with this `spec.template`. config: for what it leaves out. Raises SettingsError."""
    given = template.get("metadata", {}).get("annotations") or {}
    autoscaler_class = _read(given, annotated.CLASS, str, config.pod_autoscaler_class)
    metric = _read(given, annotated.METRIC, str, "cpu" if autoscaler_class == annotated.HPA else "concurrency")
    container_concurrency = int(template.get("spec", {}).get("containerConcurrency") or 0)
    initial_scale = _read(given, annotated.INITIAL_SCALE, parse_int, config.initial_scale)
    if initial_scale == 0 and not config.allow_zero_initial_scale:
        initial_scale = config.initial_scale
    unset_retention = config.scale_to_zero_pod_retention_period_seconds
    retention = _read(given, annotated.SCALE_TO_ZERO_POD_RETENTION_PERIOD, _seconds, unset_retention)
    return RevisionSettings(
        autoscaler_class=autoscaler_class,
        metric=metric,
        metric_aggregation_algorithm=_read(given, annotated.METRIC_AGGREGATION_ALGORITHM, str, "linear"),
        target=_read(given, annotated.TARGET, _finite, None),
        decider=_decider(given, config, metric, container_concurrency),
        window_seconds=_read(given, annotated.WINDOW, _seconds, None),
        min_scale=_read(given, annotated.MIN_SCALE, parse_int, config.min_scale),
        max_scale=_read(given, annotated.MAX_SCALE, parse_int, config.max_scale),
        initial_scale=initial_scale,
        scale_to_zero_grace_period_seconds=config.scale_to_zero_grace_period_seconds,
        scale_to_zero_pod_retention_period_seconds=retention,
        enable_scale_to_zero=config.enable_scale_to_zero,
        progress_deadline_seconds=_read(given, annotated.PROGRESS_DEADLINE, _seconds, config.progress_deadline_seconds),
    )


def _read(given: Mapping[str, str], annotation: Annotation, parse: Callable[[str], T], default: D) -> T | D:
    """The annotation's value as `parse` reads it, or `default` if `given` lacks the annotation. Raises SettingsError."""
    key, value = annotation.get(given)
    if value is None:
        return default
    try:
        return parse(value)
    except ValueError as error:
        raise SettingsError(f"{key}: {error}") from error


def _finite(text: str) -> float:
    number = parse_float(text)
    if not math.isfinite(number):
        raise ValueError(f"{number} is no number to scale by")
    return number


def _seconds(text: str) -> float:
    return parse_duration(text) / NANOSECONDS


def _decider(given: Mapping[str, str], config: AutoscalerConfig, metric: str, container_concurrency: int) -> DeciderSpec:
    target, total = _target(given, config, metric, container_concurrency)
    window = _read(given, annotated.WINDOW, _seconds, config.stable_window_seconds)
    panic_percentage = _read(given, annotated.PANIC_WINDOW_PERCENTAGE, _finite, config.panic_window_percentage)
    return DeciderSpec(
        target_value=target,
        total_value=total,
        target_burst_capacity=_read(given, annotated.TARGET_BURST_CAPACITY, _finite, config.target_burst_capacity),
        max_scale_up_rate=config.max_scale_up_rate,
        max_scale_down_rate=config.max_scale_down_rate,
        panic_threshold=_read(given, annotated.PANIC_THRESHOLD_PERCENTAGE, _finite, config.panic_threshold_percentage) / 100,
        stable_window_seconds=window,
        panic_window_seconds=max(_BUCKET_SECONDS, math.floor(window * panic_percentage / 100 + 0.5)),
        scale_down_delay_seconds=_read(given, annotated.SCALE_DOWN_DELAY, _seconds, config.scale_down_delay_seconds),
        activation_scale=_read(given, annotated.ACTIVATION_SCALE, parse_int, 0),
    )


def _target(given: Mapping[str, str], config: AutoscalerConfig, metric: str, container_concurrency: int) -> tuple[float, float]:
    """Returns (value of the metric per pod that the autoscaler aims for, value that a pod can bear)."""
    if metric == "rps":
        total, utilization = config.requests_per_second_target_default, config.target_utilization
    else:
        total = float(container_concurrency) or config.container_concurrency_target_default
        utilization = config.container_concurrency_target_fraction
    target = _read(given, annotated.TARGET, _finite, None)
    if target is not None:
        # The target is never above the requests that containerConcurrency lets into a pod.
        bounded = metric == "concurrency" and container_concurrency > 0
        total = min(target, container_concurrency) if bounded else target
    percentage = _read(given, annotated.TARGET_UTILIZATION_PERCENTAGE, _finite, None)
    if percentage is not None:
        utilization = percentage / 100
    return max(annotated.TARGET_MIN, total * utilization), float(total)
