"""What a pipeline on a cluster is doing: a row for each Service, and why one is not ready."""

from knative.cluster.client import Cluster
from knative.cluster.diagnosis import SERVING, diagnose, readiness
from knative.cluster.history import INSTANCE, MANAGED_BY
from knative.spec.kubernetes_object import KubernetesObject

COLUMNS = ("service", "ready", "pods", "revision", "pipeline", "url")


def cluster_rows(cluster: Cluster, namespace: str, name: str) -> tuple[list[tuple[str, ...]], list[str]]:
    """The table, gateway first, and lines on what is wrong."""
    services = services_of(cluster, namespace, name)
    troubles = [line for service in services if readiness(service).ready is False for line in diagnose(cluster, service)]
    return [_row(cluster, service) for service in services], troubles


def services_of(cluster: Cluster, namespace: str, name: str) -> list[KubernetesObject]:
    """The pipeline's Services: gateway first, then stages by name."""
    found = cluster.find(SERVING, "Service", namespace, f"{INSTANCE}={name},{MANAGED_BY}=lamina")
    return sorted(found, key=lambda service: (service["metadata"]["name"] != name, service["metadata"]["name"]))


def _row(cluster: Cluster, service: KubernetesObject) -> tuple[str, ...]:
    metadata, status = service["metadata"], service.get("status") or {}
    state = readiness(service)
    ready = {True: "yes", False: "no", None: "not yet"}[state.ready]
    pods = cluster.find("v1", "Pod", metadata["namespace"], f"serving.knative.dev/service={metadata['name']}")
    return (
        metadata["name"],
        ready,
        str(len(pods)),
        status.get("latestReadyRevisionName", status.get("latestCreatedRevisionName", "")),
        metadata["labels"].get("lamina.dev/pipeline", ""),
        status.get("url", ""),
    )
