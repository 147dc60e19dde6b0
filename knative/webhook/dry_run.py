"""What Kubernetes says of the pod that a revision becomes; `kubectl apply --dry-run=server` asks it through Knative's webhook.

Without a dry run the Service would be accepted, and no pod of it could ever be created. Only the rules that a manifest can
break after Knative's own are here (k8s.io/kubernetes pkg/apis/core/validation); what needs the cluster's state is not.
"""

import re
from typing import Any, Final

from knative.webhook.values import is_dns_1123_label, is_qualified_name, parse_quantity
from knative.webhook.violation import Violation, Violations

_CONFIG_KEY: Final = re.compile(r"[-._a-zA-Z0-9]{1,253}")
_PULL_POLICIES: Final = ("", "Always", "IfNotPresent", "Never")
_SECCOMP_TYPES: Final = ("RuntimeDefault", "Unconfined", "Localhost")
_OF_THE_POD: Final = {"fieldRef": "fieldPath", "resourceFieldRef": "resource"}
"""Sources of a variable that say something of the pod itself, and the field that says what."""
_NATIVE_RESOURCES: Final = ("cpu", "memory", "ephemeral-storage")


def pod(spec: dict[str, Any], at: str) -> Violations:
    """at: the pod's own path, "spec", as it is the pod that Kubernetes speaks of."""
    for violation in _pod(spec, at):
        yield Violation(violation.field, f"dry run of the pod failed: {violation.reason}")


def _pod(spec: dict[str, Any], at: str) -> Violations:
    for kind in ("initContainers", "containers"):
        for index, container in enumerate(spec.get(kind, [])):
            yield from _container(container, f"{at}.{kind}[{index}]")
    for index, volume in enumerate(spec.get("volumes", [])):
        yield from _volume(volume, f"{at}.volumes[{index}]")


def _container(container: dict[str, Any], at: str) -> Violations:
    name = container.get("name", "")
    if name and not is_dns_1123_label(name):
        yield Violation(f"{at}.name", f'Invalid value: "{name}": not a DNS 1123 label')
    policy = container.get("imagePullPolicy", "")
    if policy not in _PULL_POLICIES:
        yield Violation(f"{at}.imagePullPolicy", f'Unsupported value: "{policy}": supported are Always, IfNotPresent, Never')
    for index, variable in enumerate(container.get("env", [])):
        yield from _variable(variable, f"{at}.env[{index}]")
    yield from _resources(container.get("resources", {}), f"{at}.resources")
    for kind in ("livenessProbe", "readinessProbe", "startupProbe"):
        if kind in container:
            yield from _probe(container[kind], kind, f"{at}.{kind}")
    for index, mount in enumerate(container.get("volumeMounts", [])):
        yield from _mount(mount, f"{at}.volumeMounts[{index}]")
    seccomp = container.get("securityContext", {}).get("seccompProfile")
    if seccomp is not None and seccomp["type"] not in _SECCOMP_TYPES:
        yield Violation(f"{at}.securityContext.seccompProfile.type", f'Unsupported value: "{seccomp["type"]}"')


def _variable(variable: dict[str, Any], at: str) -> Violations:
    name = variable["name"]
    if "=" in name or not (name.isascii() and name.isprintable()):
        yield Violation(f"{at}.name", f'Invalid value: "{name}": printable ASCII without "=" only')
    if "valueFrom" not in variable:
        return
    source = variable["valueFrom"]
    if variable.get("value"):
        yield Violation(f"{at}.valueFrom", "may not be specified when `value` is not empty")
    if len(source) != 1:
        yield Violation(f"{at}.valueFrom", f"must have exactly one source, has {sorted(source) or 'none'}")
    for kind, selector in source.items():
        if kind in _OF_THE_POD:
            if not selector.get(_OF_THE_POD[kind]):
                yield Violation(f"{at}.valueFrom.{kind}.{_OF_THE_POD[kind]}", "Required value")
            continue
        if not selector.get("name"):
            yield Violation(f"{at}.valueFrom.{kind}.name", "Required value")
        if not _CONFIG_KEY.fullmatch(selector["key"]):
            yield Violation(f"{at}.valueFrom.{kind}.key", f'Invalid value: "{selector["key"]}"')


def _resources(resources: dict[str, Any], at: str) -> Violations:
    limits, requests = resources.get("limits", {}), resources.get("requests", {})
    for kind, values in (("limits", limits), ("requests", requests)):
        for name, value in values.items():
            if not _is_resource(name):
                yield Violation(f"{at}.{kind}[{name}]", f'Invalid value: "{name}": not a resource of containers')
            elif parse_quantity(value) < 0:
                yield Violation(f"{at}.{kind}[{name}]", f'Invalid value: "{value}": must be greater than or equal to 0')
            elif name not in _NATIVE_RESOURCES and parse_quantity(value).denominator != 1:
                yield Violation(f"{at}.{kind}[{name}]", f'Invalid value: "{value}": must be an integer')
    for name, request in requests.items():
        yield from _request(name, request, limits.get(name), f"{at}.requests")


def _request(name: str, request: str | int, limit: str | int | None, at: str) -> Violations:
    counted = name not in _NATIVE_RESOURCES
    if limit is None:
        if counted:
            yield Violation(at, f'Invalid value: "{request}": {name} needs a limit of the same value')
    elif counted and parse_quantity(request) != parse_quantity(limit):
        yield Violation(at, f'Invalid value: "{request}": must be equal to {name} limit of {limit}')
    elif parse_quantity(request) > parse_quantity(limit):
        yield Violation(at, f'Invalid value: "{request}": must be less than or equal to {name} limit of {limit}')


def _is_resource(name: str) -> bool:
    return name in _NATIVE_RESOURCES or name.startswith("hugepages-") or ("/" in name and is_qualified_name(name))


def _probe(probe: dict[str, Any], kind: str, at: str) -> Violations:
    if kind != "readinessProbe" and probe.get("successThreshold", 0) not in (0, 1):
        yield Violation(f"{at}.successThreshold", f"Invalid value: {probe['successThreshold']}: must be 1")
    for name in ("initialDelaySeconds", "periodSeconds", "timeoutSeconds", "successThreshold", "failureThreshold"):
        if probe.get(name, 0) < 0:
            yield Violation(f"{at}.{name}", f"Invalid value: {probe[name]}: must be greater than or equal to 0")
    for name in ("httpGet", "tcpSocket", "grpc"):
        port = probe.get(name, {}).get("port", 0)
        if isinstance(port, int) and not 0 <= port <= 65535:
            yield Violation(f"{at}.{name}.port", f"Invalid value: {port}: must be between 1 and 65535, inclusive")
    if "exec" in probe and not probe["exec"].get("command"):
        yield Violation(f"{at}.exec.command", "Required value")
    scheme = probe.get("httpGet", {}).get("scheme", "")
    if scheme not in ("", "HTTP", "HTTPS"):
        yield Violation(f"{at}.httpGet.scheme", f'Unsupported value: "{scheme}"')


def _mount(mount: dict[str, Any], at: str) -> Violations:
    if ":" in mount["mountPath"]:
        yield Violation(f"{at}.mountPath", f"Invalid value: \"{mount['mountPath']}\": must not contain ':'")
    path = mount.get("subPath", "")
    if path.startswith("/") or ".." in path.split("/"):
        yield Violation(f"{at}.subPath", f"Invalid value: \"{path}\": must be a relative path without '..'")


def _volume(volume: dict[str, Any], at: str) -> Violations:
    for kind, name in (("secret", "secretName"), ("configMap", "name")):
        if kind not in volume:
            continue
        source = volume[kind]
        if not source.get(name):
            yield Violation(f"{at}.{kind}.{name}", "Required value")
        yield from _mode(source, "defaultMode", f"{at}.{kind}")
        for index, item in enumerate(source.get("items", [])):
            field = f"{at}.{kind}.items[{index}]"
            yield from _mode(item, "mode", field)
            if item["path"].startswith("/") or ".." in item["path"].split("/"):
                yield Violation(f"{field}.path", f"Invalid value: \"{item['path']}\": must be a relative path without '..'")


def _mode(source: dict[str, Any], name: str, at: str) -> Violations:
    if not 0 <= source.get(name, 0) <= 0o777:
        yield Violation(f"{at}.{name}", f"Invalid value: {source[name]}: must be a number between 0 and 0777 (octal)")
