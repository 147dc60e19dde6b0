"""Stages of old pipelines go once nobody drives them: what the Job of `render --gitops` runs in a pod.

    python -c "<this file>" NAMESPACE PIPELINE FINGERPRINT [SECONDS [API]]

Needs Python alone: the functions' image has no client of Kubernetes. knative/cluster/garbage.py decides the same.
Status 0: nothing old is left that could go. 1: answers still ran on old stages when the time was over, or the cluster refused.
"""

import json
import ssl
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
FINGERPRINT = "lamina.dev/pipeline"
COMPONENT = "app.kubernetes.io/component"
SERVING = "/apis/serving.knative.dev/v1"
LOOK_SECONDS = 2.0


class Cluster:
    """One namespace, as the pod's ServiceAccount may see it."""

    def __init__(self, api: str, namespace: str, name: str) -> None:
        self._api, self._namespace, self._name = api, namespace, name
        authority = ACCOUNT / "ca.crt"
        self._context = ssl.create_default_context(cafile=str(authority)) if authority.exists() else None

    def gateway(self) -> Any:
        return self._ask(f"{SERVING}/namespaces/{self._namespace}/services/{self._name}")

    def own(self, path: str, more: str = "") -> list[Any]:
        """Of this pipeline, whatever its fingerprint; nothing of a kind that the cluster does not have."""
        selector = quote(f"app.kubernetes.io/instance={self._name},app.kubernetes.io/managed-by=lamina{more}")
        root, _, plural = path.rpartition("/")
        found = self._ask(f"{root}/namespaces/{self._namespace}/{plural}?labelSelector={selector}")
        return [] if found is None else list(found["items"])

    def revisions(self) -> list[Any]:
        selector = quote(f"serving.knative.dev/service={self._name}")
        return list(self._ask(f"{SERVING}/namespaces/{self._namespace}/revisions?labelSelector={selector}")["items"])

    def delete(self, path: str, found: Any) -> None:
        root, _, plural = path.rpartition("/")
        name = found["metadata"]["name"]
        self._ask(f"{root}/namespaces/{self._namespace}/{plural}/{name}", "DELETE")
        print(f"pruned {plural} {name}", flush=True)

    def _ask(self, path: str, method: str = "GET") -> Any:
        """None: 404."""
        request = urllib.request.Request(self._api + path, method=method, headers={"Accept": "application/json"})
        token = ACCOUNT / "token"  # read each time: it is changed before it expires
        if token.exists():
            request.add_header("Authorization", f"Bearer {token.read_text().strip()}")
        try:
            with urllib.request.urlopen(request, timeout=30, context=self._context) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            with error:
                if error.code == 404:
                    return None
                raise SystemExit(f"{method} {path}: {error.code} {error.read(500).decode(errors='replace')}") from error


def fingerprint_of(found: Any) -> str:
    return str(found["metadata"]["labels"].get(FINGERPRINT, ""))


def is_ready(service: Any) -> bool:
    status = service.get("status") or {}
    seen = status.get("observedGeneration") == service["metadata"].get("generation")
    return seen and any(each["type"] == "Ready" and each["status"] == "True" for each in status.get("conditions") or [])


def routed(cluster: Cluster, service: Any) -> set[str]:
    """Fingerprints whose gateways get requests."""
    targets = [*(service["spec"].get("traffic") or []), *((service.get("status") or {}).get("traffic") or [])]
    names = {each.get("revisionName") for each in targets}
    return {fingerprint_of(each) for each in cluster.revisions() if each["metadata"]["name"] in names}


def answering(cluster: Cluster) -> set[str]:
    """Fingerprints with a gateway pod that still runs, leaving or not: its answers may be on their way."""
    pods = cluster.own("/api/v1/pods", f",{COMPONENT}=gateway")
    return {fingerprint_of(pod) for pod in pods if (pod.get("status") or {}).get("phase") not in ("Succeeded", "Failed")}


def old(cluster: Cluster, kept: set[str], component: str) -> Iterator[tuple[str, Any]]:
    """Path of its kind, and each thing whose pipeline is none of `kept`."""
    for path in ("/apis/flows.knative.dev/v1/sequences", f"{SERVING}/services"):
        for found in cluster.own(path):
            is_gateway = found["metadata"]["labels"].get(COMPONENT) == "gateway"
            if is_gateway == (component == "gateway") and fingerprint_of(found) not in kept:
                yield path, found


def prune(cluster: Cluster, fingerprint: str, seconds: float) -> str:
    """What is left and why; empty where nothing is."""
    deadline = time.monotonic() + seconds
    while True:
        service = cluster.gateway()
        if service is None or fingerprint_of(service) != fingerprint:
            print(f"the gateway is not of pipeline {fingerprint} any more: another Job's business", flush=True)
            return ""
        if is_ready(service):
            kept = {fingerprint, *routed(cluster, service)}
            for path, found in old(cluster, kept, "gateway"):
                cluster.delete(path, found)  # for events, which go to the new one by now
            busy = answering(cluster)
            for path, found in old(cluster, kept | busy, "stage"):
                cluster.delete(path, found)
            left = [found["metadata"]["name"] for _, found in old(cluster, kept, "stage")]
            if not left:
                return ""
            reason = f"{', '.join(left)}: gateways of their pipelines still finish answers"
        else:
            reason = "the gateway is not Ready"
        if time.monotonic() > deadline:
            return reason
        time.sleep(LOOK_SECONDS)


def main() -> None:
    namespace, name, fingerprint, *rest = sys.argv[1:]
    seconds = float(rest[0]) if rest else 900.0
    api = rest[1] if len(rest) > 1 else "https://kubernetes.default.svc"
    if left := prune(Cluster(api, namespace, name), fingerprint, seconds):
        sys.exit(f"not pruned within {seconds:g} s: {left}")


if __name__ == "__main__":
    main()
