"""Deletes what a pipeline has replaced: old revisions that would keep pods, and stages of old pipelines that no gateway uses.

The Job of `render --gitops` runs this file in a pod.

    python -c "<this file>" NAMESPACE PIPELINE FINGERPRINT [SECONDS [API]]
    python -c "<this file>" NAMESPACE FLEET fleet [SECONDS [API]]

Needs Python alone, because the functions' image has no Kubernetes client. knative/cluster/garbage.py follows the same rules.
Status 0: nothing old is left to delete. 1: answers still ran on old stages, or a Service was not Ready, after SECONDS, or the
API refused a request.
"""

import json
import ssl
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any
from urllib.parse import quote

ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
FINGERPRINT = "lamina.dev/pipeline"
FLEET = "lamina.dev/fleet"
COMPONENT = "app.kubernetes.io/component"
SERVING = "/apis/serving.knative.dev/v1"
CLASS = "autoscaling.knative.dev/class"
ROUTING_STATE = "serving.knative.dev/routingState"
POLL_SECONDS = 2.0
UNROUTED_SECONDS = 60.0  # how long Knative may take to note that a Route no longer uses a revision


class NamespaceApi:
    """The Kubernetes API of one namespace, used with the rights of the pod's ServiceAccount.

    api: URL of the API server. name: that of the pipeline.
    """

    def __init__(self, api: str, namespace: str, name: str) -> None:
        self._api, self._namespace, self._name = api, namespace, name
        authority = ACCOUNT / "ca.crt"
        self._context = ssl.create_default_context(cafile=str(authority)) if authority.exists() else None

    def gateway(self) -> Any:
        return self._request(self._path(f"{SERVING}/services", self._name))

    def find(self, path: str, selector: str) -> list[Any]:
        """Objects that match a label selector. path: that of their kind, /apis/GROUP/VERSION/PLURAL.

        Empty if the cluster does not have the kind.
        """
        found = self._request(f"{self._path(path)}?labelSelector={quote(selector)}")
        return [] if found is None else list(found["items"])

    def own(self, path: str, more: str = "") -> list[Any]:
        """Objects of this pipeline, of any fingerprint, whose kind has this path.

        more: further label requirements, which begin with a comma.
        """
        return self.find(path, f"app.kubernetes.io/instance={self._name},app.kubernetes.io/managed-by=lamina{more}")

    def delete(self, path: str, found: Any) -> None:
        name = found["metadata"]["name"]
        self._request(self._path(path, name), "DELETE")
        print(f"deleted {path.rpartition('/')[2]} {name}", flush=True)

    def _path(self, path: str, name: str = "") -> str:
        root, _, plural = path.rpartition("/")
        return f"{root}/namespaces/{self._namespace}/{plural}" + (f"/{name}" if name else "")

    def _request(self, path: str, method: str = "GET") -> Any:
        """Sends a request; returns the reply's JSON, or None for 404. Ends the program at any other error status."""
        request = urllib.request.Request(self._api + path, method=method, headers={"Accept": "application/json"})
        token = ACCOUNT / "token"  # read each time: it is replaced before it expires
        if token.exists():
            request.add_header("Authorization", f"Bearer {token.read_text().strip()}")
        try:
            with urllib.request.urlopen(request, timeout=30, context=self._context) as reply:
                return json.load(reply)
        except urllib.error.HTTPError as error:
            with error:
                if error.code == 404:
                    return None
                raise SystemExit(f"{method} {path}: {error.code} {error.read(500).decode(errors='replace')}") from error


def fingerprint_of(found: Any) -> str:
    return str(found["metadata"]["labels"].get(FINGERPRINT, ""))


def is_ready(found: Any) -> bool:
    """Whether a Service or Revision is Ready, and Knative has seen its latest change."""
    status = found.get("status") or {}
    observed = status.get("observedGeneration") == found["metadata"].get("generation")
    return observed and any(each["type"] == "Ready" and each["status"] == "True" for each in status.get("conditions") or [])


def revisions(api: NamespaceApi, service: Any) -> tuple[list[Any], list[Any]]:
    """The Service's revisions that its spec or status sends requests to, and all others."""
    targets = [*(service["spec"].get("traffic") or []), *((service.get("status") or {}).get("traffic") or [])]
    names = {each.get("revisionName") for each in targets}
    found = api.find(f"{SERVING}/revisions", f"serving.knative.dev/service={service['metadata']['name']}")
    routed = [each for each in found if each["metadata"]["name"] in names]
    return routed, [each for each in found if each not in routed]


def idle(api: NamespaceApi, service: Any) -> list[Any]:
    """Revisions that a Ready Service has replaced and that would keep pods.

    An HPA keeps at least one pod, and pods of a revision that is not Ready try to start until Knative's progress deadline.
    """
    latest = {service["status"].get("latestCreatedRevisionName"), service["status"].get("latestReadyRevisionName")}
    return [
        each
        for each in revisions(api, service)[1]
        if each["metadata"]["name"] not in latest
        and ((each["metadata"].get("annotations") or {}).get(CLASS, "").startswith("hpa.") or not is_ready(each))
        and not each["metadata"].get("deletionTimestamp")
    ]


def answering(api: NamespaceApi) -> set[str]:
    """Fingerprints with a gateway pod that still runs, even if it terminates: it may have answers in progress."""
    pods = api.own("/api/v1/pods", f",{COMPONENT}=gateway")
    return {fingerprint_of(pod) for pod in pods if (pod.get("status") or {}).get("phase") not in ("Succeeded", "Failed")}


def old(api: NamespaceApi, kept: set[str], gateways: bool) -> list[tuple[str, Any]]:
    """Gateways, or all other Services and Sequences, whose fingerprint is not in `kept`, each with the path of its kind.

    gateways: True for gateways, False for the others.
    """
    return [
        (path, found)
        for path in ("/apis/flows.knative.dev/v1/sequences", f"{SERVING}/services")
        for found in api.own(path)
        if (found["metadata"]["labels"].get(COMPONENT) == "gateway") == gateways and fingerprint_of(found) not in kept
    ]


def prune(api: NamespaceApi, fingerprint: str, seconds: float) -> str:
    """Deletes old revisions, stages, Sequences and gateways for events until none is left, or for at most `seconds`.

    Returns which objects are left and why; empty if none is. fingerprint: the pipeline that is kept.
    """
    begun = time.monotonic()
    while True:
        service = api.gateway()
        if service is None or fingerprint_of(service) != fingerprint:
            print(f"the gateway is no longer of pipeline {fingerprint}: another Job prunes", flush=True)
            return ""
        if is_ready(service):
            own = [each for each in api.own(f"{SERVING}/services") if fingerprint_of(each) == fingerprint]
            routed = []  # by some other Route, or until Knative has noted the change
            for each in [found for service in own if is_ready(service) for found in idle(api, service)]:
                if each["metadata"]["labels"].get(ROUTING_STATE) == "active":
                    routed.append(each["metadata"]["name"])
                else:
                    api.delete(f"{SERVING}/revisions", each)
            kept = {fingerprint, *map(fingerprint_of, revisions(api, service)[0])}
            for path, found in old(api, kept, gateways=True):
                api.delete(path, found)  # gateways for events, which go to the new one by now
            for path, found in old(api, kept | answering(api), gateways=False):
                api.delete(path, found)
            left = [found["metadata"]["name"] for _, found in old(api, kept, gateways=False)]
            coming = [service["metadata"]["name"] for service in own if not is_ready(service)]
            waits = routed and time.monotonic() < begun + UNROUTED_SECONDS
            if not left and not coming and not waits:
                return ""
            answers = f"{', '.join(left)}: gateways of their pipelines still finish answers"
            reason = answers if left else f"{', '.join(coming)}: not Ready" if coming else f"{', '.join(routed)}: still routed"
        else:
            reason = "the gateway is not Ready"
        if time.monotonic() > begun + seconds:
            return reason
        time.sleep(POLL_SECONDS)


def prune_fleet(api: NamespaceApi, name: str, seconds: float) -> str:
    """Deletes stages that no ConfigMap of the fleet names and that have no pods, until none is left, or for at most `seconds`.

    Gateways of the fleet use such stages for answers that had begun. Returns what is left and why; empty if nothing is.
    """
    begun = time.monotonic()
    while True:
        kept = set(map(fingerprint_of, api.find("/api/v1/configmaps", f"{FLEET}={name}")))
        left = []
        for each in api.find(f"{SERVING}/services", f"{FLEET}={name},{COMPONENT}=stage"):
            if fingerprint_of(each) not in kept:
                service = each["metadata"]["name"]
                if api.find("/api/v1/pods", f"serving.knative.dev/service={service}"):
                    left.append(service)
                else:
                    api.delete(f"{SERVING}/services", each)
        if not left or time.monotonic() > begun + seconds:
            return f"{', '.join(left)}: still have pods" if left else ""
        time.sleep(POLL_SECONDS)


def main() -> None:
    namespace, name, fingerprint, *rest = sys.argv[1:]
    seconds = float(rest[0]) if rest else 900.0
    api = rest[1] if len(rest) > 1 else "https://kubernetes.default.svc"
    found = NamespaceApi(api, namespace, name)
    if left := prune_fleet(found, name, seconds) if fingerprint == "fleet" else prune(found, fingerprint, seconds):
        sys.exit(f"not pruned within {seconds:g} s: {left}")


if __name__ == "__main__":
    main()
