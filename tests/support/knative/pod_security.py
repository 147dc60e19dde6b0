"""The Pod Security Standard "restricted", all of its documented controls and those of "baseline".

https://kubernetes.io/docs/concepts/security/pod-security-standards/
"""

from collections.abc import Iterator
from typing import Any, Final

# Volume types that "restricted" allows.
_VOLUMES: Final = frozenset(
    ("configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret")
)
_SELINUX_TYPES: Final = (None, "", "container_t", "container_init_t", "container_kvm_t", "container_engine_t")
_SYSCTLS: Final = frozenset(
    (
        "kernel.shm_rmid_forced",
        "net.ipv4.ip_local_port_range",
        "net.ipv4.ip_unprivileged_port_start",
        "net.ipv4.tcp_syncookies",
        "net.ipv4.ping_group_range",
        "net.ipv4.ip_local_reserved_ports",
        "net.ipv4.tcp_keepalive_time",
        "net.ipv4.tcp_fin_timeout",
        "net.ipv4.tcp_keepalive_intvl",
        "net.ipv4.tcp_keepalive_probes",
        "net.ipv4.tcp_rmem",
        "net.ipv4.tcp_wmem",
    )
)
_APPARMOR: Final = "container.apparmor.security.beta.kubernetes.io/"
_HANDLERS: Final = ("livenessProbe", "readinessProbe", "startupProbe")


def restricted_violations(pod: dict[str, Any], annotations: dict[str, str] | None = None) -> list[str]:
    """One line for each control that a pod's spec violates. annotations: of the pod."""
    found = [*_pod_violations(pod), *(line for each in _containers(pod) for line in _container_violations(pod, each))]
    for key, value in (annotations or {}).items():
        if key.startswith(_APPARMOR) and value != "runtime/default" and not value.startswith("localhost/"):
            found.append(f"AppArmor: {key} is {value}")
    return found


def _containers(pod: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for field in ("initContainers", "containers", "ephemeralContainers"):
        yield from pod.get(field) or ()


def _pod_violations(pod: dict[str, Any]) -> Iterator[str]:
    context = pod.get("securityContext") or {}
    for field in ("hostNetwork", "hostPID", "hostIPC"):
        if pod.get(field):
            yield f"Host Namespaces: {field}"
    for volume in pod.get("volumes") or ():
        for kind in set(volume) - {"name"} - _VOLUMES:
            yield f"Volume Types: {volume['name']} is of type {kind}"
    for sysctl in context.get("sysctls") or ():
        if sysctl["name"] not in _SYSCTLS:
            yield f"Sysctls: {sysctl['name']}"
    yield from _context_violations("the pod", context)


def _context_violations(owner: str, context: dict[str, Any]) -> Iterator[str]:
    """Controls that a pod and a container have in common: of what is set there."""
    if (context.get("windowsOptions") or {}).get("hostProcess"):
        yield f"HostProcess: {owner}"
    if context.get("runAsUser") == 0:
        yield f"Running as Non-root user: {owner} runs as 0"
    selinux = context.get("seLinuxOptions") or {}
    if selinux.get("type") not in _SELINUX_TYPES or selinux.get("user") or selinux.get("role"):
        yield f"SELinux: {owner}"
    if (context.get("appArmorProfile") or {"type": None})["type"] not in (None, "RuntimeDefault", "Localhost"):
        yield f"AppArmor: {owner}"
    if (context.get("seccompProfile") or {"type": None})["type"] not in (None, "RuntimeDefault", "Localhost"):
        yield f"Seccomp: {owner}"


def _container_violations(pod: dict[str, Any], container: dict[str, Any]) -> Iterator[str]:
    name, of_pod, own = container["name"], pod.get("securityContext") or {}, container.get("securityContext") or {}
    yield from _context_violations(name, own)
    if own.get("privileged"):
        yield f"Privileged Containers: {name}"
    if own.get("allowPrivilegeEscalation") is not False:
        yield f"Privilege Escalation: {name} does not forbid it"
    if own.get("runAsNonRoot", of_pod.get("runAsNonRoot")) is not True:
        yield f"Running as Non-root: {name} may run as root"
    if not own.get("seccompProfile", of_pod.get("seccompProfile")):
        yield f"Seccomp: {name} has no profile"
    capabilities = own.get("capabilities") or {}
    if "ALL" not in (capabilities.get("drop") or ()):
        yield f"Capabilities: {name} does not drop ALL"
    if extra := set(capabilities.get("add") or ()) - {"NET_BIND_SERVICE"}:
        yield f"Capabilities: {name} adds {', '.join(sorted(extra))}"
    if own.get("procMount", "Default") != "Default":
        yield f"/proc Mount Type: {name}"
    if any(port.get("hostPort") for port in container.get("ports") or ()):
        yield f"Host Ports: {name}"
    lifecycle = container.get("lifecycle") or {}
    for handler in [*(container.get(probe) for probe in _HANDLERS), lifecycle.get("postStart"), lifecycle.get("preStop")]:
        if any((handler or {}).get(kind, {}).get("host") for kind in ("httpGet", "tcpSocket")):
            yield f"Host Probes / Lifecycle Hooks: {name}"
