"""Lamina's own warnings: mistakes in a Service that Knative's webhook accepts."""

import difflib
from typing import Any, Final

from knative.webhook import autoscaling_annotations as annotated
from knative.webhook.annotations import ALGORITHMS, NETWORKING, QUEUE_PERCENTAGE, QUEUE_RESOURCES, ROLLOUT_DURATION
from knative.webhook.autoscaling_annotations import GROUP, HPA, KPA
from knative.webhook.schema import as_decoded
from knative.webhook.values import parse_float, parse_int
from knative.webhook.violation import Violation, Violations

_SERVICE: Final = "metadata.annotations"
_TEMPLATE: Final = "spec.template.metadata.annotations"
_DEFAULT_TIMEOUT_SECONDS: Final = 300
_TEMPLATE_ANNOTATIONS: Final = (*annotated.AUTOSCALING, annotated.PROGRESS_DEADLINE, QUEUE_PERCENTAGE, *QUEUE_RESOURCES)
_ANYWHERE: Final = frozenset((
    *NETWORKING, "serving.knative.dev/creator", "serving.knative.dev/lastModifier", "serving.knative.dev/no-gc",
    "serving.knative.dev/lastPinned", "serving.knative.dev/routes", "serving.knative.dev/routingStateModified",
    "features.knative.dev/queueproxy-podinfo", "features.knative.dev/http-full-duplex",
))  # fmt: skip
_PLACE: Final = {  # key → where Knative reads it
    **{key: _TEMPLATE for annotation in _TEMPLATE_ANNOTATIONS for key in annotation.keys},
    **dict.fromkeys(ROLLOUT_DURATION.keys, _SERVICE),
    "networking.knative.dev/visibility": "metadata.labels",
}
_PREFERRED: Final = [annotation.key for annotation in (*_TEMPLATE_ANNOTATIONS, ROLLOUT_DURATION)]


def warnings(service: dict[str, Any]) -> list[Violation]:
    """Mistakes in a Service that a cluster accepts all the same. The Service must be one that `validate` accepts."""
    decoded = as_decoded(service)
    metadata, template = decoded.get("metadata", {}), decoded["spec"]["template"]
    annotations, spec = template.get("metadata", {}).get("annotations", {}), template["spec"]
    return [
        *_unread(metadata.get("annotations", {}), _SERVICE),
        *_unread(annotations, _TEMPLATE),
        *(
            Violation(f"{at}.labels.{key}", f"Knative ignores it as a label; it belongs under {_TEMPLATE}")
            for at, given in (("metadata", metadata), ("spec.template.metadata", template.get("metadata", {})))
            for key in given.get("labels", {})
            if key.startswith(f"{GROUP}/")
        ),
        *_autoscaling(annotations, spec),
        *_timeouts(spec, "spec.template.spec"),
        *_environment(spec["containers"], "spec.template.spec.containers"),
    ]


def _unread(annotations: dict[str, str], at: str) -> Violations:
    """Yields annotations that look like Knative's but that Knative does not read at `at`, the path of their metadata."""
    # Names are compared without their group, which would make any two keys alike.
    by_name = {_plain(known): known for known in _PREFERRED}
    for key in annotations:
        group = key.rpartition("/")[0]
        if "knative" not in group or key in _ANYWHERE or _PLACE.get(key) == at:
            continue
        if key in _PLACE:
            yield Violation(f"{at}.{key}", f"Knative ignores it here; it belongs under {_PLACE[key]}")
            continue
        near = difflib.get_close_matches(_plain(key), by_name, n=1)
        hint = f"; did you mean {by_name[near[0]]}?" if near else ""
        yield Violation(f"{at}.{key}", f"Knative knows no such annotation and ignores it{hint}")


def _plain(key: str) -> str:
    return key.rpartition("/")[2].lower().replace("-", "").replace("_", "")


def _autoscaling(annotations: dict[str, str], spec: dict[str, Any]) -> Violations:
    for annotation in _TEMPLATE_ANNOTATIONS:
        for key in [key for key in annotation.keys if key in annotations][1:]:
            yield Violation(f"{_TEMPLATE}.{key}", f"Knative ignores it because {annotation.key} is set too")
    scaler, metric = annotated.CLASS.value(annotations) or KPA, annotated.METRIC.value(annotations) or "concurrency"
    target, concurrency = annotated.TARGET.value(annotations), spec.get("containerConcurrency", 0)
    if scaler == KPA and metric == "concurrency" and target is not None and 0 < concurrency < parse_float(target):
        yield Violation(
            f"{_TEMPLATE}.{annotated.TARGET.key}",
            f"target {parse_float(target):g} is above containerConcurrency {concurrency}, which Knative scales by instead",
        )
    key, burst = annotated.TARGET_BURST_CAPACITY.get(annotations)
    if burst is not None and parse_float(burst) == -1:
        yield Violation(
            f"{_TEMPLATE}.{key}",
            "with -1 Knative reads no queue-proxy: requests sent straight to pods do not count and do not keep them",
        )
    key, algorithm = annotated.METRIC_AGGREGATION_ALGORITHM.get(annotations)
    if algorithm and algorithm not in ALGORITHMS:
        yield Violation(f"{_TEMPLATE}.{key}", f"Knative knows no algorithm {algorithm} and averages linearly")
    (key, initial), most = annotated.INITIAL_SCALE.get(annotations), parse_int(annotated.MAX_SCALE.value(annotations) or "0")
    if initial is not None and 0 < most < parse_int(initial):
        yield Violation(
            f"{_TEMPLATE}.{key}",
            f"initial-scale {initial} is above max-scale {most}, which Knative exceeds until so many pods were ready",
        )
    for annotation in annotated.HPA_IGNORES if scaler == HPA else ():
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
