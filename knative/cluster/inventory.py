"""All pipelines of a cluster, or of the one namespace that may be looked at."""

from collections.abc import Callable
from typing import Final

from knative.cluster.client import Cluster
from knative.cluster.errors import NotPermitted
from knative.cluster.history import COMPONENT, INSTANCE, MANAGED_BY, PIPELINE
from knative.cluster.readiness import SERVING, readiness, traffic_of
from knative.cluster.status import phase_of
from knative.spec.kubernetes_object import KubernetesObject

COLUMNS: Final = ("namespace", "pipeline", "ready", "stages", "pods", "fingerprint", "url")
_OURS: Final = f"{MANAGED_BY}=lamina"


def pipelines(cluster: Cluster, namespace: str | None, say: Callable[[str], None]) -> list[tuple[str, ...]]:
    """A row under COLUMNS for each. namespace None: of all; where that is not permitted of the context's own, and says so."""
    try:
        services = cluster.find(SERVING, "Service", namespace, _OURS)
        pods = cluster.find("v1", "Pod", namespace, _OURS)
    except NotPermitted as error:
        if namespace is not None:
            raise
        say(f"of namespace {cluster.default_namespace} alone: {error}")
        return pipelines(cluster, cluster.default_namespace, say)
    gateways = [each for each in services if each["metadata"]["name"] == each["metadata"]["labels"].get(INSTANCE)]
    return sorted(_row(each, services, pods) for each in gateways)


def _row(gateway: KubernetesObject, services: list[KubernetesObject], pods: list[KubernetesObject]) -> tuple[str, ...]:
    metadata = gateway["metadata"]
    own = [each for each in services if _belongs(each, metadata)]
    running = [pod for pod in pods if _belongs(pod, metadata) and phase_of(pod) in ("ready", "starting")]
    states = [readiness(each).ready for each in own]
    canary = " (canary)" if len(traffic_of(gateway)) > 1 else ""
    return (
        metadata["namespace"],
        metadata["name"],
        "no" if False in states else "not yet" if None in states else "yes",
        str(sum(each["metadata"]["labels"].get(COMPONENT) == "stage" for each in own)),
        str(len(running)),
        metadata["labels"].get(PIPELINE, "") + canary,
        (gateway.get("status") or {}).get("url", ""),
    )


def _belongs(manifest: KubernetesObject, gateway: KubernetesObject) -> bool:
    metadata = manifest["metadata"]
    same = metadata["namespace"] == gateway["namespace"]
    return bool(same and metadata["labels"].get(INSTANCE) == gateway["name"])
