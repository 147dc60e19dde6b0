"""The rules of Knative's webhook for the pod of a revision (pkg/apis/serving/k8s_validation.go, fieldmask.go)."""

import posixpath
import re
from collections.abc import Iterable
from typing import Any, Final

from knative.webhook.feature_flags import (
    ADD_CAPABILITIES,
    FIELD_REF,
    MOUNT_PROPAGATION,
    MULTI_CONTAINER_PROBING,
    POD_FIELDS,
    SECURE_POD_DEFAULTS,
    VOLUME_FIELDS,
    FeatureFlags,
)
from knative.webhook.values import MAX_INT32, is_dns_1123_label, is_dns_1123_subdomain, parse_quantity
from knative.webhook.violation import (
    Rule,
    Violation,
    Violations,
    broken_rules,
    disallowed,
    exactly_one_of,
    invalid,
    missing,
    out_of_bounds,
    select,
)

Fields = dict[str, Any]

# In these fields an empty value counts as set.
_POINTERS: Final = ("affinity", "dnsConfig", "runtimeClassName", "securityContext", "shareProcessNamespace")
_SECURITY: Final = ("runAsUser", "runAsGroup", "runAsNonRoot", "fsGroup", "supplementalGroups", "seccompProfile")
_SECCOMP_PROFILES: Final = ({"type": "RuntimeDefault"}, {"type": "Unconfined"})
_NOT_IN_INIT: Final = ("livenessProbe", "readinessProbe", "startupProbe", "lifecycle")
_VOLUMES_WITHOUT_FLAG: Final = ("secret", "configMap", "projected")
_PROJECTIONS: Final = ("secret", "configMap", "serviceAccountToken", "downwardAPI")
_RESERVED_PORTS: Final = frozenset({8008, 8012, 8013, 8022, 9090, 9091})  # queue-proxy's, in every pod
_RESERVED_ENVIRONMENT: Final = frozenset({"K_SERVICE", "K_CONFIGURATION", "K_REVISION"})
_RESERVED_PATHS: Final = frozenset({"/", "/dev", "/dev/log"})
_HANDLERS: Final = ("httpGet", "tcpSocket", "exec", "grpc")
_PROBE_NUMBERS: Final = ("initialDelaySeconds", "periodSeconds", "timeoutSeconds", "successThreshold", "failureThreshold")
_IMAGE: Final = re.compile(  # as go-containerregistry reads it: the first part is a registry if it has a dot or a colon
    r"((?P<registry>[^/@\s]*[.:][^/@\s]*)/)?(?P<repository>[a-z0-9_\-./]{2,255})(:[A-Za-z0-9_\-.]{1,128})?(@sha256:[0-9a-f]{64})?"
)
_POD_RULES: Final[tuple[Rule, ...]] = (
    ("timeoutSeconds", lambda seconds: 0 <= seconds <= 600, "expected 0 <= {} <= 600"),
    ("containerConcurrency", lambda count: 0 <= count <= 1000, "expected 0 <= {} <= 1000"),
    ("automountServiceAccountToken", lambda wanted: not wanted, "must not set the field(s)"),
    (
        "serviceAccountName",
        lambda name: not name or is_dns_1123_subdomain(name),
        "invalid value: {} (not a DNS 1123 subdomain)",
    ),
    (
        "volumes[].emptyDir.medium",
        lambda medium: medium in ("", "Memory"),
        "invalid value: {} (only the default and Memory)",
    ),
    ("volumes[].emptyDir.sizeLimit", lambda size: parse_quantity(size) >= 0, "invalid value: {}"),
)
_CONTAINER_RULES: Final[tuple[Rule, ...]] = (
    ("name", lambda name: name != "queue-proxy", '"{}" is a reserved container name'),
    ("image", lambda image: not image or bool(_IMAGE.fullmatch(image)), 'Failed to parse image reference "{}"'),
    ("terminationMessagePolicy", lambda policy: policy in ("", "File", "FallbackToLogsOnError"), "invalid value: {}"),
    ("securityContext.privileged", lambda privileged: not privileged, "must not set the field(s)"),
    (
        "securityContext.runAsUser|runAsGroup",
        lambda number: 0 <= number <= MAX_INT32,
        f"expected 0 <= {{}} <= {MAX_INT32}",
    ),
)


def revision_spec(spec: Fields, at: str, features: FeatureFlags) -> Violations:
    """Yields violations in `spec.template.spec`, which has a pod's fields and Knative's own. at: its path, for messages."""
    yield from broken_rules(_POD_RULES, spec, at)
    yield from _fields_with_flags(spec, at, features)
    init_containers, containers = spec.get("initContainers", []), spec.get("containers", [])
    mounted = {mount["name"] for item in (*init_containers, *containers) for mount in item.get("volumeMounts", [])}
    volumes = spec.get("volumes", [])
    yield from _volumes(volumes, mounted, f"{at}.volumes", features)
    names = {volume["name"] for volume in volumes}
    if not features.let_through(POD_FIELDS["initContainers"]):
        if init_containers:
            yield Violation(f"{at}.initContainers", "pod spec support for init-containers is off")
    else:
        for index, item in enumerate(init_containers):
            field = f"{at}.initContainers[{index}]"
            for name in _NOT_IN_INIT:
                if name in item:
                    yield Violation(f"{field}.{name}", "field not allowed in an init container")
            rest = {name: value for name, value in item.items() if name not in _NOT_IN_INIT}
            yield from _container(rest, names, None, field, features)
    yield from _containers(containers, names, f"{at}.containers", features)


def _fields_with_flags(spec: Fields, at: str, features: FeatureFlags) -> Violations:
    for name, flag in POD_FIELDS.items():
        given = spec.get(name) is not None if name in _POINTERS else bool(spec.get(name))
        judged_below = name == "securityContext" and features.let_through(SECURE_POD_DEFAULTS)
        if given and not judged_below and not features.let_through(flag):
            yield disallowed(f"{at}.{name}", flag)
    security = spec.get("securityContext")
    flag = POD_FIELDS["securityContext"]
    for name, value in security.items() if isinstance(security, dict) else ():
        # secure-pod-defaults lets a pod choose its seccomp profile
        opted_out = features.let_through(SECURE_POD_DEFAULTS) and name == "seccompProfile" and value in _SECCOMP_PROFILES
        if name not in _SECURITY:
            yield disallowed(f"{at}.securityContext.{name}")
        elif not features.let_through(flag) and not opted_out:
            yield disallowed(f"{at}.securityContext.{name}", flag)


def _volumes(volumes: list[Fields], mounted: set[str], at: str, features: FeatureFlags) -> Violations:
    """Yields violations in a pod's volumes. mounted: names of all volumes that a container mounts."""
    sources = (*_VOLUMES_WITHOUT_FLAG, *(kind for kind, flag in VOLUME_FIELDS.items() if features.enabled(flag)))
    for index, volume in enumerate(volumes):
        field, name = f"{at}[{index}]", volume["name"]
        if name in [other["name"] for other in volumes[:index]]:
            yield Violation(f"{field}.name", f'duplicate volume name "{name}"')
        if name not in mounted:
            yield Violation(f"{field}.name", f'volume with name "{name}" not mounted')
        if not name:
            yield missing(f"{field}.name")
        elif not is_dns_1123_label(name):
            yield invalid(f"{field}.name", name, "not a DNS 1123 label")
        given = [kind for kind in (*_VOLUMES_WITHOUT_FLAG, *VOLUME_FIELDS) if kind in volume]
        for kind in given:
            if kind in VOLUME_FIELDS and not features.let_through(VOLUME_FIELDS[kind]):
                yield disallowed(f"{field}.{kind}", VOLUME_FIELDS[kind])
        yield from exactly_one_of(volume, given or sources, field)
        for kind in ("secret", "configMap"):
            yield from _empty(volume.get(kind, {}).get("items", []), ("key", "path"), f"{field}.items")
        for position, source in enumerate(volume.get("projected", {}).get("sources", [])):
            yield from _projection(source, f"{field}.projected[{position}]")


def _projection(source: Fields, at: str) -> Violations:
    yield from exactly_one_of(source, _PROJECTIONS, at)
    for kind in ("secret", "configMap"):
        if kind in source:
            if not source[kind].get("name"):
                yield missing(f"{at}.{kind}.name")
            yield from _empty(source[kind].get("items", []), ("key", "path"), f"{at}.{kind}.items")
    if "serviceAccountToken" in source and not source["serviceAccountToken"]["path"]:
        yield missing(f"{at}.serviceAccountToken.path")
    for field, item in select(source, "downwardAPI.items[]", at):
        yield from exactly_one_of(item, ("fieldRef", "resourceFieldRef"), field)
        if not item["path"]:
            yield missing(f"{field}.path")


def _empty(items: list[Fields], names: Iterable[str], at: str) -> Violations:
    for index, item in enumerate(items):
        yield from (missing(f"{at}[{index}].{name}") for name in names if not item[name])


def _containers(containers: list[Fields], volumes: set[str], at: str, features: FeatureFlags) -> Violations:
    """Yields violations in all containers. They have exactly one port together; a single container may leave it out."""
    if not containers:
        yield missing(at)
    ports = [port for item in containers for port in item.get("ports", [])]
    if not ports and len(containers) > 1:
        yield missing(f"{at}[*].ports")
    elif len(ports) > 1:
        yield Violation(
            f"{at}[*].ports", "more than one container port is set (only a single port is allowed across all containers)"
        )
    port_name = (ports[0].get("name") if ports else None) or "http"
    names: set[str] = set()
    for index, item in enumerate(containers):
        field, name = f"{at}[{index}]", item.get("name", "")
        if name and name in names:
            yield Violation(f"{field}.name", f'duplicate container name "{name}"')
        names.add(name)
        serving = len(containers) == 1 or bool(item.get("ports"))
        yield from _container(item, volumes, port_name if serving else None, field, features)


def _container(item: Fields, volumes: set[str], port_name: str | None, at: str, features: FeatureFlags) -> Violations:
    """Yields violations in one container. volumes: names of the pod's volumes.

    port_name: name of the port that is served, "http" if it has none; None for a sidecar, which serves nothing.
    """
    yield from broken_rules(_CONTAINER_RULES, item, at)
    if not item.get("image"):
        yield missing(f"{at}.image")
    reserved = _RESERVED_ENVIRONMENT | ({"PORT"} if port_name is not None else set())
    for field, variable in select(item, "env[]", at):
        if not variable["name"]:
            yield missing(f"{field}.name")
        elif variable["name"] in reserved:
            yield Violation(f"{field}.name", f'"{variable["name"]}" is a reserved environment variable')
    if not features.let_through(FIELD_REF):
        found = select(item, "env[].valueFrom.fieldRef|resourceFieldRef", at)
        yield from (disallowed(field, FIELD_REF) for field, source in found if source is not None)
    for field, source in select(item, "envFrom[]", at):
        yield from exactly_one_of(source, ("configMapRef", "secretRef"), field)
    yield from _port(item.get("ports", []), f"{at}.ports")
    added = item.get("securityContext", {}).get("capabilities", {}).get("add")
    harmless = features.let_through(SECURE_POD_DEFAULTS) and added == ["NET_BIND_SERVICE"]
    if added and not harmless and not features.enabled(ADD_CAPABILITIES):
        yield disallowed(f"{at}.securityContext.capabilities.add", ADD_CAPABILITIES)
    yield from _mounts(item.get("volumeMounts", []), volumes, f"{at}.volumeMounts", features)
    for field, probe in select(item, "livenessProbe|readinessProbe|startupProbe", at):
        yield from _probe(probe, port_name, field, features)


def _port(ports: list[Fields], at: str) -> Violations:
    if not ports:
        return
    number, name, protocol = ports[0].get("containerPort", 0), ports[0].get("name", ""), ports[0].get("protocol", "")
    if number in _RESERVED_PORTS:
        yield invalid(f"{at}.containerPort", number, f"{number} is a reserved port, please use a different value")
    if not 0 <= number <= 65535:
        yield out_of_bounds(f"{at}.containerPort", number, 0, 65535)
    if protocol not in ("", "TCP"):
        yield invalid(f"{at}.protocol", protocol)
    if name not in ("", "h2c", "http1"):
        yield Violation(at, f"Port name {name} is not allowed (name must be empty, or one of: 'h2c', 'http1')")


def _mounts(mounts: list[Fields], volumes: set[str], at: str, features: FeatureFlags) -> Violations:
    seen: set[str] = set()
    for index, mount in enumerate(mounts):
        field, path = f"{at}[{index}]", mount["mountPath"]
        # Knative makes mounts of read-only kinds read-only itself, so `readOnly` breaks no rule.
        if mount.get("mountPropagation") is not None and not features.let_through(MOUNT_PROPAGATION):
            yield disallowed(f"{field}.mountPropagation", MOUNT_PROPAGATION)
        if mount["name"] not in volumes:
            yield Violation(f"{field}.name", "volumeMount has no matching volume")
        clean = posixpath.normpath(path)
        if path.startswith("/"):
            clean = "/" + clean.lstrip("/")  # as Go's path.Clean; normpath keeps two leading slashes
        if not path:
            yield missing(f"{field}.mountPath")
        elif clean in _RESERVED_PATHS:
            yield Violation(f"{field}.mountPath", f'mountPath "{clean}" is a reserved path')
        elif not path.startswith("/"):
            yield invalid(f"{field}.mountPath", path, "must be absolute")
        elif clean in seen:
            yield invalid(f"{field}.mountPath", f'"{path}" must be unique')
        seen.add(clean)


def _probe(probe: Fields, port_name: str | None, at: str, features: FeatureFlags) -> Violations:
    """Yields violations in a probe, after Knative's defaults are filled in. The probes of a sidecar need a feature flag.

    at: path of the probe, which tells its kind. port_name: as in `_container`.
    """
    readiness = at.endswith("readinessProbe")
    if readiness:
        probe = _with_defaults(probe, serving=port_name is not None)
    if port_name is None and not features.enabled(MULTI_CONTAINER_PROBING):
        if any(name in probe for name in _HANDLERS):
            yield disallowed(at, MULTI_CONTAINER_PROBING)
        yield from (disallowed(f"{at}.{name}", MULTI_CONTAINER_PROBING) for name in _PROBE_NUMBERS if probe.get(name))
        return
    yield from exactly_one_of(probe, _HANDLERS, at)
    for field, port in select(probe, "httpGet|tcpSocket.port", at):
        if port_name is not None and isinstance(port, str) and port not in ("", port_name):
            yield invalid(field, port, "Probe port must match container port")
    if not readiness:
        return
    for name in ("periodSeconds", "initialDelaySeconds"):
        if probe.get(name, 0) < 0:
            yield out_of_bounds(f"{at}.{name}", probe[name], 0, MAX_INT32)
    if probe["successThreshold"] < 1:
        yield out_of_bounds(f"{at}.successThreshold", probe["successThreshold"], 1, MAX_INT32)
    for name in ("failureThreshold", "timeoutSeconds"):
        number = probe.get(name, 0)
        if not probe.get("periodSeconds"):
            if number != 0:
                yield Violation(f"{at}.{name}", f"{name} is disallowed when periodSeconds is zero")
        elif number < 1:
            yield out_of_bounds(f"{at}.{name}", number, 1, MAX_INT32)


def _with_defaults(probe: Fields, *, serving: bool) -> Fields:
    """A copy of a readiness probe with Knative's defaults filled in. serving: False for a sidecar.

    A period of 0 means Knative's own probing every 50 ms; Kubernetes' defaults apply only with a period.
    """
    filled = dict(probe)
    if serving and not any(name in probe for name in _HANDLERS):
        filled["tcpSocket"] = {}
    filled["successThreshold"] = probe.get("successThreshold") or 1
    if probe.get("periodSeconds"):
        filled["failureThreshold"] = probe.get("failureThreshold") or 3
        filled["timeoutSeconds"] = probe.get("timeoutSeconds") or 1
    return filled
