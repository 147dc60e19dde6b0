"""What a pipeline on a cluster is doing: a row for each revision that gets requests, and why something is not as it should."""

from collections.abc import Iterator
from typing import Any, Final

from knative.cluster.advice import pinned_elsewhere, unreachable_url
from knative.cluster.client import Cluster
from knative.cluster.diagnosis import diagnose, failed_conditions
from knative.cluster.errors import NotPermitted
from knative.cluster.history import COMPONENT, INSTANCE, MANAGED_BY, PIPELINE, History, Outcome, last_served
from knative.cluster.lease import lease_ref, told
from knative.cluster.pod_network import followed_networks, refused_pods
from knative.cluster.readiness import REVISION_LABEL, SERVICE_LABEL, SERVING, readiness, traffic_of
from knative.spec.kubernetes_object import KubernetesObject

COLUMNS: Final = (
    "service",
    "ready",
    "pods",
    "starting",
    "leaving",
    "desired",
    "restarts",
    "revision",
    "traffic",
    "pipeline",
    "url",
)
_SCALING: Final = ("autoscaling.internal.knative.dev/v1alpha1", "PodAutoscaler")
_EVENTING: Final = (
    ("eventing.knative.dev/v1", "Broker"),
    ("flows.knative.dev/v1", "Sequence"),
    ("eventing.knative.dev/v1", "Trigger"),
)


def cluster_status(cluster: Cluster, namespace: str, name: str) -> dict[str, Any]:
    """`services`: gateway first, each with its revisions; `eventing`; `notes`: who deploys, what was deployed; `troubles`."""
    services = services_of(cluster, namespace, name)
    selector = f"{INSTANCE}={name},{MANAGED_BY}=lamina"
    pods = cluster.find("v1", "Pod", namespace, selector)
    desired = _desired(cluster, namespace, selector)
    eventing = [
        each
        for api_version, kind in _EVENTING
        if services and cluster.serves(api_version, kind)
        for each in cluster.find(api_version, kind, namespace, selector)
    ]
    return {
        "services": [_service(each, pods, desired) for each in services],
        "eventing": [_eventing(each) for each in eventing],
        "notes": list(_notes(cluster, namespace, name)) if services else [],
        "troubles": [*_troubles(cluster, services, eventing, name), *_not_followed(services, pods, name)],
    }


def status_rows(status: dict[str, Any]) -> list[tuple[str, ...]]:
    """For a table under COLUMNS."""
    return [
        (
            service["name"],
            service["ready"],
            *(str(revision[key]) for key in ("ready", "starting", "leaving", "desired", "restarts", "name")),
            f"{revision['percent']} %",
            revision["pipeline"],
            service["url"],
        )
        for service in status["services"]
        for revision in service["revisions"]
    ]


def status_lines(status: dict[str, Any]) -> list[str]:
    """What the table has no place for."""
    eventing = [f"{each['kind']} {each['name']}: {each['ready']}{each['reason']}" for each in status["eventing"]]
    return [*status["notes"], *eventing, *status["troubles"]]


def services_of(cluster: Cluster, namespace: str, name: str) -> list[KubernetesObject]:
    """The pipeline's Services: gateway first, then stages by name."""
    found = cluster.find(SERVING, "Service", namespace, f"{INSTANCE}={name},{MANAGED_BY}=lamina")
    return sorted(found, key=lambda service: (service["metadata"]["name"] != name, service["metadata"]["name"]))


def phase_of(pod: KubernetesObject) -> str:
    """ready, starting, leaving, or over."""
    status = pod.get("status") or {}
    if status.get("phase") in ("Succeeded", "Failed"):
        return "over"
    if pod["metadata"].get("deletionTimestamp"):
        return "leaving"
    containers = status.get("containerStatuses") or []
    return "ready" if containers and all(each.get("ready") for each in containers) else "starting"


def _service(service: KubernetesObject, pods: list[KubernetesObject], desired: dict[str, int]) -> dict[str, Any]:
    metadata, status = service["metadata"], service.get("status") or {}
    traffic = traffic_of(service)
    own = [pod for pod in pods if pod["metadata"]["labels"].get(SERVICE_LABEL) == metadata["name"]]
    names = dict.fromkeys(
        [*sorted(traffic), *(pod["metadata"]["labels"].get(REVISION_LABEL, "") for pod in own if phase_of(pod) != "over")]
    )
    newest = status.get("latestCreatedRevisionName", "")
    fallback = metadata["labels"].get(PIPELINE, "")
    return {
        "name": metadata["name"],
        "ready": readiness(service).word,
        "url": status.get("url", ""),
        "revisions": [_revision(each, own, desired, traffic, fallback) for each in names or {newest: None}],
    }


def _revision(
    name: str, pods: list[KubernetesObject], desired: dict[str, int], traffic: dict[str, int], fallback: str
) -> dict[str, Any]:
    own = [pod for pod in pods if pod["metadata"]["labels"].get(REVISION_LABEL) == name]
    phases = [phase_of(pod) for pod in own]
    return {
        "name": name,
        "percent": traffic.get(name, 0),
        "pipeline": own[0]["metadata"]["labels"].get(PIPELINE, fallback) if own else fallback,
        "desired": desired.get(name, "-"),
        "restarts": sum(each.get("restartCount", 0) for pod in own for each in pod["status"].get("containerStatuses") or []),
        **{phase: phases.count(phase) for phase in ("ready", "starting", "leaving")},
    }


def _desired(cluster: Cluster, namespace: str, selector: str) -> dict[str, int]:
    """Revision → pods that the autoscaler wants; empty where nobody may look."""
    try:
        found = cluster.find(*_SCALING, namespace, selector) if cluster.serves(*_SCALING) else []
    except NotPermitted:
        return {}
    return {each["metadata"]["name"]: (each.get("status") or {}).get("desiredScale", 0) for each in found}


def _eventing(manifest: KubernetesObject) -> dict[str, Any]:
    state = readiness(manifest)
    return {
        "kind": manifest["kind"],
        "name": manifest["metadata"]["name"],
        "ready": {True: "ready", False: "NOT ready", None: "not ready yet"}[state.ready],
        "reason": f", {state.reason}" if state.reason and not state.ready else "",
    }


def _notes(cluster: Cluster, namespace: str, name: str) -> Iterator[str]:
    """The newest version, the one that serves where that is another, and who is at work."""
    try:
        versions = History(cluster, namespace, name).versions()
        lease = cluster.get(lease_ref(namespace, name))
    except NotPermitted as error:
        yield f"versions not looked at: {error}"
        return
    serving = last_served(versions)
    if serving is not None:
        yield f"version {serving.number} serves, pipeline {serving.fingerprint}"
    if versions and versions[-1].outcome is not Outcome.SERVED:
        newest = versions[-1]
        reason = f", {newest.reason}" if newest.reason else ""
        yield f"version {newest.number}, pipeline {newest.fingerprint}: {newest.outcome}{reason}"
    if lease is not None:
        yield f"being changed by {told(lease)}"


def _troubles(cluster: Cluster, services: list[KubernetesObject], eventing: list[KubernetesObject], name: str) -> Iterator[str]:
    for service in services:
        if readiness(service).ready is not True:
            yield from diagnose(cluster, service)
        if service["metadata"]["name"] == name:
            yield from unreachable_url(service)
            yield from pinned_elsewhere(service)
    for each in eventing:
        if readiness(each).ready is False:
            yield from (f"{each['kind']} {each['metadata']['name']}: {text}" for text in failed_conditions(each))


def _not_followed(services: list[KubernetesObject], pods: list[KubernetesObject], name: str) -> Iterator[str]:
    """Pods of stages that the gateway's network leaves out."""
    stages = [pod for pod in pods if pod["metadata"]["labels"].get(COMPONENT) == "stage" and phase_of(pod) != "over"]
    for gateway in services[:1]:
        networks = followed_networks(gateway)
        refused = ", ".join(refused_pods(networks, stages)) if gateway["metadata"]["name"] == name else ""
        if refused:
            yield (
                f"{name} does not follow pods outside of {networks}: {refused}; requests go by the stage's Service URL. "
                "Set gateway.pod_network to the network of pods"
            )
