"""What one revision's template asks of the autoscaler: annotations over config-autoscaler, as Knative resolves them."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from knative.local.autoscaler.kpa import DeciderSpec
from knative.webhook import autoscaling_annotations as annotated
from knative.webhook.autoscaling_annotations import Annotation, AutoscalerConfig
from knative.webhook.values import NANOSECONDS, parse_duration, parse_float, parse_int

T = TypeVar("T")
_BUCKET_SECONDS: Final = 1


class SettingsError(ValueError):
    """An annotation cannot be read. The message names key and value; the webhook refuses such a manifest before."""


@dataclass(frozen=True, slots=True)
class RevisionSettings:
    """Everything that decides about one revision's pods."""

    autoscaler_class: str
    metric: str
    """concurrency or rps; with the HPA class cpu, memory or the name of a custom metric."""
    metric_aggregation_algorithm: str
    target: float | None
    """The annotation itself, which the HPA class takes as it is (cpu: percent of the request)."""
    decider: DeciderSpec
    window_seconds: float | None
    """The annotation itself: with the HPA class the stabilization window."""
    min_scale: int
    max_scale: int
    """0: unbounded."""
    initial_scale: int
    scale_to_zero_grace_period_seconds: float
    scale_to_zero_pod_retention_period_seconds: float
    enable_scale_to_zero: bool
    progress_deadline_seconds: float

    @property
    def pods_report(self) -> bool:
        """False where the target burst capacity keeps the activator in the path for good: pods are then not read."""
        return self.decider.target_burst_capacity != -1


_DEFAULTS: Final = AutoscalerConfig()


def revision_settings(template: Mapping[str, Any], config: AutoscalerConfig = _DEFAULTS) -> RevisionSettings:
    """From a Service's `spec.template`. Raises SettingsError."""
    read = _Reader(template.get("metadata", {}).get("annotations") or {})
    autoscaler_class = read.text(annotated.CLASS, config.pod_autoscaler_class)
    metric = read.text(annotated.METRIC, "cpu" if autoscaler_class == annotated.HPA else "concurrency")
    container_concurrency = int(template.get("spec", {}).get("containerConcurrency") or 0)
    return RevisionSettings(
        autoscaler_class=autoscaler_class,
        metric=metric,
        metric_aggregation_algorithm=read.text(annotated.METRIC_AGGREGATION_ALGORITHM, "linear"),
        target=read.number(annotated.TARGET),
        decider=_decider(read, config, metric, container_concurrency),
        window_seconds=read.seconds(annotated.WINDOW),
        min_scale=_or(read.integer(annotated.MIN_SCALE), config.min_scale),
        max_scale=_or(read.integer(annotated.MAX_SCALE), config.max_scale),
        initial_scale=_initial_scale(read, config),
        scale_to_zero_grace_period_seconds=config.scale_to_zero_grace_period_seconds,
        scale_to_zero_pod_retention_period_seconds=_or(
            read.seconds(annotated.SCALE_TO_ZERO_POD_RETENTION_PERIOD), config.scale_to_zero_pod_retention_period_seconds
        ),
        enable_scale_to_zero=config.enable_scale_to_zero,
        progress_deadline_seconds=_or(read.seconds(annotated.PROGRESS_DEADLINE), config.progress_deadline_seconds),
    )


class _Reader:
    """Annotations by type; None where one is absent."""

    def __init__(self, annotations: Mapping[str, str]) -> None:
        self._annotations = annotations

    def text(self, annotation: Annotation, default: str) -> str:
        return _or(annotation.value(self._annotations), default)

    def integer(self, annotation: Annotation) -> int | None:
        return self._parse(annotation, parse_int)

    def number(self, annotation: Annotation) -> float | None:
        number = self._parse(annotation, parse_float)
        if number is not None and not math.isfinite(number):
            raise SettingsError(f"{annotation.key}: {number} is no number to scale by")
        return number

    def seconds(self, annotation: Annotation) -> float | None:
        nanoseconds = self._parse(annotation, parse_duration)
        return None if nanoseconds is None else nanoseconds / NANOSECONDS

    def _parse(self, annotation: Annotation, parse: Callable[[str], T]) -> T | None:
        key, value = annotation.get(self._annotations)
        if value is None:
            return None
        try:
            return parse(value)
        except ValueError as error:
            raise SettingsError(f"{key}: {error}") from error


def _or(value: T | None, default: T) -> T:
    return default if value is None else value


def _initial_scale(read: _Reader, config: AutoscalerConfig) -> int:
    scale = read.integer(annotated.INITIAL_SCALE)
    if scale is None or (scale == 0 and not config.allow_zero_initial_scale):
        return config.initial_scale
    return scale


def _decider(read: _Reader, config: AutoscalerConfig, metric: str, container_concurrency: int) -> DeciderSpec:
    target, total = _target(read, config, metric, container_concurrency)
    window = _or(read.seconds(annotated.WINDOW), config.stable_window_seconds)
    panic_percentage = _or(read.number(annotated.PANIC_WINDOW_PERCENTAGE), config.panic_window_percentage)
    return DeciderSpec(
        target_value=target,
        total_value=total,
        target_burst_capacity=_or(read.number(annotated.TARGET_BURST_CAPACITY), config.target_burst_capacity),
        max_scale_up_rate=config.max_scale_up_rate,
        max_scale_down_rate=config.max_scale_down_rate,
        panic_threshold=_or(read.number(annotated.PANIC_THRESHOLD_PERCENTAGE), config.panic_threshold_percentage) / 100,
        stable_window_seconds=window,
        panic_window_seconds=max(_BUCKET_SECONDS, math.floor(window * panic_percentage / 100 + 0.5)),
        scale_down_delay_seconds=_or(read.seconds(annotated.SCALE_DOWN_DELAY), config.scale_down_delay_seconds),
        activation_scale=_or(read.integer(annotated.ACTIVATION_SCALE), 0),
    )


def _target(read: _Reader, config: AutoscalerConfig, metric: str, container_concurrency: int) -> tuple[float, float]:
    """(what the autoscaler aims for per pod, what a pod can bear)."""
    if metric == "rps":
        total, utilization = config.requests_per_second_target_default, config.target_utilization
    else:
        total = float(container_concurrency) or config.container_concurrency_target_default
        utilization = config.container_concurrency_target_fraction
    target = read.number(annotated.TARGET)
    if target is not None:
        # A pod is never aimed above what containerConcurrency lets into it.
        bounded = metric == "concurrency" and container_concurrency > 0
        total = min(target, container_concurrency) if bounded else target
    percentage = read.number(annotated.TARGET_UTILIZATION_PERCENTAGE)
    if percentage is not None:
        utilization = percentage / 100
    return max(annotated.TARGET_MIN, total * utilization), float(total)
