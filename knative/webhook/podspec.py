"""The pod of a revision, as Knative's webhook takes it (pkg/apis/serving/k8s_validation.go, fieldmask.go)."""

from typing import Any, Final

from knative.webhook.containers import container
from knative.webhook.feature_flags import POD_FIELDS, FeatureFlags
from knative.webhook.values import is_dns_1123_subdomain
from knative.webhook.violation import Violation, Violations, disallowed, invalid, missing
from knative.webhook.volumes import volumes

_MAX_TIMEOUT_SECONDS: Final = 600
_MAX_CONTAINER_CONCURRENCY: Final = 1000
_POINTERS: Final = ("affinity", "dnsConfig", "runtimeClassName", "securityContext", "shareProcessNamespace")
"""Fields of which Go tells an empty value from an absent one."""
_SECURITY: Final = ("runAsUser", "runAsGroup", "runAsNonRoot", "fsGroup", "supplementalGroups", "seccompProfile")
_SECCOMP_TYPES: Final = ("RuntimeDefault", "Unconfined")
_NOT_IN_INIT: Final = ("livenessProbe", "readinessProbe", "startupProbe", "lifecycle")


def revision_spec(spec: dict[str, Any], at: str, features: FeatureFlags) -> Violations:
    """`spec.template.spec`: the pod, and Knative's own fields beside it."""
    yield from _pod(spec, at, features)
    timeout = spec.get("timeoutSeconds", 0)
    if not 0 <= timeout <= _MAX_TIMEOUT_SECONDS:
        yield Violation(f"{at}.timeoutSeconds", f"expected 0 <= {timeout} <= {_MAX_TIMEOUT_SECONDS}")
    concurrency = spec.get("containerConcurrency", 0)
    if not 0 <= concurrency <= _MAX_CONTAINER_CONCURRENCY:
        yield Violation(f"{at}.containerConcurrency", f"expected 0 <= {concurrency} <= {_MAX_CONTAINER_CONCURRENCY}")


def _pod(spec: dict[str, Any], at: str, features: FeatureFlags) -> Violations:
    for name, flag in POD_FIELDS.items():
        given = spec.get(name) is not None if name in _POINTERS else bool(spec.get(name))
        secured = name == "securityContext" and features.secure_pod_defaults  # which looks at it by itself
        if given and not secured and not features.let_through(flag):
            yield disallowed(f"{at}.{name}", flag)
    if spec.get("automountServiceAccountToken"):
        yield disallowed(f"{at}.automountServiceAccountToken")
    if isinstance(security := spec.get("securityContext"), dict):
        yield from _security_context(security, f"{at}.securityContext", features)
    first, containers = spec.get("initContainers", []), spec.get("containers", [])
    mounted = {mount["name"] for item in (*first, *containers) for mount in item.get("volumeMounts", [])}
    yield from volumes(spec.get("volumes", []), mounted, f"{at}.volumes", features)
    yield from _ports(containers, at)
    by_name = {volume["name"]: volume for volume in spec.get("volumes", [])}
    yield from _init_containers(first, by_name, at, features)
    yield from _containers(containers, by_name, at, features)
    account = spec.get("serviceAccountName", "")
    if account and not is_dns_1123_subdomain(account):
        yield invalid(f"{at}.serviceAccountName", account, "not a DNS 1123 subdomain")


def _security_context(security: dict[str, Any], at: str, features: FeatureFlags) -> Violations:
    """The pod's own; what a container may set is in `containers`."""
    flag = POD_FIELDS["securityContext"]
    for name in security:
        if name not in _SECURITY:
            yield disallowed(f"{at}.{name}")
        elif not features.let_through(flag) and not _opted_out(name, security[name], features):
            yield disallowed(f"{at}.{name}", flag)


def _opted_out(name: str, value: Any, features: FeatureFlags) -> bool:
    """secure-pod-defaults lets a pod choose its seccomp profile."""
    return features.secure_pod_defaults and name == "seccompProfile" and value in [{"type": kind} for kind in _SECCOMP_TYPES]


def _init_containers(
    items: list[dict[str, Any]], by_name: dict[str, dict[str, Any]], at: str, features: FeatureFlags
) -> Violations:
    if not features.let_through(POD_FIELDS["initContainers"]):
        if items:
            yield Violation(f"{at}.initContainers", "pod spec support for init-containers is off")
        return
    for index, item in enumerate(items):
        field = f"{at}.initContainers[{index}]"
        for name in _NOT_IN_INIT:
            if name in item:
                yield Violation(f"{field}.{name}", "field not allowed in an init container")
        plain = {name: value for name, value in item.items() if name not in _NOT_IN_INIT}
        yield from container(plain, by_name, None, field, features)


def _ports(containers: list[dict[str, Any]], at: str) -> Violations:
    """Exactly one port over all containers; a lone container may leave it out."""
    count = sum(len(item.get("ports", [])) for item in containers)
    if count == 0 and len(containers) > 1:
        yield missing(f"{at}.containers[*].ports")
    elif count > 1:
        yield Violation(
            f"{at}.containers[*].ports",
            "more than one container port is set (only a single port is allowed across all containers)",
        )


def _containers(
    containers: list[dict[str, Any]], by_name: dict[str, dict[str, Any]], at: str, features: FeatureFlags
) -> Violations:
    if not containers:
        yield missing(f"{at}.containers")
    port_name = next((item["ports"][0].get("name") for item in containers if item.get("ports")), None) or "http"
    names: set[str] = set()
    for index, item in enumerate(containers):
        field = f"{at}.containers[{index}]"
        name = item.get("name", "")
        if name and name in names:
            yield Violation(f"{field}.name", f'duplicate container name "{name}"')
        names.add(name)
        serving = len(containers) == 1 or bool(item.get("ports"))
        yield from container(item, by_name, port_name if serving else None, field, features)
