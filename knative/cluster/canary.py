"""Another pipeline beside the one that serves: the gateway's Service splits requests between two of its revisions.

Each revision drives its own stages, so an answer begins and ends in one pipeline. The canary is `latestRevision`, which for
Knative is the last that became Ready: until it does, all requests stay where they are.
"""

from typing import Any

from knative.cluster.client import FIELD_MANAGER, Cluster, Ref
from knative.cluster.errors import NothingServes
from knative.cluster.history import PIPELINE, Version
from knative.cluster.readiness import SERVING, traffic_of
from knative.spec.kubernetes_object import KubernetesObject


def with_traffic(gateway: KubernetesObject, traffic: list[dict[str, Any]]) -> KubernetesObject:
    """The gateway's Service with requests split so; the manifest itself stays as it is."""
    return {**gateway, "spec": {**gateway["spec"], "traffic": traffic}}


def split(stable: str, percent: int) -> list[dict[str, Any]]:
    """percent: of the requests that the canary gets; the rest goes to the revision `stable`."""
    return [{"revisionName": stable, "percent": 100 - percent}, {"latestRevision": True, "percent": percent}]


def pinned_traffic(service: KubernetesObject | None) -> list[dict[str, Any]]:
    """The split that a Service asks for; empty where everything goes to the latest revision."""
    traffic: list[dict[str, Any]] = ((service or {}).get("spec") or {}).get("traffic") or []
    return traffic if any(each.get("revisionName") for each in traffic) else []


def is_ours(service: KubernetesObject) -> bool:
    """Whether the split was made by a canary of ours, not by somebody's kubectl or kn."""
    own = (each for each in service["metadata"].get("managedFields") or [] if each.get("manager") == FIELD_MANAGER)
    return any("f:traffic" in (each.get("fieldsV1") or {}).get("f:spec", {}) for each in own)


def stable_revision(cluster: Cluster, namespace: str, name: str, serving: Version) -> str:
    """The revision of the gateway that serves, and drives the stages of `serving`. Raises NothingServes."""
    service = cluster.get(Ref(SERVING, "Service", namespace, name))
    traffic = traffic_of(service) if service is not None else {}
    for revision_name in sorted(traffic, key=lambda each: -traffic[each]):
        revision = cluster.get(Ref(SERVING, "Revision", namespace, revision_name))
        if revision is not None and revision["metadata"]["labels"].get(PIPELINE) == serving.fingerprint:
            return revision_name
    raise NothingServes(
        f"no revision of {name} in namespace {namespace} with requests drives pipeline {serving.fingerprint}, which version "
        f"{serving.number} says to serve; deploy it again before a canary goes beside it"
    )
