"""The pod of a revision, as Knative's webhook takes it with its default feature flags (pkg/apis/serving/k8s_validation.go)."""

from typing import Any, Final

from knative.webhook.containers import container, disallowed_fields
from knative.webhook.values import is_dns_1123_subdomain
from knative.webhook.violation import Violation, Violations, disallowed, invalid, missing
from knative.webhook.volumes import volumes

_MAX_TIMEOUT_SECONDS: Final = 600
_MAX_CONTAINER_CONCURRENCY: Final = 1000
_FLAGGED: Final = (
    "dnsPolicy",
    "hostAliases",
    "hostIPC",
    "hostNetwork",
    "hostPID",
    "initContainers",
    "nodeSelector",
    "priorityClassName",
    "schedulerName",
    "tolerations",
    "topologySpreadConstraints",
)
"""Behind feature flags that are off by default; an empty value counts as absent."""
_FLAGGED_POINTERS: Final = ("affinity", "dnsConfig", "runtimeClassName", "securityContext", "shareProcessNamespace")
"""The same, but Go tells an empty value from an absent one."""


def revision_spec(spec: dict[str, Any], at: str) -> Violations:
    """`spec.template.spec`: the pod, and Knative's own fields beside it."""
    yield from _pod(spec, at)
    timeout = spec.get("timeoutSeconds", 0)
    if not 0 <= timeout <= _MAX_TIMEOUT_SECONDS:
        yield Violation(f"{at}.timeoutSeconds", f"expected 0 <= {timeout} <= {_MAX_TIMEOUT_SECONDS}")
    concurrency = spec.get("containerConcurrency", 0)
    if not 0 <= concurrency <= _MAX_CONTAINER_CONCURRENCY:
        yield Violation(f"{at}.containerConcurrency", f"expected 0 <= {concurrency} <= {_MAX_CONTAINER_CONCURRENCY}")


def _pod(spec: dict[str, Any], at: str) -> Violations:
    yield from disallowed_fields(spec, _FLAGGED, _FLAGGED_POINTERS, at)
    if spec.get("automountServiceAccountToken"):
        yield disallowed(f"{at}.automountServiceAccountToken")
    if isinstance(security := spec.get("securityContext"), dict):
        yield from disallowed_fields(security, (), tuple(security), f"{at}.securityContext")
    if spec.get("initContainers"):
        yield Violation(f"{at}.initContainers", "pod spec support for init-containers is off")
    containers = spec.get("containers", [])
    mounted = {mount["name"] for item in containers for mount in item.get("volumeMounts", [])}
    yield from volumes(spec.get("volumes", []), mounted, f"{at}.volumes")
    yield from _ports(containers, at)
    yield from _containers(containers, {volume["name"]: volume for volume in spec.get("volumes", [])}, at)
    account = spec.get("serviceAccountName", "")
    if account and not is_dns_1123_subdomain(account):
        yield invalid(f"{at}.serviceAccountName", account, "not a DNS 1123 subdomain")


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


def _containers(containers: list[dict[str, Any]], by_name: dict[str, dict[str, Any]], at: str) -> Violations:
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
        yield from container(item, by_name, port_name if serving else None, field)
