"""Why an object does not become Ready: what a user would look up with five kubectl commands.

If a right is missing, only the part that needs it is left out.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from knative.cluster.client import Cluster, Ref
from knative.cluster.errors import NotPermitted
from knative.cluster.objects import (
    SERVING,
    container_statuses,
    failed_conditions,
    function_container,
    newest_pods,
    newest_revision,
)
from knative.spec.kubernetes_object import KubernetesObject

_LOG_LINES: Final = 10
_EVENTS: Final = 5
# Reasons why a container waits that last until the Service or the cluster is changed.
_HOPELESS: Final = ("ErrImagePull", "ImagePullBackOff", "InvalidImageName", "CrashLoopBackOff", "CreateContainerConfigError")
_NEXT_STEPS: Final = {
    "exceeded quota": "lower the resources in the spec, or have the quota raised",
    "ImagePull": "check the image's name and tag, and that the cluster may pull it",
    "InvalidImageName": "check the image's name in the spec",
    "CreateContainerConfigError": "create the Secret or key that it names",
    "OOMKilled": "give the stage more memory, or a smaller kv_cache",
    "CrashLoopBackOff": "the last log lines say what the function lacks",
    "Insufficient": "no node has enough resources: lower them in the spec, or add nodes",
    "NotOwned": "delete it, or give the pipeline another name",
    "dead letter sink": "create the sink that eventing.dead_letter_sink names, or name another",
}
"""Text in a diagnosis → what to do; the first that is found counts."""


@dataclass(frozen=True, slots=True)
class HopelessPod:
    """A pod with a container that will not start without a change, for example of its image.

    restarts: of that container so far.
    """

    name: str
    restarts: int
    reason: str


def hopeless_pods(cluster: Cluster, service: KubernetesObject) -> Iterator[HopelessPod]:
    """Yields the hopeless pods of the Service's newest revision; nothing if listing pods is not permitted."""
    try:
        pods = newest_pods(cluster, service)
    except NotPermitted:
        return
    for pod in pods:
        for status in container_statuses(pod):
            waiting = (status.get("state") or {}).get("waiting") or {}
            if waiting.get("reason") in _HOPELESS:
                reason = f"{waiting['reason']}: {waiting.get('message', 'no message')}"
                yield HopelessPod(pod["metadata"]["name"], status.get("restartCount", 0), reason)


def diagnose(cluster: Cluster, manifest: KubernetesObject) -> list[str]:
    """Lines that say why an object is not Ready; each names the object or log that it comes from.

    They are failed conditions and warning events; for a Service also its revision, containers and last log lines.
    """
    namespace, name = manifest["metadata"]["namespace"], manifest["metadata"]["name"]
    lines = [f"{manifest['kind']} {name}: {text}" for text in failed_conditions(manifest)]

    def look(what: str, read: Callable[[], list[str]]) -> None:
        try:
            lines.extend(read())
        except NotPermitted as error:
            lines.append(f"not looked at: {what}: {error}")

    pods: list[KubernetesObject] = []
    prefix = name
    if manifest["apiVersion"] == SERVING:
        revision = newest_revision(cluster, manifest)
        if revision is not None:
            prefix = revision
            look("the revision", lambda: _revision_lines(cluster, namespace, revision))

        def read_pods() -> list[str]:
            pods.extend(newest_pods(cluster, manifest))
            return [line for pod in pods for line in _pod_lines(pod)]

        look("pods", read_pods)
    look("events", lambda: _warnings(cluster, namespace, prefix))
    if pods:
        look("the log", lambda: _log_lines(cluster, pods[0]))
    return list(dict.fromkeys(lines))


def next_step(diagnosis: list[str]) -> str:
    text = "\n".join(diagnosis)
    step = next((step for sign, step in _NEXT_STEPS.items() if sign in text), "fix the cause above")
    return f"next: {step}, and deploy again, or `rollback`, which removes the leftovers; the previous pipeline still serves"


def _revision_lines(cluster: Cluster, namespace: str, name: str) -> list[str]:
    revision = cluster.get(Ref(SERVING, "Revision", namespace, name))
    return [f"Revision {name}: {text}" for text in failed_conditions(revision or {})]


def _pod_lines(pod: KubernetesObject) -> list[str]:
    """Lines about containers of the pod that wait or have ended, and about the pod itself if it was evicted."""
    name, status = pod["metadata"]["name"], pod.get("status") or {}
    lines = []
    if status.get("reason"):
        lines.append(f"Pod {name}: {status['reason']}: {status.get('message', 'no message')}")
    for each in container_statuses(pod):
        waiting = (each.get("state") or {}).get("waiting")
        ended = (each.get("lastState") or {}).get("terminated") or (each.get("state") or {}).get("terminated")
        where = f"Pod {name}, container {each['name']}"
        if waiting:
            lines.append(f"{where}: waiting, {waiting.get('reason')}: {waiting.get('message', 'no message')}")
        if ended:
            count = each.get("restartCount", 0)
            lines.append(f"{where}: ended with {ended.get('exitCode')} ({ended.get('reason')}), {count} restarts")
    return lines


def _warnings(cluster: Cluster, namespace: str, prefix: str) -> list[str]:
    """The last five warning events about objects whose names begin with `prefix`, such as a revision's name."""
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
