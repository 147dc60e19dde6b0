"""Annotations, as Knative's webhook takes them (pkg/apis/autoscaling, pkg/apis/serving)."""

from collections.abc import Callable, Mapping
from typing import Final, TypeVar

from knative.webhook import autoscaling_annotations as annotated
from knative.webhook.autoscaling_annotations import HPA, KPA, Annotation, AutoscalerConfig
from knative.webhook.values import MAX_INT32, NANOSECONDS, parse_duration, parse_float, parse_int, parse_quantity
from knative.webhook.violation import Violation, Violations, invalid, out_of_bounds

Annotations = Mapping[str, str]
T = TypeVar("T")

_DOMAIN: Final = ".knative.dev"
ALGORITHMS: Final = ("linear", "weighted-exponential", "weightedExponential")
_HOUR: Final = "1h0m0s"
ROLLOUT_DURATION: Final = Annotation(("serving.knative.dev/rollout-duration", "serving.knative.dev/rolloutDuration"))
QUEUE_PERCENTAGE: Final = Annotation(
    ("queue.sidecar.serving.knative.dev/resource-percentage", "queue.sidecar.serving.knative.dev/resourcePercentage")
)
QUEUE_RESOURCES: Final = tuple(
    Annotation((f"queue.sidecar.serving.knative.dev/{resource}-resource-{kind}",))
    for resource in ("cpu", "memory", "ephemeral-storage")
    for kind in ("request", "limit")
)
NETWORKING: Final = tuple(
    f"networking.knative.dev/{name}"
    for name in (
        "ingress.class",
        "ingress-class",
        "certificate.class",
        "certificate-class",
        "disableAutoTLS",
        "disable-auto-tls",
        "disable-external-domain-tls",
        "httpOption",
        "http-protocol",
    )
)


def template_annotations(annotations: Annotations, config: AutoscalerConfig, at: str) -> Violations:
    """Those of `spec.template.metadata`."""
    for check in (_class, _scales, _numbers, _window, _retention, _scale_down_delay, _metric, _algorithm, _initial_scale):
        yield from check(annotations, config, at)
    yield from _networking(annotations, at)
    yield from _queue_sidecar(annotations, at)
    yield from _second_precision(annotated.PROGRESS_DEADLINE, "progress-deadline", annotations, at)


def service_annotations(annotations: Annotations, at: str) -> Violations:
    """Those of the Service's own metadata, where autoscaling annotations would do nothing."""
    for key in annotations:
        if key.startswith(annotated.GROUP):
            yield Violation(
                at,
                f'invalid key name "{key}" (autoscaling annotations must be put under '
                '"spec.template.metadata.annotations" to work)',
            )
    yield from _second_precision(ROLLOUT_DURATION, "rollout-duration", annotations, at)


def _class(annotations: Annotations, config: AutoscalerConfig, at: str) -> Violations:
    value = annotated.CLASS.value(annotations)
    if value is not None and value.endswith(_DOMAIN) and value not in (KPA, HPA):
        yield invalid(f"{at}.{annotated.CLASS.key}", value, f"known are {KPA} and {HPA}")


def _scales(annotations: Annotations, config: AutoscalerConfig, at: str) -> Violations:
    least, wrong_least = _natural(annotated.MIN_SCALE, annotations, at)
    most, wrong_most = _natural(annotated.MAX_SCALE, annotations, at)
    yield from wrong_least
    yield from wrong_most
    if most != 0 and most < least:
        for bound in (annotated.MAX_SCALE, annotated.MIN_SCALE):
            yield Violation(f"{at}.{bound.key}", f"max-scale={most} is less than min-scale={least}")
    yield from _scale_limit(annotations, config, most, at)
    yield from _activation_scale(annotations, least, most, at)


def _natural(annotation: Annotation, annotations: Annotations, at: str) -> tuple[int, list[Violation]]:
    """(value, 0 where it is absent or wrong; what is wrong)."""
    for key, value, number in _read(annotation, annotations, parse_int):
        if number is None:
            return 0, [invalid(f"{at}.{key}", value)]
        if not 0 <= number <= MAX_INT32:
            return 0, [out_of_bounds(f"{at}.{key}", value, 0, MAX_INT32)]
        return number, []
    return 0, []


def _scale_limit(annotations: Annotations, config: AutoscalerConfig, most: int, at: str) -> Violations:
    key, value = annotated.MAX_SCALE.get(annotations)
    limit = config.max_scale_limit
    if value is None or limit == 0:
        return
    if most > limit:
        yield out_of_bounds(f"{at}.{key}", most, 1, limit)
    if most == 0:
        yield Violation(f"{at}.{key}", f"max-scale=0 (unlimited), must be less than {limit}")


def _activation_scale(annotations: Annotations, least: int, most: int, at: str) -> Violations:
    for key, value, scale in _read(annotated.ACTIVATION_SCALE, annotations, parse_int):
        field = f"{at}.{key}"
        if scale is None or abs(scale) > MAX_INT32:
            yield invalid(field, value)
        elif least > scale:
            yield Violation(field, f"min-scale={least} is greater than activation-scale={scale}")
        elif 0 < most < scale:
            yield Violation(field, f"max-scale={most} is less than activation-scale={scale}")
        elif scale < 2:
            yield Violation(field, f"activation-scale={scale} must be greater than 1")


def _numbers(annotations: Annotations, config: AutoscalerConfig, at: str) -> Violations:
    yield from _in_range(annotated.PANIC_WINDOW_PERCENTAGE, 1, 100, annotations, at)
    yield from _in_range(annotated.PANIC_THRESHOLD_PERCENTAGE, 110, 1000, annotations, at)
    yield from _in_range(annotated.TARGET_UTILIZATION_PERCENTAGE, 1, 100, annotations, at)
    for key, value, number in _read(annotated.TARGET, annotations, parse_float):
        if number is None:
            yield invalid(f"{at}.{key}", value)
        elif number < annotated.TARGET_MIN:
            yield Violation(f"{at}.{key}", f"target {value} should be at least {annotated.TARGET_MIN}")
    for key, value, number in _read(annotated.TARGET_BURST_CAPACITY, annotations, parse_float):
        if number is None or (number < 0 and number != -1):
            yield invalid(f"{at}.{key}", value, "at least 0, or -1 for the activator always in the path")


def _read(annotation: Annotation, annotations: Annotations, parse: Callable[[str], T]) -> list[tuple[str, str, T | None]]:
    """[(key, value, what it says or None where it cannot be read)], empty where the annotation is absent."""
    key, value = annotation.get(annotations)
    if value is None:
        return []
    try:
        return [(key, value, parse(value))]
    except ValueError:
        return [(key, value, None)]


def _in_range(annotation: Annotation, lowest: int, highest: int, annotations: Annotations, at: str) -> Violations:
    for key, value, number in _read(annotation, annotations, parse_float):
        if number is None:
            yield invalid(f"{at}.{key}", value)
        elif number < lowest or number > highest:
            yield out_of_bounds(f"{at}.{key}", value, lowest, highest)


def _window(annotations: Annotations, config: AutoscalerConfig, at: str) -> Violations:
    yield from _seconds(annotated.WINDOW, annotated.WINDOW_MIN_SECONDS, "6s", annotations, at)


def _scale_down_delay(annotations: Annotations, config: AutoscalerConfig, at: str) -> Violations:
    yield from _seconds(annotated.SCALE_DOWN_DELAY, 0, "0s", annotations, at)


def _retention(annotations: Annotations, config: AutoscalerConfig, at: str) -> Violations:
    yield from _seconds(annotated.SCALE_TO_ZERO_POD_RETENTION_PERIOD, 0, "0s", annotations, at, whole=False)


def _seconds(
    annotation: Annotation, lowest: int, lowest_name: str, annotations: Annotations, at: str, *, whole: bool = True
) -> Violations:
    """A duration from `lowest` seconds to an hour, in whole seconds unless told otherwise."""
    key, value = annotation.get(annotations)
    if value is None:
        return
    field = f"{at}.{key}"
    try:
        duration = parse_duration(value)
    except ValueError as error:
        yield invalid(field, value, str(error))
        return
    if not lowest * NANOSECONDS <= duration <= annotated.WINDOW_MAX_SECONDS * NANOSECONDS:
        yield out_of_bounds(field, value, lowest_name, _HOUR)
    elif whole and duration % NANOSECONDS:
        yield Violation(field, "must be specified with at most second precision")


def _metric(annotations: Annotations, config: AutoscalerConfig, at: str) -> Violations:
    metric = annotated.METRIC.value(annotations)
    if metric is None:
        return
    scaler = annotated.CLASS.value(annotations) or config.pod_autoscaler_class
    wrong = metric not in ("concurrency", "rps") if scaler == KPA else scaler == HPA and not metric
    if wrong:
        yield invalid(f"{at}.{annotated.METRIC.key}", metric, f"not a metric of class {scaler}")


def _algorithm(annotations: Annotations, config: AutoscalerConfig, at: str) -> Violations:
    key, value = annotated.METRIC_AGGREGATION_ALGORITHM.get(annotations)
    # Knative looks only where the class is written out; `warnings` covers the rest.
    if annotated.CLASS.value(annotations) == KPA and value and value not in ALGORITHMS:
        yield invalid(f"{at}.{key}", value, f"known are {', '.join(ALGORITHMS[:2])}")


def _initial_scale(annotations: Annotations, config: AutoscalerConfig, at: str) -> Violations:
    for key, value, scale in _read(annotated.INITIAL_SCALE, annotations, parse_int):
        field = f"{at}.{key}"
        if scale is None:
            yield invalid(field, value)
        elif scale < 0:
            yield invalid(field, value, "must be greater than 0")
        elif scale == 0 and not config.allow_zero_initial_scale:
            yield invalid(field, value, "0 not allowed by cluster")


def _networking(annotations: Annotations, at: str) -> Violations:
    for key in annotations:
        if key.startswith("networking.knative.dev") and key not in NETWORKING:
            yield Violation(at, f'invalid key name "{key}"')


def _queue_sidecar(annotations: Annotations, at: str) -> Violations:
    for key, value, number in _read(QUEUE_PERCENTAGE, annotations, parse_float):
        if number is None:
            yield invalid(f"{at}[{key}]", value)
        elif number < 0.1 or number > 100:
            yield out_of_bounds(f"{at}[{key}]", value, 0.1, 100)
    for annotation in QUEUE_RESOURCES:
        for key, value, quantity in _read(annotation, annotations, parse_quantity):
            if quantity is None:
                yield invalid(f"{at}[{key}]", value)


def _second_precision(annotation: Annotation, name: str, annotations: Annotations, at: str) -> Violations:
    """A duration in whole seconds, not negative; empty counts as absent."""
    key, value = annotation.get(annotations)
    if not value:
        return
    field = f"{at}.{key}"
    try:
        duration = parse_duration(value)
    except ValueError as error:
        yield invalid(field, value, str(error))
        return
    if duration % NANOSECONDS:
        yield Violation(field, f"{name}={value} is not at second precision")
    elif duration < 0:
        yield Violation(field, f"{name}={value} must be positive")
