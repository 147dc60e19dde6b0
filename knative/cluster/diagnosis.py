"""Why a Service does not become Ready: what a person would look up with five kubectl commands."""

from dataclasses import dataclass
from typing import Any, Final

from knative.cluster.client import Cluster, Ref
from knative.spec.kubernetes_object import KubernetesObject

SERVING: Final = "serving.knative.dev/v1"
_CONTAINER: Final = "function"
_LOG_LINES: Final = 10
_EVENTS: Final = 5
_HOPELESS: Final = ("ErrImagePull", "ImagePullBackOff", "InvalidImageName", "CrashLoopBackOff", "CreateContainerConfigError")
"""Waiting reasons of a container that time does not mend."""
_NEXT_STEPS: Final = {
    "exceeded quota": "lower the resources in the spec, or have the quota raised",
    "ImagePull": "check the image's name and tag, and that the cluster may pull it",
    "InvalidImageName": "check the image's name in the spec",
    "CreateContainerConfigError": "make the Secret or key that it names",
    "OOMKilled": "give the stage more memory, or a smaller kv_cache",
    "CrashLoopBackOff": "the last log lines say what the function lacks",
    "Insufficient": "no node has room: lower the resources in the spec, or add nodes",
}
"""What is found in a diagnosis → what to do about it; the first that fits."""


@dataclass(frozen=True, slots=True)
class Readiness:
    """Of one Service: `ready` True, False (it failed) or None (not known yet), with Knative's own reason."""

    ready: bool | None
    reason: str = ""


def readiness(service: KubernetesObject) -> Readiness:
    """As of the generation that was applied last; a condition of an older one says nothing."""
    status = service.get("status") or {}
    if status.get("observedGeneration") != service["metadata"].get("generation"):
        return Readiness(None, "not seen by Knative yet")
    condition = condition_of(service, "Ready")
    reason = ": ".join(part for part in (condition.get("reason"), condition.get("message")) if part)
    return Readiness({"True": True, "False": False}.get(condition.get("status", "")), reason)


def condition_of(manifest: KubernetesObject, kind: str) -> dict[str, Any]:
    conditions = (manifest.get("status") or {}).get("conditions") or []
    return next((condition for condition in conditions if condition.get("type") == kind), {})


def hopeless_pod(cluster: Cluster, service: KubernetesObject) -> str | None:
    """What is wrong with a pod of the newest revision that time does not mend; Knative itself waits for its deadline."""
    for pod in newest_pods(cluster, service):
        for state in _container_states(pod):
            reason = (state.get("waiting") or {}).get("reason")
            if reason in _HOPELESS:
                return f"{reason}: {state['waiting'].get('message', 'no message')}"
    return None


def diagnose(cluster: Cluster, service: KubernetesObject) -> list[str]:
    """Conditions, containers, warnings and the last log lines, each a line that names its source."""
    namespace, name = service["metadata"]["namespace"], service["metadata"]["name"]
    lines = [f"Service {name}: {text}" for text in _failed_conditions(service)]
    revision_name = (service.get("status") or {}).get("latestCreatedRevisionName")
    if revision_name:
        revision = cluster.get(Ref(SERVING, "Revision", namespace, revision_name))
        lines += [f"Revision {revision_name}: {text}" for text in _failed_conditions(revision or {})]
    pods = newest_pods(cluster, service)
    for pod in pods:
        lines += _pod_lines(pod)
    lines += _warnings(cluster, namespace, revision_name or name)
    for pod in pods[:1]:
        lines += _log_lines(cluster, pod)
    return list(dict.fromkeys(lines))


def next_step(diagnosis: list[str]) -> str:
    text = "\n".join(diagnosis)
    known = next((step for sign, step in _NEXT_STEPS.items() if sign in text), "mend what is said above")
    return f"next: {known}, and deploy again; what served before still does"


def newest_pods(cluster: Cluster, service: KubernetesObject) -> list[KubernetesObject]:
    revision = (service.get("status") or {}).get("latestCreatedRevisionName")
    if not revision:
        return []
    return cluster.find("v1", "Pod", service["metadata"]["namespace"], f"serving.knative.dev/revision={revision}")


def _failed_conditions(manifest: KubernetesObject) -> list[str]:
    conditions = (manifest.get("status") or {}).get("conditions") or []
    failed = [condition for condition in conditions if condition.get("status") != "True" and condition.get("message")]
    return [f"{condition['type']} {condition.get('reason', '')}: {condition['message']}" for condition in failed]


def _container_states(pod: KubernetesObject) -> list[dict[str, Any]]:
    statuses = (pod.get("status") or {}).get("containerStatuses") or []
    return [status.get("state") or {} for status in statuses]


def _pod_lines(pod: KubernetesObject) -> list[str]:
    name = pod["metadata"]["name"]
    lines = []
    for status in (pod.get("status") or {}).get("containerStatuses") or []:
        waiting = (status.get("state") or {}).get("waiting")
        ended = (status.get("lastState") or {}).get("terminated") or (status.get("state") or {}).get("terminated")
        where = f"Pod {name}, container {status['name']}"
        if waiting:
            lines.append(f"{where}: waiting, {waiting.get('reason')}: {waiting.get('message', 'no message')}")
        if ended:
            count = status.get("restartCount", 0)
            lines.append(f"{where}: ended with {ended.get('exitCode')} ({ended.get('reason')}), {count} restarts")
    return lines


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
    namespace, name = pod["metadata"]["namespace"], pod["metadata"]["name"]
    crashed = cluster.log_tail(namespace, name, _CONTAINER, _LOG_LINES, previous=True)
    lines = crashed or cluster.log_tail(namespace, name, _CONTAINER, _LOG_LINES)
    return [f"log of {name}: {line}" for line in lines]
