"""Deletes what a pipeline no longer needs, and waits until it is gone.

Everything that Lamina made has a label with the pipeline's name. Objects that the spec no longer asks for are deleted at once.
Stages with an old fingerprint are deleted when no gateway revision that gets requests uses them, and no gateway pod that still
runs. Revisions are Knative's, which keeps old ones at zero; those that would keep pods are deleted. `collect` leaves the
history and the Lease alone: history.py deletes old versions, and the Lease's holder deletes it.
"""

import contextlib
import time
from collections.abc import Callable, Iterable
from typing import Final

from knative.cluster.client import Cluster, Ref
from knative.cluster.errors import DeployFailed, NotPermitted
from knative.cluster.objects import (
    COMPONENT,
    INSTANCE,
    MANAGED_BY,
    PIPELINE,
    REVISION_LABEL,
    SERVICE_LABEL,
    SERVING,
    fingerprint_of,
    gateway_of,
    is_member,
    label,
    own_selector,
    phase_of,
    readiness,
    routed_revisions,
    services_of,
    traffic_of,
)
from knative.cluster.pipeline_token import wanted_secrets
from knative.spec.kubernetes_object import KubernetesObject

_POLL_SECONDS: Final = 0.5
_LONGEST_ANSWER_SECONDS: Final = 600.0
_UNROUTED_SECONDS: Final = 60  # how long Knative may take to note that a Route no longer uses a revision
_CLASS: Final = "autoscaling.knative.dev/class"
_ROUTING_STATE: Final = "serving.knative.dev/routingState"  # a revision's label: `active` if any Route uses it
_FLOWS: Final = "flows.knative.dev/v1"
_ACCESS: Final = (
    ("rbac.authorization.k8s.io/v1", "RoleBinding"),
    ("rbac.authorization.k8s.io/v1", "Role"),
    ("v1", "ServiceAccount"),
)
OWN_KINDS: Final = (
    ("sources.knative.dev/v1", "SinkBinding"),
    (_FLOWS, "Sequence"),
    ("eventing.knative.dev/v1", "Trigger"),
    ("eventing.knative.dev/v1", "Broker"),
    (SERVING, "Service"),
    ("monitoring.coreos.com/v1", "PodMonitor"),
    ("monitoring.coreos.com/v1", "PrometheusRule"),
    ("networking.k8s.io/v1", "NetworkPolicy"),
    ("policy/v1", "PodDisruptionBudget"),
    ("batch/v1", "Job"),
    *_ACCESS,
    ("coordination.k8s.io/v1", "Lease"),
    ("v1", "ConfigMap"),
    ("v1", "Secret"),
)
"""Every kind that a pipeline may have, in the order in which objects are deleted: sources of work first."""
_KEPT: Final = ("Secret", "ConfigMap")  # token and history, which the deployer makes and `render` does not


class GarbageCollector:
    """Deletes objects of pipelines in one namespace of a cluster.

    say: gets a line for everything that is deleted or waited for. timeout_seconds: limit of each wait.
    """

    def __init__(self, cluster: Cluster, namespace: str, say: Callable[[str], None], timeout_seconds: float) -> None:
        self._cluster = cluster
        self._namespace = namespace
        self._say = say
        self._timeout_seconds = timeout_seconds

    def collect(self, name: str, objects: list[KubernetesObject]) -> None:
        """Deletes everything of the pipeline `name` except `objects`, which its spec asks for, and its Secrets and ConfigMaps.

        Waits for answers that still run on old stages; if some run after the timeout, their stages stay for the next deploy.
        `say` gets a line for what stays. If the user is not permitted to list or delete some kind of object, `say` gets the
        error, and nothing more is deleted.
        """
        wanted, current = set(map(Ref.of, objects)), fingerprint_of(gateway_of(objects))
        old_pipelines, access = [], []
        try:
            for each in self._own(name):
                ref, kind = Ref.of(each), (each["apiVersion"], each["kind"])
                if ref in wanted or ref.kind in _KEPT:
                    continue
                if kind in ((SERVING, "Service"), (_FLOWS, "Sequence")) and fingerprint_of(each) != current:
                    old_pipelines.append(each)
                elif kind in _ACCESS:
                    access.append(ref)
                else:
                    self._delete(ref, f"deleted {ref}, which the spec no longer needs")
            self._delete_idle_revisions(name)  # first, because stages of old pipelines wait for pods of their gateways
            if is_member(gateway_of(objects)):
                self._prune_of_member(old_pipelines)
            else:
                self._prune(name, old_pipelines)
            pods = self._cluster.find("v1", "Pod", self._namespace, f"{INSTANCE}={name}") if access else []
            accounts = {pod["spec"].get("serviceAccountName") for pod in pods if phase_of(pod) != "over"}
            for ref in access:
                if ref.name in accounts:
                    self._say(f"{ref} stays while a pod runs as {ref.name}; the next deploy deletes it")
                else:
                    self._delete(ref, f"deleted {ref}, which the spec no longer needs")
        except NotPermitted as error:
            self._say(f"did not look for objects that the spec no longer needs: {error}")

    def _delete_idle_revisions(self, name: str) -> None:
        """Deletes revisions that get no requests and would keep pods; the pods finish their answers as they terminate.

        These are revisions of class hpa, because an HPA keeps at least one pod, and those that are not Ready, whose pods try to
        start until Knative's progress deadline. Revisions that a Route still uses after a minute stay.
        """
        deadline = time.monotonic() + min(_UNROUTED_SECONDS, self._timeout_seconds)
        try:
            while True:
                routed = []
                for revision in self._idle_revisions(name):
                    ref = Ref.of(revision)
                    if label(revision, _ROUTING_STATE) == "active":
                        routed.append(ref)
                    else:
                        trait = "would keep a pod" if readiness(revision).ready else "is not Ready"
                        self._delete(ref, f"deleted {ref}, which gets no requests and {trait}")
                if not routed or time.monotonic() > deadline:
                    break
                time.sleep(_POLL_SECONDS)
            for ref in routed:
                self._say(f"{ref} stays with its pods: a Route still sends requests to it")
        except NotPermitted as error:
            self._say(f"did not delete revisions that get no requests: {error}")

    def _idle_revisions(self, name: str) -> list[KubernetesObject]:
        """Revisions that would keep pods, and that their Service has replaced. Services that are not Ready are left out."""
        return [
            revision
            for service in services_of(self._cluster, self._namespace, name)
            if readiness(service).ready
            for revision in self._revisions(service["metadata"]["name"])
            if revision["metadata"]["name"] not in routed_revisions(service) | _latest(service) and _would_keep_pods(revision)
        ]

    def _revisions(self, service: str) -> list[KubernetesObject]:
        return self._cluster.find(SERVING, "Revision", self._namespace, f"{SERVICE_LABEL}={service}")

    def _prune(self, name: str, old: list[KubernetesObject]) -> None:
        """Deletes `old`: stages, Sequences and gateways for events of other fingerprints.

        Stages and Sequences stay if a gateway that gets requests, or still answers after the timeout, uses them.
        """
        rest: dict[str, list[Ref]] = {}
        for each in old:
            ref = Ref.of(each)
            if label(each, COMPONENT) == "gateway":
                # A gateway for events: new events go to its successor already, and its pods finish what they have.
                self._delete(ref, f"pruned {ref}")
            else:
                rest.setdefault(fingerprint_of(each), []).append(ref)
        for fingerprint, refs in rest.items():
            driver, gateways = self._drivers(name).get(fingerprint), f"{INSTANCE}={name},{COMPONENT}=gateway"
            if driver is not None:
                self._say(f"the stages of pipeline {fingerprint} stay: {driver} still gets requests")
            elif not self._await_gateways(f"{gateways},{PIPELINE}={fingerprint}", f"of pipeline {fingerprint}"):
                self._say(f"sequences of pipeline {fingerprint} still run; the next deploy prunes its stages")
            else:
                for ref in refs:
                    self._delete(ref, f"pruned {ref}")

    def _prune_of_member(self, old: list[KubernetesObject]) -> None:
        """Deletes a member's stages of other fingerprints, once they have no pods.

        Gateways of the fleet use them until they notice the member's change, and for answers that had begun, which take at most
        ten minutes. Pods that stay longer are kept by min_scale alone.
        """
        deadline = time.monotonic() + min(_LONGEST_ANSWER_SECONDS, self._timeout_seconds)
        for ref in map(Ref.of, old):
            while self._cluster.find("v1", "Pod", self._namespace, f"{SERVICE_LABEL}={ref.name}"):
                if time.monotonic() > deadline:
                    break
                time.sleep(_POLL_SECONDS)
            if time.monotonic() > deadline and self._timeout_seconds < _LONGEST_ANSWER_SECONDS:
                self._say(f"{ref} still has pods, which may answer; the next deploy prunes it")
            else:
                self._delete(ref, f"pruned {ref}")

    def _drivers(self, name: str) -> dict[str, str]:
        """Fingerprint of each pipeline that still gets requests → the gateway revision that sends them to its stages."""
        service = self._cluster.get(Ref(SERVING, "Service", self._namespace, name))
        if service is None:
            return {}
        routed = [each for each in self._revisions(name) if each["metadata"]["name"] in routed_revisions(service)]
        return {label(each, PIPELINE): each["metadata"]["name"] for each in routed}

    def collect_all(self, name: str) -> int:
        """Deletes everything that Lamina made for the pipeline, and waits until it is gone.

        Returns the number of deleted objects. Secrets that another pipeline uses stay.
        """
        own = [Ref.of(each) for each in self._own(name)]
        services = self._cluster.find(SERVING, "Service", self._namespace, f"{MANAGED_BY}=lamina")
        of_others = wanted_secrets([each for each in services if label(each, INSTANCE) != name])
        refs = [ref for ref in own if ref not in of_others]
        count = sum([self._delete(ref, f"deleted {ref}") for ref in refs])
        for ref in own:
            if ref in of_others:
                self._say(f"kept {ref}: pipeline {of_others[ref].pipeline} uses it, too")
        self.await_absence(refs)
        return count

    def await_absence(self, refs: Iterable[Ref]) -> None:
        """Waits until none of the objects exists. Raises DeployFailed, with the finalizers, if one does after the timeout."""
        deadline = time.monotonic() + self._timeout_seconds
        for ref in refs:
            while (live := self._cluster.get(ref)) is not None:
                if time.monotonic() > deadline:
                    finalizers = ", ".join(live["metadata"].get("finalizers") or ["none"])
                    raise DeployFailed(f"{ref} still exists; its finalizers: {finalizers}; check what should remove them")
                time.sleep(_POLL_SECONDS)

    def await_predecessor(self, service: Ref) -> None:
        """Waits until what Knative made for a deleted Service of this name is gone. Raises DeployFailed at the timeout.

        A new Service is `NotOwned` beside the old Route or Configuration, and its Configuration takes the old Revision for its
        own until that is deleted, with its pods. What may not be read, or has no owner and so stays, is not waited for.
        """
        found: list[KubernetesObject | None] = []
        for kind in ("Route", "Configuration"):
            with contextlib.suppress(NotPermitted):
                found.append(self._cluster.get(Ref(SERVING, kind, service.namespace, service.name)))
        with contextlib.suppress(NotPermitted):
            found += self._revisions(service.name)
        for ref in [Ref.of(each) for each in found if each is not None and each["metadata"].get("ownerReferences")]:
            self._say(f"waiting until {ref} is gone, which belongs to a deleted Service of that name")
            self.await_absence([ref])

    def await_end_of_old_gateways(self, name: str) -> bool:
        """Waits until no pod runs of gateway revisions without requests. False if one still runs after the timeout."""

        def is_old(pod: KubernetesObject) -> bool:
            services = self._cluster.find(SERVING, "Service", self._namespace, own_selector(name))
            return not any(label(pod, REVISION_LABEL) in traffic_of(service) for service in services)

        return self._await_gateways(f"{INSTANCE}={name},{COMPONENT}=gateway", "of old revisions", is_old)

    def _await_gateways(self, selector: str, which: str, is_meant: Callable[[KubernetesObject], bool] = lambda _: True) -> bool:
        """Waits until none of these gateway pods runs: they match the selector and `is_meant`. False at the timeout.

        which: these pods in words, for the message.
        """
        deadline = time.monotonic() + self._timeout_seconds
        said = False
        while True:
            found = self._cluster.find("v1", "Pod", self._namespace, selector)
            pods = [pod for pod in found if phase_of(pod) != "over" and is_meant(pod)]
            if not pods:
                return True
            if time.monotonic() > deadline:
                return False
            if not said:
                self._say(f"{len(pods)} gateway pod(s) {which} still finish their answers")
                said = True
            time.sleep(_POLL_SECONDS)

    def _delete(self, ref: Ref, line: str) -> bool:
        """Deletes the object and reports `line`. Returns whether the object existed."""
        existed = self._cluster.delete(ref)
        self._say(line)
        return existed

    def _own(self, name: str) -> list[KubernetesObject]:
        return [
            each
            for api_version, kind in OWN_KINDS
            if self._cluster.serves(api_version, kind)
            for each in self._cluster.find(api_version, kind, self._namespace, own_selector(name))
            if kind != "Lease" or label(each, COMPONENT)  # those of deployments have none, and end by themselves
        ]


def _latest(service: KubernetesObject) -> set[str]:
    status = service["status"]
    return {status.get("latestCreatedRevisionName", ""), status.get("latestReadyRevisionName", "")}


def _would_keep_pods(revision: KubernetesObject) -> bool:
    metadata = revision["metadata"]
    keeps = (metadata.get("annotations") or {}).get(_CLASS, "").startswith("hpa.") or not readiness(revision).ready
    return keeps and not metadata.get("deletionTimestamp")
