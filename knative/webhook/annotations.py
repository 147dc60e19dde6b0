"""The rules of Knative's webhook for annotations (pkg/apis/autoscaling, pkg/apis/serving)."""

from collections.abc import Callable, Iterator, Mapping
from typing import Final, TypeVar

from knative.webhook import autoscaling_annotations as annotated
from knative.webhook.autoscaling_annotations import HPA, KPA, Annotation, AutoscalerConfig
from knative.webhook.values import MAX_INT32, NANOSECONDS, parse_duration, parse_float, parse_int, parse_quantity
from knative.webhook.violation import Violation, Violations, invalid, out_of_bounds

Annotations = Mapping[str, str]
T = TypeVar("T")

ALGORITHMS: Final = ("linear", "weighted-exponential", "weightedExponential")
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
        "ingress.class", "ingress-class", "certificate.class", "certificate-class", "disableAutoTLS", "disable-auto-tls",
        "disable-external-domain-tls", "httpOption", "http-protocol",
    )
)  # fmt: skip

_PERCENTAGES: Final = (  # annotation, lowest, highest
    (annotated.PANIC_WINDOW_PERCENTAGE, 1, 100),
    (annotated.PANIC_THRESHOLD_PERCENTAGE, 110, 1000),
    (annotated.TARGET_UTILIZATION_PERCENTAGE, 1, 100),
)
_DURATIONS: Final = (  # annotation, least seconds, whether in whole seconds only; an hour at most
    (annotated.WINDOW, annotated.WINDOW_MIN_SECONDS, True),
    (annotated.SCALE_TO_ZERO_POD_RETENTION_PERIOD, 0, False),
    (annotated.SCALE_DOWN_DELAY, 0, True),
)


def template_annotations(annotations: Annotations, config: AutoscalerConfig, at: str) -> Violations:
    """Yields violations in the annotations of `spec.template.metadata`. config: the cluster's. at: their path, for messages."""
    yield from _class_metric_and_algorithm(annotations, config, at)
    yield from _scales(annotations, config, at)
    for annotation, lowest, highest in _PERCENTAGES:
        for key, value, number in _read(annotation, annotations, parse_float):
            if number is None:
                yield invalid(f"{at}.{key}", value)
            elif number < lowest or number > highest:
                yield out_of_bounds(f"{at}.{key}", value, lowest, highest)
    for key, value, number in _read(annotated.TARGET, annotations, parse_float):
        if number is None:
            yield invalid(f"{at}.{key}", value)
        elif number < annotated.TARGET_MIN:
            yield Violation(f"{at}.{key}", f"target {value} should be at least {annotated.TARGET_MIN}")
    for key, value, number in _read(annotated.TARGET_BURST_CAPACITY, annotations, parse_float):
        if number is None or (number < 0 and number != -1):
            yield invalid(f"{at}.{key}", value, "at least 0, or -1 for the activator always in the path")
    for annotation, least, whole in _DURATIONS:
        yield from _duration(annotation, least, whole, annotations, at)
    for key in annotations:
        if key.startswith("networking.knative.dev") and key not in NETWORKING:
            yield Violation(at, f'invalid key name "{key}"')
    for key, value, percentage in _read(QUEUE_PERCENTAGE, annotations, parse_float):
        if percentage is None:
            yield invalid(f"{at}[{key}]", value)
        elif percentage < 0.1 or percentage > 100:
            yield out_of_bounds(f"{at}[{key}]", value, 0.1, 100)
    for annotation in QUEUE_RESOURCES:
        for key, value, quantity in _read(annotation, annotations, parse_quantity):
            if quantity is None:
                yield invalid(f"{at}[{key}]", value)
    yield from _in_whole_seconds(annotated.PROGRESS_DEADLINE, "progress-deadline", annotations, at)


def service_annotations(annotations: Annotations, at: str) -> Violations:
    """Yields violations in the annotations of the Service's own metadata, where autoscaling annotations would do nothing."""
    for key in annotations:
        if key.startswith(annotated.GROUP):
            yield Violation(
                at,
                f'invalid key name "{key}" (autoscaling annotations must be put under '
                '"spec.template.metadata.annotations" to work)',
            )
    yield from _in_whole_seconds(ROLLOUT_DURATION, "rollout-duration", annotations, at)


def _read(annotation: Annotation, annotations: Annotations, parse: Callable[[str], T]) -> Iterator[tuple[str, str, T | None]]:
    """Yields (key, value, parsed value or None if it cannot be parsed), or nothing if the annotation is absent."""
    key, value = annotation.get(annotations)
    if value is not None:
        try:
            parsed = parse(value)
        except ValueError:
            yield key, value, None
        else:
            yield key, value, parsed


def _class_metric_and_algorithm(annotations: Annotations, config: AutoscalerConfig, at: str) -> Violations:
    scaler = annotated.CLASS.value(annotations)
    if scaler is not None and scaler.endswith(".knative.dev") and scaler not in (KPA, HPA):
        yield invalid(f"{at}.{annotated.CLASS.key}", scaler, f"known are {KPA} and {HPA}")
    key, algorithm = annotated.METRIC_AGGREGATION_ALGORITHM.get(annotations)
    # Knative looks only if the class is written out; `warnings` covers the rest.
    if scaler == KPA and algorithm and algorithm not in ALGORITHMS:
        yield invalid(f"{at}.{key}", algorithm, f"known are {', '.join(ALGORITHMS[:2])}")
    metric, scaler = annotated.METRIC.value(annotations), scaler or config.pod_autoscaler_class
    wrong = metric not in ("concurrency", "rps") if scaler == KPA else scaler == HPA and not metric
    if metric is not None and wrong:
        yield invalid(f"{at}.{annotated.METRIC.key}", metric, f"not a metric of class {scaler}")


def _scales(annotations: Annotations, config: AutoscalerConfig, at: str) -> Violations:
    bounds = {annotated.MIN_SCALE: 0, annotated.MAX_SCALE: 0}
    for annotation in bounds:
        for key, value, number in _read(annotation, annotations, parse_int):
            if number is None:
                yield invalid(f"{at}.{key}", value)
            elif not 0 <= number <= MAX_INT32:
                yield out_of_bounds(f"{at}.{key}", value, 0, MAX_INT32)
            else:
                bounds[annotation] = number
    least, most = bounds.values()
    if most != 0 and most < least:
        for annotation in (annotated.MAX_SCALE, annotated.MIN_SCALE):
            yield Violation(f"{at}.{annotation.key}", f"max-scale={most} is less than min-scale={least}")
    key, wanted = annotated.MAX_SCALE.get(annotations)
    if wanted is not None and config.max_scale_limit:
        if most > config.max_scale_limit:
            yield out_of_bounds(f"{at}.{key}", most, 1, config.max_scale_limit)
        if most == 0:
            yield Violation(f"{at}.{key}", f"max-scale=0 (unlimited), must be less than {config.max_scale_limit}")
    for key, value, scale in _read(annotated.ACTIVATION_SCALE, annotations, parse_int):
        if scale is None or abs(scale) > MAX_INT32:
            yield invalid(f"{at}.{key}", value)
        elif least > scale:
            yield Violation(f"{at}.{key}", f"min-scale={least} is greater than activation-scale={scale}")
        elif 0 < most < scale:
            yield Violation(f"{at}.{key}", f"max-scale={most} is less than activation-scale={scale}")
        elif scale < 2:
            yield Violation(f"{at}.{key}", f"activation-scale={scale} must be greater than 1")
    for key, value, scale in _read(annotated.INITIAL_SCALE, annotations, parse_int):
        if scale is None:
            yield invalid(f"{at}.{key}", value)
        elif scale < 0:
            yield invalid(f"{at}.{key}", value, "must be greater than 0")
        elif scale == 0 and not config.allow_zero_initial_scale:
            yield invalid(f"{at}.{key}", value, "0 not allowed by cluster")


def _duration(annotation: Annotation, least_seconds: int, whole: bool, annotations: Annotations, at: str) -> Violations:
    key, value = annotation.get(annotations)
    if value is None:
        return
    try:
        duration = parse_duration(value)
    except ValueError as error:
        yield invalid(f"{at}.{key}", value, str(error))
        return
    if not least_seconds * NANOSECONDS <= duration <= annotated.WINDOW_MAX_SECONDS * NANOSECONDS:
        yield out_of_bounds(f"{at}.{key}", value, f"{least_seconds}s", "1h0m0s")
    elif whole and duration % NANOSECONDS:
        yield Violation(f"{at}.{key}", "must be specified with at most second precision")


def _in_whole_seconds(annotation: Annotation, name: str, annotations: Annotations, at: str) -> Violations:
    """Checks a duration: in whole seconds, not negative. Empty counts as absent. name: what messages call it."""
    key, value = annotation.get(annotations)
    if not value:
        return
    try:
        duration = parse_duration(value)
    except ValueError as error:
        yield invalid(f"{at}.{key}", value, str(error))
        return
    if duration % NANOSECONDS:
        yield Violation(f"{at}.{key}", f"{name}={value} is not at second precision")
    elif duration < 0:
        yield Violation(f"{at}.{key}", f"{name}={value} must be positive")
