"""What a pipeline does not need any more is deleted here, and here is waited until it is gone.

Everything that Lamina made carries the pipeline's name. Of that, sections that the spec has no more go at once; stages go when
no revision of the gateway that gets requests drives them, and no gateway pod that still runs. Only the history trims itself,
and a Lease goes with who holds it.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Final

from knative.cluster.client import Cluster, Ref
from knative.cluster.errors import DeployFailed, NotPermitted
from knative.cluster.history import COMPONENT, INSTANCE, MANAGED_BY, PIPELINE, fingerprint_of, gateway_of
from knative.cluster.pipeline_token import wanted_secrets
from knative.cluster.readiness import REVISION_LABEL, SERVICE_LABEL, SERVING, traffic_of
from knative.spec.kubernetes_object import KubernetesObject

_LOOK_SECONDS: Final = 0.5
_FLOWS: Final = "flows.knative.dev/v1"
_ACCESS: Final = (
    ("rbac.authorization.k8s.io/v1", "RoleBinding"),
    ("rbac.authorization.k8s.io/v1", "Role"),
    ("v1", "ServiceAccount"),
)
OWN_KINDS: Final = (
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
    ("v1", "ConfigMap"),
    ("v1", "Secret"),
)
"""Everything that a pipeline may consist of, in the order in which it is taken away: what brings work first."""
_KEPT: Final = ("Secret", "ConfigMap")
"""Made by the deployer itself, token and history: no spec asks for them."""
_OVER: Final = ("Succeeded", "Failed")
"""Phases of a pod that runs no more, evicted ones among them."""


class GarbageCollector:
    """Acts on one namespace of one cluster; `say` gets a line for everything that goes, and for what is waited for."""

    def __init__(self, cluster: Cluster, namespace: str, say: Callable[[str], None], timeout_seconds: float) -> None:
        self._cluster = cluster
        self._namespace = namespace
        self._say = say
        self._timeout_seconds = timeout_seconds

    def collect(self, name: str, objects: list[KubernetesObject]) -> None:
        """What the pipeline, deployed as these objects, left behind; waits for sequences that still run on other stages.

        What may not be looked at stays, and is said.
        """
        try:
            self._collect(name, objects)
        except NotPermitted as error:
            self._say(f"not looked for what the spec does not ask for any more: {error}")

    def _collect(self, name: str, objects: list[KubernetesObject]) -> None:
        wanted, current = set(map(Ref.of, objects)), fingerprint_of(gateway_of(objects))
        unasked = [each for each in self._own(name) if Ref.of(each) not in wanted and each["kind"] not in _KEPT]
        of_old_pipelines = [each for each in unasked if _drives_or_is_driven(each) and fingerprint_of(each) != current]
        access = [each for each in unasked if (each["apiVersion"], each["kind"]) in _ACCESS]
        for each in unasked:
            if each not in of_old_pipelines and each not in access:
                self._delete(Ref.of(each), f"deleted {Ref.of(each)}, which the spec does not ask for any more")
        self._prune(name, of_old_pipelines)
        self._delete_access(name, access)

    def _prune(self, name: str, old: list[KubernetesObject]) -> None:
        """Stages, Sequences and gateways for events of other pipelines than the current one."""
        for each in old:
            if each["metadata"]["labels"].get(COMPONENT) == "gateway":
                # For events, which go to the current one by now: its pods finish what they have in hand.
                self._delete(Ref.of(each), f"pruned {Ref.of(each)}")
        rest = [each for each in old if each["metadata"]["labels"].get(COMPONENT) != "gateway"]
        for fingerprint in dict.fromkeys(map(fingerprint_of, rest)):
            driver = self.driven(name).get(fingerprint)
            if driver is not None:
                self._say(f"the stages of pipeline {fingerprint} stay: {driver} still gets requests")
            elif not self._await_end_of_sequences(name, fingerprint):
                self._say(f"sequences of pipeline {fingerprint} still run; the next deploy prunes its stages")
            else:
                for each in rest:
                    if fingerprint_of(each) == fingerprint:
                        self._delete(Ref.of(each), f"pruned {Ref.of(each)}")

    def driven(self, name: str) -> dict[str, str]:
        """Fingerprint of each pipeline whose stages are driven by a revision of the gateway with traffic → that revision."""
        service = self._cluster.get(Ref(SERVING, "Service", self._namespace, name))
        if service is None:
            return {}
        routed = set(traffic_of(service)) | {each.get("revisionName") for each in service["spec"].get("traffic") or []}
        revisions = self._cluster.find(SERVING, "Revision", self._namespace, f"{SERVICE_LABEL}={name}")
        return {
            each["metadata"]["labels"].get(PIPELINE, ""): each["metadata"]["name"]
            for each in revisions
            if each["metadata"]["name"] in routed
        }

    def collect_all(self, name: str) -> int:
        """Everything of that name that Lamina made; waits until it is gone. Returns how many objects there were."""
        shared = self._tokens_of_others(name)
        refs = [ref for ref in map(Ref.of, self._own(name)) if ref not in shared]
        count = sum([self._delete(ref, f"deleted {ref}") for ref in refs])
        for ref, other in shared.items():
            self._say(f"kept {ref}: pipeline {other} uses it, too")
        self.await_absence(refs)
        return count

    def _tokens_of_others(self, name: str) -> dict[Ref, str]:
        """Secrets of this pipeline that another one's Services name → the other's name."""
        services = self._cluster.find(SERVING, "Service", self._namespace, f"{MANAGED_BY}=lamina")
        others = [each for each in services if each["metadata"]["labels"].get(INSTANCE) != name]
        own = {Ref.of(each) for each in self._find("v1", "Secret", name)}
        return {ref: wanted.pipeline for ref, wanted in wanted_secrets(others).items() if ref in own}

    def await_absence(self, refs: Iterable[Ref]) -> None:
        """Raises DeployFailed, naming the finalizers, where one is still there after the timeout."""
        deadline = time.monotonic() + self._timeout_seconds
        for ref in refs:
            while (live := self._cluster.get(ref)) is not None:
                if time.monotonic() > deadline:
                    finalizers = ", ".join(live["metadata"].get("finalizers") or ["none"])
                    raise DeployFailed(f"{ref} is still there; its finalizers: {finalizers}; look at what should remove them")
                time.sleep(_LOOK_SECONDS)

    def await_deletions(self, objects: list[KubernetesObject]) -> None:
        """A half-deleted object takes no changes: waits for those that are on their way out."""
        for ref in map(Ref.of, objects):
            live = self._cluster.get(ref)
            if live is not None and live["metadata"].get("deletionTimestamp"):
                self._say(f"{ref} is being deleted: waiting until it is gone")
                self.await_absence([ref])

    def _delete(self, ref: Ref, line: str) -> bool:
        """Whether it was there."""
        there = self._cluster.delete(ref)
        self._say(line)
        return there

    def _delete_access(self, name: str, access: list[KubernetesObject]) -> None:
        """The gateway's ServiceAccount and rights, once no pod runs as that account."""
        if not access:
            return
        used = {pod["spec"].get("serviceAccountName") for pod in self._live_pods(f"{INSTANCE}={name}")}
        for ref in map(Ref.of, access):
            if ref.name in used:
                self._say(f"{ref} stays while a pod runs as {ref.name}; the next deploy deletes it")
            else:
                self._delete(ref, f"deleted {ref}, which the spec does not ask for any more")

    def _own(self, name: str) -> list[KubernetesObject]:
        return [
            each
            for api_version, kind in OWN_KINDS
            if self._cluster.serves(api_version, kind)
            for each in self._find(api_version, kind, name)
        ]

    def _find(self, api_version: str, kind: str, name: str) -> list[KubernetesObject]:
        return self._cluster.find(api_version, kind, self._namespace, f"{INSTANCE}={name},{MANAGED_BY}=lamina")

    def _live_pods(self, selector: str) -> Iterator[KubernetesObject]:
        for pod in self._cluster.find("v1", "Pod", self._namespace, selector):
            if (pod.get("status") or {}).get("phase") not in _OVER:
                yield pod

    def await_end_of_old_gateways(self, name: str) -> bool:
        """False where pods of gateways' revisions without requests are left after the timeout."""

        def old() -> list[KubernetesObject]:
            services = self._find(SERVING, "Service", name)
            routed = {revision for service in services for revision in traffic_of(service)}
            pods = self._live_pods(f"{INSTANCE}={name},{COMPONENT}=gateway")
            return [pod for pod in pods if pod["metadata"]["labels"].get(REVISION_LABEL) not in routed]

        return self._await_none(old, "of old revisions")

    def _await_end_of_sequences(self, name: str, fingerprint: str) -> bool:
        """False where gateway pods of the pipeline are left after the timeout."""
        selector = f"{INSTANCE}={name},{COMPONENT}=gateway,{PIPELINE}={fingerprint}"
        return self._await_none(lambda: list(self._live_pods(selector)), f"of pipeline {fingerprint}")

    def _await_none(self, look: Callable[[], list[KubernetesObject]], which: str) -> bool:
        """False where gateway pods are left after the timeout."""
        deadline = time.monotonic() + self._timeout_seconds
        said = False
        while pods := look():
            if time.monotonic() > deadline:
                return False
            if not said:
                self._say(f"{len(pods)} gateway pod(s) {which} still finish their answers")
                said = True
            time.sleep(_LOOK_SECONDS)
        return True


def _drives_or_is_driven(manifest: KubernetesObject) -> bool:
    """Whose name carries the fingerprint: each pipeline has its own."""
    return (manifest["apiVersion"], manifest["kind"]) in ((SERVING, "Service"), (_FLOWS, "Sequence"))
