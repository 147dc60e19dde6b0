"""What Knative's webhook lets through in silence and is surely a mistake."""

import difflib
from typing import Any, Final

from knative.webhook import autoscaling_annotations as annotated
from knative.webhook.annotations import ALGORITHMS, NETWORKING, QUEUE_PERCENTAGE, QUEUE_RESOURCES, ROLLOUT_DURATION
from knative.webhook.autoscaling_annotations import GROUP, HPA, KPA, Annotation
from knative.webhook.schema import as_decoded
from knative.webhook.values import parse_float, parse_int
from knative.webhook.violation import Violation, Violations

_SERVICE: Final = "metadata.annotations"
_TEMPLATE: Final = "spec.template.metadata.annotations"
_DEFAULT_TIMEOUT_SECONDS: Final = 300
_VISIBILITY: Final = "networking.knative.dev/visibility"
_OF_TEMPLATE: Final = (*annotated.AUTOSCALING, annotated.PROGRESS_DEADLINE, QUEUE_PERCENTAGE, *QUEUE_RESOURCES)
_ANYWHERE: Final = frozenset(
    (
        *NETWORKING,
        "serving.knative.dev/creator",
        "serving.knative.dev/lastModifier",
        "serving.knative.dev/no-gc",
        "serving.knative.dev/lastPinned",
        "serving.knative.dev/routes",
        "serving.knative.dev/routingStateModified",
        "features.knative.dev/queueproxy-podinfo",
        "features.knative.dev/http-full-duplex",
    )
)
_PLACE: Final = {
    **{key: _TEMPLATE for annotation in _OF_TEMPLATE for key in annotation.keys},
    **dict.fromkeys(ROLLOUT_DURATION.keys, _SERVICE),
    _VISIBILITY: "metadata.labels",
}
"""Where Knative reads a key."""
_PREFERRED: Final = [annotation.key for annotation in (*_OF_TEMPLATE, ROLLOUT_DURATION)]


def warnings(service: dict[str, Any]) -> list[Violation]:
    """Of a Service that `validate` accepts; for any other the result has no meaning."""
    decoded = as_decoded(service)
    metadata, template = decoded.get("metadata", {}), decoded["spec"]["template"]
    annotations, spec = template.get("metadata", {}).get("annotations", {}), template["spec"]
    return [
        *_unread(metadata.get("annotations", {}), _SERVICE),
        *_unread(annotations, _TEMPLATE),
        *_labels(metadata.get("labels", {}), "metadata.labels"),
        *_labels(template.get("metadata", {}).get("labels", {}), "spec.template.metadata.labels"),
        *_twice(annotations),
        *_target(annotations, spec),
        *_scales(annotations),
        *_ignored(annotations),
        *_timeouts(spec, "spec.template.spec"),
        *_environment(spec["containers"], "spec.template.spec.containers"),
    ]


def _unread(annotations: dict[str, str], at: str) -> Violations:
    """Keys that look like Knative's and that it does not read there."""
    for key in annotations:
        group = key.rpartition("/")[0]
        if "knative" not in group or key in _ANYWHERE or _PLACE.get(key) == at:
            continue
        if key in _PLACE:
            yield Violation(f"{at}.{key}", f"Knative ignores it here; it belongs under {_PLACE[key]}")
            continue
        near = _nearest(key)
        hint = f"; did you mean {near}?" if near else ""
        yield Violation(f"{at}.{key}", f"Knative knows no such annotation and ignores it{hint}")


def _nearest(key: str) -> str | None:
    """The known key whose name is most like this one's; the group would make any two keys alike."""
    by_name = {_plain(known): known for known in _PREFERRED}
    near = difflib.get_close_matches(_plain(key), by_name, n=1)
    return by_name[near[0]] if near else None


def _plain(key: str) -> str:
    return key.rpartition("/")[2].lower().replace("-", "").replace("_", "")


def _labels(labels: dict[str, str], at: str) -> Violations:
    for key in labels:
        if key.startswith(f"{GROUP}/"):
            yield Violation(f"{at}.{key}", f"Knative ignores it as a label; it belongs under {_TEMPLATE}")


def _twice(annotations: dict[str, str]) -> Violations:
    for annotation in _OF_TEMPLATE:
        for key in [key for key in annotation.keys if key in annotations][1:]:
            yield Violation(f"{_TEMPLATE}.{key}", f"Knative ignores it because {annotation.key} is set too")


def _target(annotations: dict[str, str], spec: dict[str, Any]) -> Violations:
    target, concurrency = _number(annotated.TARGET, annotations), spec.get("containerConcurrency", 0)
    metric = annotated.METRIC.value(annotations) or "concurrency"
    if _class(annotations) == KPA and metric == "concurrency" and target is not None and 0 < concurrency < target:
        yield Violation(
            f"{_TEMPLATE}.{annotated.TARGET.key}",
            f"target {target:g} is above containerConcurrency {concurrency}, which Knative scales by instead",
        )
    if _number(annotated.TARGET_BURST_CAPACITY, annotations) == -1:
        yield Violation(
            f"{_TEMPLATE}.{annotated.TARGET_BURST_CAPACITY.get(annotations)[0]}",
            "with -1 Knative reads no queue-proxy: requests sent straight to pods do not count and do not keep them",
        )
    key, algorithm = annotated.METRIC_AGGREGATION_ALGORITHM.get(annotations)
    if algorithm and algorithm not in ALGORITHMS:
        yield Violation(f"{_TEMPLATE}.{key}", f"Knative knows no algorithm {algorithm} and averages linearly")


def _scales(annotations: dict[str, str]) -> Violations:
    initial, most = (_integer(scale, annotations) for scale in (annotated.INITIAL_SCALE, annotated.MAX_SCALE))
    if initial is not None and most and initial > most:
        yield Violation(
            f"{_TEMPLATE}.{annotated.INITIAL_SCALE.get(annotations)[0]}",
            f"initial-scale {initial} is above max-scale {most}, which Knative exceeds until so many pods were ready",
        )


def _ignored(annotations: dict[str, str]) -> Violations:
    if _class(annotations) != HPA:
        return
    for annotation in annotated.HPA_IGNORES:
        key, value = annotation.get(annotations)
        if value is not None:
            yield Violation(f"{_TEMPLATE}.{key}", "the HPA class does not read it")


def _timeouts(spec: dict[str, Any], at: str) -> Violations:
    timeout = spec.get("timeoutSeconds") or _DEFAULT_TIMEOUT_SECONDS
    start, idle = spec.get("responseStartTimeoutSeconds"), spec.get("idleTimeoutSeconds")
    if start is None and timeout > _DEFAULT_TIMEOUT_SECONDS:
        yield Violation(
            f"{at}.timeoutSeconds",
            f"a response must still begin within {_DEFAULT_TIMEOUT_SECONDS} s unless responseStartTimeoutSeconds is set",
        )
    for name, seconds in (("responseStartTimeoutSeconds", start), ("idleTimeoutSeconds", idle)):
        if seconds is not None and seconds > timeout:
            yield Violation(f"{at}.{name}", f"{seconds} s can never pass, as timeoutSeconds is {timeout} s")


def _environment(containers: list[dict[str, Any]], at: str) -> Violations:
    for index, container in enumerate(containers):
        seen: set[str] = set()
        for position, variable in enumerate(container.get("env", [])):
            if variable["name"] in seen:
                yield Violation(f"{at}[{index}].env[{position}].name", f"{variable['name']} is set twice; the last one counts")
            seen.add(variable["name"])


def _class(annotations: dict[str, str]) -> str:
    return annotated.CLASS.value(annotations) or KPA


def _number(annotation: Annotation, annotations: dict[str, str]) -> float | None:
    value = annotation.value(annotations)
    return None if value is None else parse_float(value)


def _integer(annotation: Annotation, annotations: dict[str, str]) -> int | None:
    value = annotation.value(annotations)
    return None if value is None else parse_int(value)
