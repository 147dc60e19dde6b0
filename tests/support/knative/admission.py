"""The stand-in cluster's verdict on Knative Services: from a real cluster's verdicts on manifests, not from Lamina's own rules.

A field for which a recorded manifest was refused is refused with the same value, or with any value if no accepted manifest has
the field. A field that no accepted manifest has, neither recorded nor run on a cluster, is unknown.
"""

import json
import re
from collections.abc import Iterator
from typing import Any, Final

from tests.support.paths import DATA

Path = tuple[str, ...]

_CASES: Final = json.loads((DATA / "webhook-cases.json").read_text())
# Fields of manifests that ran on a real cluster besides the recorded ones. Three are only in Knative's own documents: traffic,
# annotations outside of its domains, and `optional` of a secretKeyRef. Volumes of Secrets and ConfigMaps are in its source
# (knative/serving pkg/apis/serving/fieldmask.go, VolumeSourceMask).
_RUN_ON_A_CLUSTER: Final = """
metadata.labels.*
spec.template.metadata.labels.*
spec.template.metadata.annotations.autoscaling.knative.dev/target-utilization-percentage
spec.template.metadata.annotations.autoscaling.knative.dev/panic-window-percentage
spec.template.metadata.annotations.autoscaling.knative.dev/scale-down-delay
spec.template.metadata.annotations.autoscaling.knative.dev/min-scale
spec.template.metadata.annotations.autoscaling.knative.dev/target-burst-capacity
spec.template.metadata.annotations.serving.knative.dev/progress-deadline
spec.template.metadata.annotations.features.knative.dev/http-full-duplex
spec.template.metadata.annotations.lamina.dev/rotation
spec.template.spec.automountServiceAccountToken
spec.template.spec.volumes.*.secret.secretName
spec.template.spec.volumes.*.secret.items.*.key
spec.template.spec.volumes.*.secret.items.*.path
spec.template.spec.volumes.*.configMap.items.*.key
spec.template.spec.volumes.*.configMap.items.*.path
spec.template.spec.containers.*.env.*.valueFrom.secretKeyRef.optional
spec.template.spec.containers.*.env.*.value
spec.template.spec.containers.*.envFrom.*.secretRef.name
spec.template.spec.containers.*.resources.requests.*
spec.template.spec.containers.*.resources.limits.*
spec.template.spec.containers.*.readinessProbe.periodSeconds
spec.template.spec.containers.*.readinessProbe.timeoutSeconds
spec.template.spec.containers.*.livenessProbe.periodSeconds
spec.template.spec.containers.*.livenessProbe.timeoutSeconds
spec.template.spec.containers.*.livenessProbe.failureThreshold
spec.template.spec.containers.*.securityContext.capabilities.drop.*
spec.traffic.*.revisionName
spec.traffic.*.latestRevision
spec.traffic.*.percent
spec.traffic.*.tag
metadata.annotations.argocd.argoproj.io/sync-options
metadata.annotations.argocd.argoproj.io/sync-wave
metadata.annotations.kustomize.toolkit.fluxcd.io/prune
"""


def refusal(manifest: dict[str, Any], enabled: set[str]) -> str | None:
    """The fields that a real cluster refused, as its webhook names them. enabled: fields that a feature flag lets through."""
    if manifest["spec"].get("template") is None:
        return "missing field(s): spec.template.spec.containers"
    for case in _CASES:
        wanted = {_path(field): next(_values(case["manifest"], _path(field)), None) for field in case["fields"]}
        wanted = {path: value for path, value in wanted.items() if value is not None}
        if case["accepted"] or not wanted or {path[-1] for path in wanted} & enabled:
            continue
        if all(_refused(manifest, path, value) for path, value in wanted.items()):
            return "validation failed: " + ", ".join(f"invalid value: {field}" for field in case["fields"])
    return None


def unknown_fields(manifest: dict[str, Any], enabled: set[str]) -> list[str]:
    """Fields without a known verdict."""
    known = [
        *(path for case in _CASES if case["accepted"] for path, _ in _fields(case["manifest"])),
        *map(_path, _RUN_ON_A_CLUSTER.split()),
    ]
    return sorted(
        {
            ".".join(path)
            for path, _ in _fields(manifest)
            if not set(path) & enabled and not any(_fits(path, pattern) for pattern in known)
        }
    )


def _refused(manifest: dict[str, Any], path: Path, value: Any) -> bool:
    """Whether the manifest has the field with this value, or with any value if accepted manifests never have the field."""
    found = list(_values(manifest, path))
    accepted = [each for case in _CASES if case["accepted"] for each in _values(case["manifest"], path)]
    if accepted or any(_fits(path, pattern) for pattern in map(_path, _RUN_ON_A_CLUSTER.split())):
        return value in found and value not in accepted  # else another field was the reason
    return bool(found)


def _path(field: str) -> Path:
    """The keys of annotations have dots of their own."""
    head, found, key = field.partition("annotations.")
    parts = re.sub(r"\[[^\]]*\]", ".*", head.strip(".")).split(".")
    return (*parts, "annotations", key) if found else tuple(parts)


def _fits(path: Path, pattern: Path) -> bool:
    return len(path) == len(pattern) and all(
        own in (other, "*") or other == "*" for own, other in zip(path, pattern, strict=True)
    )


def _fields(value: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Every leaf, with `*` for an index of a list."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _fields(inner, (*path, key))
    elif isinstance(value, list) and value:
        for inner in value:
            yield from _fields(inner, (*path, "*"))
    else:
        yield path, value


def _values(value: Any, path: Path) -> Iterator[Any]:
    if not path:
        yield value
    elif path[0] == "*":
        for inner in value if isinstance(value, list) else []:
            yield from _values(inner, path[1:])
    elif isinstance(value, list):  # the webhook sometimes leaves the index out
        for inner in value:
            yield from _values(inner, path)
    elif isinstance(value, dict) and path[0] in value:
        yield from _values(value[path[0]], path[1:])
