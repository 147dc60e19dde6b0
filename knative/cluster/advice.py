"""What a deployment that went well should still tell: its gateway is Ready, and not where its clients look for it."""

from collections.abc import Iterator
from typing import Final
from urllib.parse import urlsplit

from knative.cluster.canary import is_ours
from knative.cluster.client import Cluster, Ref
from knative.cluster.readiness import traffic_of
from knative.spec.kubernetes_object import KubernetesObject

_CLUSTER_LOCAL: Final = ".svc.cluster.local"


def advice(cluster: Cluster, gateway: KubernetesObject) -> Iterator[str]:
    """gateway: as it was applied; Ready by now."""
    ref = Ref.of(gateway)
    live = cluster.get(ref)
    if live is not None:
        yield from unreachable_url(live)
        yield from pinned_elsewhere(live)


def unreachable_url(gateway: KubernetesObject) -> Iterator[str]:
    """The ingress answers 404 for a URL inside the cluster."""
    host = urlsplit((gateway.get("status") or {}).get("url", "")).hostname or ""
    if host.endswith(_CLUSTER_LOCAL) and not gateway["metadata"].get("labels", {}).get("networking.knative.dev/visibility"):
        namespace, name = gateway["metadata"]["namespace"], gateway["metadata"]["name"]
        pod = f"kubectl -n {namespace} get pods -o name -l serving.knative.dev/service={name} | head -1"
        yield (
            f"warning: http://{host} is an address inside the cluster, for which its ingress answers 404 to everybody else: "
            "Knative has no domain. Set one in the ConfigMap config-domain of knative-serving, and the URL changes by itself; "
            f'until then ask from a pod, or through: kubectl -n {namespace} port-forward "$({pod})" 8080'
        )


def pinned_elsewhere(gateway: KubernetesObject) -> Iterator[str]:
    """Somebody keeps requests at an older revision than the one that was deployed."""
    traffic = traffic_of(gateway)
    newest = (gateway.get("status") or {}).get("latestReadyRevisionName", "")
    if traffic and traffic.get(newest, 0) < 100 and not is_ours(gateway):
        told = ", ".join(f"{percent} % to {name}" for name, percent in sorted(traffic.items()))
        yield f"warning: requests do not all go to {newest}, which was deployed: {told}, by a split that is not this deployer's"
