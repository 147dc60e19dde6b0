"""Splits of requests between revisions of the gateway, for a canary; and warnings if requests do not reach the gateway.

Each gateway revision uses its own stages, so an answer begins and ends in one pipeline. The canary is `latestRevision`, which
for Knative is the last one that became Ready: until then all requests stay with the stable revision.
"""

from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import Any
from urllib.parse import urlsplit

from knative.cluster.client import FIELD_MANAGER, Cluster, Ref
from knative.cluster.errors import NothingServes
from knative.cluster.history import DeployedVersion
from knative.cluster.objects import PIPELINE, SERVING, label, traffic_of
from knative.spec.kubernetes_object import KubernetesObject

Traffic = list[dict[str, Any]]  # `spec.traffic` of a Service


def split(stable: str, percent: int) -> Traffic:
    """Traffic that sends `percent` of the requests to the canary, and the rest to the revision `stable`."""
    return [{"revisionName": stable, "percent": 100 - percent}, {"latestRevision": True, "percent": percent}]


def pinned_traffic(service: KubernetesObject | None) -> Traffic:
    """The split in a Service's spec; empty if there is no Service, or if all requests go to its latest revision."""
    traffic: Traffic = ((service or {}).get("spec") or {}).get("traffic") or []
    return traffic if any(each.get("revisionName") for each in traffic) else []


def is_ours(service: KubernetesObject) -> bool:
    """Whether Lamina wrote the split of requests into the Service, rather than kubectl or kn."""
    own = (each for each in service["metadata"].get("managedFields") or [] if each.get("manager") == FIELD_MANAGER)
    return any("f:traffic" in (each.get("fieldsV1") or {}).get("f:spec", {}) for each in own)


def stable_revision(cluster: Cluster, namespace: str, name: str, serving: DeployedVersion) -> str:
    """Name of the gateway's revision that uses the stages of version `serving`; if several do, the one with most requests.

    Raises NothingServes if none of them gets requests.
    """
    service = cluster.get(Ref(SERVING, "Service", namespace, name))
    traffic = traffic_of(service) if service is not None else {}
    for revision_name in sorted(traffic, key=lambda each: -traffic[each]):
        revision = cluster.get(Ref(SERVING, "Revision", namespace, revision_name))
        if revision is not None and label(revision, PIPELINE) == serving.fingerprint:
            return revision_name
    raise NothingServes(
        f"no revision of {name} in namespace {namespace} that gets requests drives pipeline {serving.fingerprint}, although "
        f"version {serving.number} is recorded as serving; deploy it again before a canary"
    )


def traffic_warnings(gateway: KubernetesObject) -> Iterator[str]:
    """Yields a warning if clients cannot reach a Ready gateway, if it refuses its URL's host, or if its newest revision does
    not get all requests.

    gateway: the Service as the cluster has it.
    """
    metadata, status = gateway["metadata"], gateway.get("status") or {}
    namespace, name = metadata["namespace"], metadata["name"]
    host = urlsplit(status.get("url", "")).hostname or ""
    if host.endswith(".svc.cluster.local") and not label(gateway, "networking.knative.dev/visibility"):
        pod = f"kubectl -n {namespace} get pods -o name -l serving.knative.dev/service={name} | head -1"
        yield (
            f"warning: http://{host} is an address inside the cluster, and the ingress answers 404 to clients outside: Knative "
            "has no domain. Set one in the ConfigMap config-domain of knative-serving, and the URL changes by itself; "
            f'until then ask from a pod, or through: kubectl -n {namespace} port-forward "$({pod})" 8080'
        )
    containers = (gateway.get("spec") or {}).get("template", {}).get("spec", {}).get("containers") or [{}]
    env = {each["name"]: each.get("value", "") for each in containers[0].get("env") or ()}
    known = (f"{name}.{namespace}.*", *env.get("LAMINA_HOSTS", "").split(","))  # functions/gateway/answers/sites.py
    if host and "LAMINA_API_KEY_FILES" not in env and not any(fnmatchcase(host, pattern) for pattern in known):
        yield (
            f"warning: the gateway has no API keys and answers 421 to its own URL's host, {host}, because Knative's "
            "domain-template does not begin with name and namespace: list it in gateway.hosts, or set gateway.api_keys_secret"
        )
    traffic, newest = traffic_of(gateway), status.get("latestReadyRevisionName", "")
    if traffic and traffic.get(newest, 0) < 100 and not is_ours(gateway):
        shares = ", ".join(f"{percent} % to {name}" for name, percent in sorted(traffic.items()))
        yield f"warning: requests do not all go to {newest}, which was deployed: {shares}, by a split that Lamina did not make"
