"""One container of a revision, as Knative's webhook takes it (pkg/apis/serving/k8s_validation.go, fieldmask.go)."""

import posixpath
import re
from typing import Any, Final

from knative.webhook.feature_flags import ADD_CAPABILITIES, FIELD_REF, MOUNT_PROPAGATION, FeatureFlags
from knative.webhook.probes import probes
from knative.webhook.violation import Violation, Violations, disallowed, exactly_one_of, invalid, missing, out_of_bounds

_RESERVED_PORTS: Final = frozenset({8008, 8012, 8013, 8022, 9090, 9091})
"""Of queue-proxy, beside the container in every pod."""
_RESERVED_ENVIRONMENT: Final = frozenset({"PORT", "K_SERVICE", "K_CONFIGURATION", "K_REVISION"})
_RESERVED_PATHS: Final = frozenset({"/", "/dev", "/dev/log"})
_PORT_NAMES: Final = ("", "h2c", "http1")
_MESSAGE_POLICIES: Final = ("", "File", "FallbackToLogsOnError")
_MAX_ID: Final = 2**31 - 1
_IMAGE: Final = re.compile(
    r"((?P<registry>[^/@\s]*[.:][^/@\s]*)/)?(?P<repository>[a-z0-9_\-./]{2,255})(:[A-Za-z0-9_\-.]{1,128})?(@sha256:[0-9a-f]{64})?"
)
"""What go-containerregistry reads as a reference: the first part is a registry where it has a dot or a colon."""


def container(
    item: dict[str, Any], volumes: dict[str, dict[str, Any]], port_name: str | None, at: str, features: FeatureFlags
) -> Violations:
    """port_name: of the port that is served, "http" where it has none; None for a sidecar, which serves nothing."""
    yield from probes(item, port_name, at, features)
    if item.get("name") == "queue-proxy":
        yield Violation(f"{at}.name", '"queue-proxy" is a reserved container name')
    yield from _environment(item.get("env", []), port_name is None, f"{at}.env", features)
    yield from _environment_from(item.get("envFrom", []), f"{at}.envFrom")
    yield from _image(item.get("image", ""), f"{at}.image")
    yield from _port(item.get("ports", []), f"{at}.ports")
    yield from _security(item.get("securityContext", {}), f"{at}.securityContext", features)
    policy = item.get("terminationMessagePolicy", "")
    if policy not in _MESSAGE_POLICIES:
        yield invalid(f"{at}.terminationMessagePolicy", policy)
    yield from _mounts(item.get("volumeMounts", []), volumes, f"{at}.volumeMounts", features)


def _environment(variables: list[dict[str, Any]], sidecar: bool, at: str, features: FeatureFlags) -> Violations:
    reserved = _RESERVED_ENVIRONMENT - {"PORT"} if sidecar else _RESERVED_ENVIRONMENT
    for index, variable in enumerate(variables):
        field, name = f"{at}[{index}]", variable["name"]
        if not name:
            yield missing(f"{field}.name")
        elif name in reserved:
            yield Violation(f"{field}.name", f'"{name}" is a reserved environment variable')
        source = variable.get("valueFrom", {})
        for kind in ("fieldRef", "resourceFieldRef"):
            if source.get(kind) is not None and not features.let_through(FIELD_REF):
                yield disallowed(f"{field}.valueFrom.{kind}", FIELD_REF)


def _environment_from(sources: list[dict[str, Any]], at: str) -> Violations:
    for index, source in enumerate(sources):
        given = [name for name in ("configMapRef", "secretRef") if name in source]
        yield from exactly_one_of(f"{at}[{index}]", ("configMapRef", "secretRef"), given)


def _image(image: str, at: str) -> Violations:
    if not image:
        yield missing(at)
    elif not _IMAGE.fullmatch(image):
        yield Violation(at, f'Failed to parse image reference "{image}"')


def _port(ports: list[dict[str, Any]], at: str) -> Violations:
    if not ports:
        return
    number, name, protocol = ports[0].get("containerPort", 0), ports[0].get("name", ""), ports[0].get("protocol", "")
    if number in _RESERVED_PORTS:
        yield invalid(f"{at}.containerPort", number, f"{number} is a reserved port, please use a different value")
    if not 0 <= number <= 65535:
        yield out_of_bounds(f"{at}.containerPort", number, 0, 65535)
    if protocol not in ("", "TCP"):
        yield invalid(f"{at}.protocol", protocol)
    if name not in _PORT_NAMES:
        yield Violation(at, f"Port name {name} is not allowed (name must be empty, or one of: 'h2c', 'http1')")


def _security(security: dict[str, Any], at: str, features: FeatureFlags) -> Violations:
    if security.get("privileged"):
        yield disallowed(f"{at}.privileged")
    added = security.get("capabilities", {}).get("add")
    harmless = features.secure_pod_defaults and added == ["NET_BIND_SERVICE"]
    if added and not harmless and not features.enabled(ADD_CAPABILITIES):
        yield disallowed(f"{at}.capabilities.add", ADD_CAPABILITIES)
    for name in ("runAsUser", "runAsGroup"):
        if not 0 <= security.get(name, 0) <= _MAX_ID:
            yield out_of_bounds(f"{at}.{name}", security[name], 0, _MAX_ID)


def _mounts(mounts: list[dict[str, Any]], volumes: dict[str, dict[str, Any]], at: str, features: FeatureFlags) -> Violations:
    seen: set[str] = set()
    for index, mount in enumerate(mounts):
        field, path = f"{at}[{index}]", mount["mountPath"]
        # Knative makes mounts of read-only kinds read-only itself, so nothing is left to say about that.
        if mount.get("mountPropagation") is not None and not features.let_through(MOUNT_PROPAGATION):
            yield disallowed(f"{field}.mountPropagation", MOUNT_PROPAGATION)
        if mount["name"] not in volumes:
            yield Violation(f"{field}.name", "volumeMount has no matching volume")
        clean = _clean(path)
        if not path:
            yield missing(f"{field}.mountPath")
        elif clean in _RESERVED_PATHS:
            yield Violation(f"{field}.mountPath", f'mountPath "{clean}" is a reserved path')
        elif not path.startswith("/"):
            yield invalid(f"{field}.mountPath", path, "must be absolute")
        elif clean in seen:
            yield invalid(f"{field}.mountPath", f'"{path}" must be unique')
        seen.add(clean)


def _clean(path: str) -> str:
    """As Go's path.Clean; Python's keeps two leading slashes."""
    return "/" + posixpath.normpath(path).lstrip("/") if path.startswith("/") else posixpath.normpath(path)
