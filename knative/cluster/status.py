"""Status of one pipeline on a cluster, revision by revision, and a list of all pipelines."""

from collections.abc import Callable, Iterator
from typing import Any, Final

from knative.cluster.client import Cluster
from knative.cluster.diagnosis import diagnose
from knative.cluster.errors import NotPermitted
from knative.cluster.history import History, Outcome, last_served
from knative.cluster.lease import holder, lease_ref
from knative.cluster.objects import (
    COMPONENT,
    INSTANCE,
    MANAGED_BY,
    PIPELINE,
    REVISION_LABEL,
    SERVICE_LABEL,
    SERVING,
    container_statuses,
    failed_conditions,
    label,
    own_selector,
    phase_of,
    readiness,
    services_of,
    traffic_of,
)
from knative.cluster.preflight import followed_networks, refused_pods
from knative.cluster.traffic import traffic_warnings
from knative.spec.kubernetes_object import KubernetesObject

COLUMNS: Final = (
    "service", "ready", "pods", "starting", "leaving", "desired", "restarts", "revision", "traffic", "pipeline", "url",
)  # fmt: skip
LIST_COLUMNS: Final = ("namespace", "pipeline", "ready", "stages", "pods", "fingerprint", "url")
_SCALING: Final = ("autoscaling.internal.knative.dev/v1alpha1", "PodAutoscaler")
_EVENTING: Final = (
    ("eventing.knative.dev/v1", "Broker"),
    ("flows.knative.dev/v1", "Sequence"),
    ("eventing.knative.dev/v1", "Trigger"),
    ("sources.knative.dev/v1", "SinkBinding"),
)


def cluster_status(cluster: Cluster, namespace: str, name: str) -> dict[str, Any]:
    """Status of one pipeline as a JSON document.

    `services`: the gateway first, each with its revisions. `eventing`: readiness of Broker, Sequence and Triggers. `notes`:
    lines about versions and a running deployment. `troubles`: what is not Ready, or does not reach the gateway, and why.
    """
    services = services_of(cluster, namespace, name)
    pods = cluster.find("v1", "Pod", namespace, own_selector(name))
    desired = _desired_scales(cluster, namespace, own_selector(name))
    eventing = eventing_of(cluster, namespace, name) if services else []
    return {
        "services": [_service(each, pods, desired) for each in services],
        "eventing": [eventing_status(each) for each in eventing],
        "notes": list(_notes(cluster, namespace, name)) if services else [],
        "troubles": [*_troubles(cluster, services, pods, eventing, name), *_refused_pods(services, pods, name)],
    }


def status_rows(status: dict[str, Any]) -> list[tuple[str, ...]]:
    """Rows of a table with COLUMNS, one for each revision. status: what `cluster_status` returns."""
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
    """Lines to print below the table: notes, Eventing and troubles. status: what `cluster_status` returns."""
    eventing = [f"{each['kind']} {each['name']}: {each['ready']}{each['reason']}" for each in status["eventing"]]
    return [*status["notes"], *eventing, *status["troubles"]]


def _service(service: KubernetesObject, pods: list[KubernetesObject], desired: dict[str, int]) -> dict[str, Any]:
    name, status = service["metadata"]["name"], service.get("status") or {}
    traffic = traffic_of(service)
    own = [pod for pod in pods if label(pod, SERVICE_LABEL) == name]
    with_pods = [label(pod, REVISION_LABEL) for pod in own if phase_of(pod) != "over"]
    names = list(dict.fromkeys([*sorted(traffic), *with_pods])) or [status.get("latestCreatedRevisionName", "")]
    revisions = []
    for revision in names:
        members = [pod for pod in own if label(pod, REVISION_LABEL) == revision]
        phases = [phase_of(pod) for pod in members]
        revisions.append(
            {
                "name": revision,
                "percent": traffic.get(revision, 0),
                "pipeline": (members and label(members[0], PIPELINE)) or label(service, PIPELINE),
                "desired": desired.get(revision, "-"),
                "restarts": sum(each.get("restartCount", 0) for pod in members for each in container_statuses(pod)),
                **{phase: phases.count(phase) for phase in ("ready", "starting", "leaving")},
            }
        )
    ready = {True: "yes", False: "no", None: "not yet"}[readiness(service).ready]
    return {"name": name, "ready": ready, "url": status.get("url", ""), "revisions": revisions}


def _desired_scales(cluster: Cluster, namespace: str, selector: str) -> dict[str, int]:
    """Revision → number of pods that the autoscaler wants; empty if listing PodAutoscalers is not permitted."""
    try:
        found = cluster.find(*_SCALING, namespace, selector) if cluster.serves(*_SCALING) else []
    except NotPermitted:
        return {}
    scales = {each["metadata"]["name"]: (each.get("status") or {}).get("desiredScale", -1) for each in found}
    return {name: scale for name, scale in scales.items() if scale >= 0}  # -1: the autoscaler has no data yet


def eventing_of(cluster: Cluster, namespace: str, name: str) -> list[KubernetesObject]:
    """Objects of Knative Eventing that belong to a pipeline, or to a fleet's gateway."""
    return [
        each
        for api_version, kind in _EVENTING
        if cluster.serves(api_version, kind)
        for each in cluster.find(api_version, kind, namespace, own_selector(name))
    ]


def eventing_status(manifest: KubernetesObject) -> dict[str, Any]:
    state = readiness(manifest)
    return {
        "kind": manifest["kind"],
        "name": manifest["metadata"]["name"],
        "ready": {True: "ready", False: "NOT ready", None: "not ready yet"}[state.ready],
        "reason": f", {state.reason}" if state.reason and not state.ready else "",
    }


def _notes(cluster: Cluster, namespace: str, name: str) -> Iterator[str]:
    """Yields lines about the version that serves, the newest one if it is another, and a deployment under way."""
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
        yield f"being changed by {holder(lease)}"


def _troubles(
    cluster: Cluster,
    services: list[KubernetesObject],
    pods: list[KubernetesObject],
    eventing: list[KubernetesObject],
    name: str,
) -> Iterator[str]:
    running = {label(pod, SERVICE_LABEL) for pod in pods if phase_of(pod) in ("ready", "starting")}
    for service in services:
        state = readiness(service)
        if state.ready is None and service["metadata"]["name"] not in running:  # its events and pods tell of former times
            yield f"{service['metadata']['name']} has no pods, and Knative does not know yet if it is ready: {state.reason}"
        elif not state.ready:
            yield from diagnose(cluster, service)
        if service["metadata"]["name"] == name:
            yield from traffic_warnings(service)
    for each in eventing:
        if readiness(each).ready is False:
            yield from (f"{each['kind']} {each['metadata']['name']}: {text}" for text in failed_conditions(each))


def _refused_pods(services: list[KubernetesObject], pods: list[KubernetesObject], name: str) -> Iterator[str]:
    """Yields a line if pods of stages are outside the network of pods to which the gateway sends requests."""
    stages = [pod for pod in pods if label(pod, COMPONENT) == "stage" and phase_of(pod) != "over"]
    if services and services[0]["metadata"]["name"] == name:
        networks = followed_networks(services[0])
        if refused := ", ".join(refused_pods(networks, stages)):
            yield (
                f"{name} does not follow pods outside of {networks}: {refused}; requests go by the stage's Service URL. "
                "Set gateway.pod_network to the network of pods"
            )


def pipelines(cluster: Cluster, namespace: str | None, say: Callable[[str], None]) -> list[tuple[str, ...]]:
    """All pipelines, as rows of a table with LIST_COLUMNS.

    If `namespace` is None, lists the pipelines of all namespaces. If listing all is not permitted, only the context's
    namespace is listed, and `say` reports that.
    """
    try:
        services = cluster.find(SERVING, "Service", namespace, f"{MANAGED_BY}=lamina")
        pods = cluster.find("v1", "Pod", namespace, f"{MANAGED_BY}=lamina")
    except NotPermitted as error:
        if namespace is not None:
            raise
        say(f"only namespace {cluster.default_namespace}: {error}")
        return pipelines(cluster, cluster.default_namespace, say)
    gateways = [each for each in services if each["metadata"]["name"] == label(each, INSTANCE)]
    return sorted(_list_row(each, services, pods) for each in gateways)


def _list_row(gateway: KubernetesObject, services: list[KubernetesObject], pods: list[KubernetesObject]) -> tuple[str, ...]:
    namespace, name = gateway["metadata"]["namespace"], gateway["metadata"]["name"]

    def own(found: list[KubernetesObject]) -> list[KubernetesObject]:
        return [each for each in found if (each["metadata"]["namespace"], label(each, INSTANCE)) == (namespace, name)]

    states = [readiness(each).ready for each in own(services)]
    running = [pod for pod in own(pods) if phase_of(pod) in ("ready", "starting")]
    canary = " (canary)" if len(traffic_of(gateway)) > 1 else ""
    return (
        namespace,
        name,
        "no" if False in states else "not yet" if None in states else "yes",
        str(sum(label(each, COMPONENT) == "stage" for each in own(services))),
        str(len(running)),
        label(gateway, PIPELINE) + canary,
        (gateway.get("status") or {}).get("url", ""),
    )
