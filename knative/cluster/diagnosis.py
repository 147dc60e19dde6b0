"""Why an object does not become Ready: what a person would look up with five kubectl commands.

A right that is missing takes away the part that it is needed for, never the rest.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

from knative.cluster.client import Cluster, Ref
from knative.cluster.errors import NotPermitted
from knative.cluster.readiness import REVISION_LABEL, SERVING, newest_revision
from knative.spec.kubernetes_object import KubernetesObject

_LOG_LINES: Final = 10
_EVENTS: Final = 5
_HOPELESS: Final = ("ErrImagePull", "ImagePullBackOff", "InvalidImageName", "CrashLoopBackOff", "CreateContainerConfigError")
"""Waiting reasons of a container that time does not mend."""
_SIDECAR: Final = "queue-proxy"
_NEXT_STEPS: Final = {
    "exceeded quota": "lower the resources in the spec, or have the quota raised",
    "ImagePull": "check the image's name and tag, and that the cluster may pull it",
    "InvalidImageName": "check the image's name in the spec",
    "CreateContainerConfigError": "make the Secret or key that it names",
    "OOMKilled": "give the stage more memory, or a smaller kv_cache",
    "CrashLoopBackOff": "the last log lines say what the function lacks",
    "Insufficient": "no node has room: lower the resources in the spec, or add nodes",
    "dead letter sink": "make the sink that eventing.dead_letter_sink names, or name another",
}
"""What is found in a diagnosis → what to do about it; the first that fits."""


@dataclass(frozen=True, slots=True)
class HopelessPod:
    """A pod with a container that time does not mend, as often as that was tried."""

    name: str
    restarts: int
    reason: str


def hopeless_pod(
    cluster: Cluster, service: KubernetesObject, known: frozenset[HopelessPod] = frozenset()
) -> HopelessPod | None:
    """One of the newest revision, but for those that are as they were `known` to be; Knative waits for its own deadline."""
    return next((pod for pod in hopeless_pods(cluster, service) if pod not in known), None)


def hopeless_pods(cluster: Cluster, service: KubernetesObject) -> Iterator[HopelessPod]:
    """None where nobody may look."""
    try:
        pods = newest_pods(cluster, service)
    except NotPermitted:
        return
    for pod in pods:
        for status in _container_statuses(pod):
            waiting = (status.get("state") or {}).get("waiting") or {}
            if waiting.get("reason") in _HOPELESS:
                reason = f"{waiting['reason']}: {waiting.get('message', 'no message')}"
                yield HopelessPod(pod["metadata"]["name"], status.get("restartCount", 0), reason)


def diagnose(cluster: Cluster, manifest: KubernetesObject) -> list[str]:
    """Conditions and, of a Service, its revision, containers, warnings and last log lines; a line names its source."""
    namespace, name = manifest["metadata"]["namespace"], manifest["metadata"]["name"]
    lines = [f"{manifest['kind']} {name}: {text}" for text in failed_conditions(manifest)]
    revision: str | None = None
    pods: list[KubernetesObject] = []
    if manifest["apiVersion"] == SERVING:
        revision = newest_revision(cluster, manifest)
        lines += _looked_up(lambda: _revision_lines(cluster, namespace, revision), "the revision")
        try:
            pods = newest_pods(cluster, manifest)
        except NotPermitted as error:
            lines.append(f"not looked at: pods: {error}")
    for pod in pods:
        lines += pod_lines(pod)
    lines += _looked_up(lambda: _warnings(cluster, namespace, revision or name), "events")
    for pod in pods[:1]:
        lines += _looked_up(lambda pod=pod: _log_lines(cluster, pod), "the log")  # type: ignore[misc]
    return list(dict.fromkeys(lines))


def next_step(diagnosis: list[str]) -> str:
    text = "\n".join(diagnosis)
    known = next((step for sign, step in _NEXT_STEPS.items() if sign in text), "mend what is said above")
    return (
        f"next: {known}, and deploy again, or `rollback`, which also takes away what this left; what served before still does"
    )


def newest_pods(cluster: Cluster, service: KubernetesObject) -> list[KubernetesObject]:
    """Raises NotPermitted."""
    revision = newest_revision(cluster, service)
    if revision is None:
        return []
    return cluster.find("v1", "Pod", service["metadata"]["namespace"], f"{REVISION_LABEL}={revision}")


def function_container(pod: KubernetesObject) -> str:
    """Rendered as `function`; kn renames it. Knative's own beside it is queue-proxy."""
    names: list[str] = [container["name"] for container in pod["spec"]["containers"]]
    return next((name for name in names if name != _SIDECAR), str(names[0]))


def failed_conditions(manifest: KubernetesObject) -> list[str]:
    conditions = (manifest.get("status") or {}).get("conditions") or []
    failed = [condition for condition in conditions if condition.get("status") != "True" and condition.get("message")]
    return [f"{condition['type']} {condition.get('reason', '')}: {condition['message']}" for condition in failed]


def pod_lines(pod: KubernetesObject) -> list[str]:
    """What is wrong with its containers, and with itself where it was evicted."""
    name, status = pod["metadata"]["name"], pod.get("status") or {}
    lines = []
    if status.get("reason"):
        lines.append(f"Pod {name}: {status['reason']}: {status.get('message', 'no message')}")
    for each in _container_statuses(pod):
        waiting = (each.get("state") or {}).get("waiting")
        ended = (each.get("lastState") or {}).get("terminated") or (each.get("state") or {}).get("terminated")
        where = f"Pod {name}, container {each['name']}"
        if waiting:
            lines.append(f"{where}: waiting, {waiting.get('reason')}: {waiting.get('message', 'no message')}")
        if ended:
            count = each.get("restartCount", 0)
            lines.append(f"{where}: ended with {ended.get('exitCode')} ({ended.get('reason')}), {count} restarts")
    return lines


def _looked_up(look: Callable[[], list[str]], what: str) -> list[str]:
    try:
        return look()
    except NotPermitted as error:
        return [f"not looked at: {what}: {error}"]


def _revision_lines(cluster: Cluster, namespace: str, name: str | None) -> list[str]:
    revision = cluster.get(Ref(SERVING, "Revision", namespace, name)) if name else None
    return [f"Revision {name}: {text}" for text in failed_conditions(revision or {})]


def _container_statuses(pod: KubernetesObject) -> list[dict[str, Any]]:
    statuses: list[dict[str, Any]] = (pod.get("status") or {}).get("containerStatuses") or []
    return statuses


def _warnings(cluster: Cluster, namespace: str, prefix: str) -> list[str]:
    """Events of whatever Knative made for the revision: its Deployment, ReplicaSet and Pods carry its name in front."""
    events = [
        event
        for event in cluster.find("v1", "Event", namespace)
        if event.get("type") == "Warning" and event["involvedObject"].get("name", "").startswith(prefix)
    ]
    events.sort(key=lambda event: str(event.get("lastTimestamp") or event.get("eventTime") or ""))
    return [
        f"{event['involvedObject']['kind']} {event['involvedObject']['name']}: {event.get('reason')}: {event.get('message')}"
        for event in events[-_EVENTS:]
    ]


def _log_lines(cluster: Cluster, pod: KubernetesObject) -> list[str]:
    namespace, name, container = pod["metadata"]["namespace"], pod["metadata"]["name"], function_container(pod)
    crashed = cluster.log_tail(namespace, name, container, _LOG_LINES, previous=True)
    lines = crashed or cluster.log_tail(namespace, name, container, _LOG_LINES)
    return [f"log of {name}: {line}" for line in lines]
