"""Kubernetes' rules for the pod of a revision, which `kubectl apply --dry-run=server` checks through Knative's webhook.

Without a dry run the Service would be accepted, and no pod of it could ever be created. Only the rules that a manifest can
break after Knative's own are here (k8s.io/kubernetes pkg/apis/core/validation); rules that need the cluster's state are not.
"""

import re
from typing import Any, Final

from knative.webhook.values import is_dns_1123_label, is_qualified_name, parse_quantity
from knative.webhook.violation import Rule, Violation, Violations, broken_rules, select

_CONFIG_KEY: Final = re.compile(r"[-._a-zA-Z0-9]{1,253}")
_NATIVE_RESOURCES: Final = ("cpu", "memory", "ephemeral-storage")
_CONTAINER: Final = "initContainers|containers[]"
_PROBE: Final = f"{_CONTAINER}.livenessProbe|readinessProbe|startupProbe"
_SOURCE: Final = f"{_CONTAINER}.env[].valueFrom"
_MODE: Final = "Invalid value: {}: must be a number between 0 and 0777 (octal)"
_PATH: Final = "Invalid value: \"{}\": must be a relative path without '..'"


def _stays_below(path: str) -> bool:
    return not path.startswith("/") and ".." not in path.split("/")


_RULES: Final[tuple[Rule, ...]] = (
    (f"{_CONTAINER}.name", lambda name: not name or is_dns_1123_label(name), 'Invalid value: "{}": not a DNS 1123 label'),
    (
        f"{_CONTAINER}.imagePullPolicy",
        lambda policy: policy in ("", "Always", "IfNotPresent", "Never"),
        'Unsupported value: "{}": supported are Always, IfNotPresent, Never',
    ),
    (
        f"{_CONTAINER}.securityContext.seccompProfile.type",
        lambda kind: kind in ("RuntimeDefault", "Unconfined", "Localhost"),
        'Unsupported value: "{}"',
    ),
    (
        f"{_CONTAINER}.env[].name",
        lambda name: "=" not in name and name.isascii() and name.isprintable(),
        'Invalid value: "{}": printable ASCII without "=" only',
    ),
    (f"{_SOURCE}.configMapKeyRef|secretKeyRef.key", lambda key: bool(_CONFIG_KEY.fullmatch(key)), 'Invalid value: "{}"'),
    (
        f"{_CONTAINER}.livenessProbe|startupProbe.successThreshold",
        lambda count: count in (0, 1),
        "Invalid value: {}: must be 1",
    ),
    (
        f"{_PROBE}.initialDelaySeconds|periodSeconds|timeoutSeconds|successThreshold|failureThreshold",
        lambda number: number >= 0,
        "Invalid value: {}: must be greater than or equal to 0",
    ),
    (
        f"{_PROBE}.httpGet|tcpSocket|grpc.port",
        lambda port: isinstance(port, str) or 0 <= port <= 65535,
        "Invalid value: {}: must be between 1 and 65535, inclusive",
    ),
    (f"{_PROBE}.httpGet.scheme", lambda scheme: scheme in ("", "HTTP", "HTTPS"), 'Unsupported value: "{}"'),
    (f"{_CONTAINER}.volumeMounts[].mountPath", lambda path: ":" not in path, "Invalid value: \"{}\": must not contain ':'"),
    (f"{_CONTAINER}.volumeMounts[].subPath", _stays_below, _PATH),
    ("volumes[].secret|configMap.defaultMode", lambda mode: 0 <= mode <= 0o777, _MODE),
    ("volumes[].secret|configMap.items[].mode", lambda mode: 0 <= mode <= 0o777, _MODE),
    ("volumes[].secret|configMap.items[].path", _stays_below, _PATH),
)
_REQUIRED: Final = (
    (f"{_SOURCE}.fieldRef", "fieldPath"),
    (f"{_SOURCE}.resourceFieldRef", "resource"),
    (f"{_SOURCE}.configMapKeyRef|secretKeyRef", "name"),
    (f"{_PROBE}.exec", "command"),
    ("volumes[].secret", "secretName"),
    ("volumes[].configMap", "name"),
)  # path, and the field that must not be empty there


def pod(spec: dict[str, Any], at: str) -> Violations:
    """Yields violations of Kubernetes' rules in the pod `spec`. at: its path in messages; Kubernetes sees the pod only."""
    yield from broken_rules(_RULES, spec, at)
    for path, name in _REQUIRED:
        found = select(spec, path, at)
        yield from (Violation(f"{field}.{name}", "Required value") for field, value in found if not value.get(name))
    for field, variable in select(spec, f"{_CONTAINER}.env[]", at):
        source = variable.get("valueFrom")
        if source is not None and variable.get("value"):
            yield Violation(f"{field}.valueFrom", "may not be specified when `value` is not empty")
        if source is not None and len(source) != 1:
            yield Violation(f"{field}.valueFrom", f"must have exactly one source, has {sorted(source) or 'none'}")
    for field, resources in select(spec, f"{_CONTAINER}.resources", at):
        yield from _resources(resources, field)


def _resources(resources: dict[str, Any], at: str) -> Violations:
    limits, requests = resources.get("limits", {}), resources.get("requests", {})
    for kind, values in (("limits", limits), ("requests", requests)):
        for name, value in values.items():
            if not (name in _NATIVE_RESOURCES or name.startswith("hugepages-") or ("/" in name and is_qualified_name(name))):
                yield Violation(f"{at}.{kind}[{name}]", f'Invalid value: "{name}": not a resource of containers')
            elif parse_quantity(value) < 0:
                yield Violation(f"{at}.{kind}[{name}]", f'Invalid value: "{value}": must be greater than or equal to 0')
            elif name not in _NATIVE_RESOURCES and parse_quantity(value).denominator != 1:
                yield Violation(f"{at}.{kind}[{name}]", f'Invalid value: "{value}": must be an integer')
    for name, request in requests.items():
        counted, limit, field = name not in _NATIVE_RESOURCES, limits.get(name), f"{at}.requests"
        if limit is None:
            if counted:
                yield Violation(field, f'Invalid value: "{request}": {name} needs a limit of the same value')
        elif counted and parse_quantity(request) != parse_quantity(limit):
            yield Violation(field, f'Invalid value: "{request}": must be equal to {name} limit of {limit}')
        elif parse_quantity(request) > parse_quantity(limit):
            yield Violation(field, f'Invalid value: "{request}": must be less than or equal to {name} limit of {limit}')
