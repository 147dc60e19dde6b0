"""What a pipeline does not need any more is deleted here, and here is waited until it is gone.

Only the history trims itself: it keeps its last versions.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Final

from knative.cluster.client import Cluster, Ref
from knative.cluster.diagnosis import SERVING
from knative.cluster.errors import DeployFailed, NotPermitted
from knative.cluster.history import INSTANCE, MANAGED_BY, fingerprint_of, gateway_of
from knative.spec.kubernetes_object import KubernetesObject

_LOOK_SECONDS: Final = 0.5
_STAGE: Final = "app.kubernetes.io/component=stage"
_GATEWAY: Final = "app.kubernetes.io/component=gateway"
_PIPELINE: Final = "lamina.dev/pipeline"
_FLOWS: Final = "flows.knative.dev/v1"
_OWN_KINDS: Final = (
    ("messaging.knative.dev/v1", "Subscription"),
    (_FLOWS, "Sequence"),
    ("eventing.knative.dev/v1", "Trigger"),
    ("eventing.knative.dev/v1", "Broker"),
    (SERVING, "Service"),
    ("monitoring.coreos.com/v1", "PodMonitor"),
    ("monitoring.coreos.com/v1", "PrometheusRule"),
    ("networking.k8s.io/v1", "NetworkPolicy"),
    ("rbac.authorization.k8s.io/v1", "RoleBinding"),
    ("rbac.authorization.k8s.io/v1", "Role"),
    ("v1", "ServiceAccount"),
    ("v1", "ConfigMap"),
    ("v1", "Secret"),
)
"""Everything that a pipeline may consist of, in the order in which it is taken away: what brings work first."""
_KEPT: Final = ("Secret", "ConfigMap")
"""Made by the deployer itself, token and history: no spec asks for them."""


class GarbageCollector:
    """Acts on one namespace of one cluster; `say` gets a line for everything that goes, and for what is waited for."""

    def __init__(self, cluster: Cluster, namespace: str, say: Callable[[str], None], timeout_seconds: float) -> None:
        self._cluster = cluster
        self._namespace = namespace
        self._say = say
        self._timeout_seconds = timeout_seconds

    def collect(self, name: str, objects: list[KubernetesObject]) -> None:
        """What the pipeline, deployed as these objects, left behind; waits for sequences that still run on other stages."""
        current = fingerprint_of(gateway_of(objects))
        for ref in self._unasked(name, set(map(Ref.of, objects)), current):
            self._delete(ref, f"deleted {ref}, which the spec does not ask for any more")
        for ref in map(Ref.of, self._old(SERVING, "Service", f"{INSTANCE}={name},{_GATEWAY}", current)):
            # For events, which go to the current one by now: its pods finish what they have in hand.
            self._delete(ref, f"pruned {ref}")
        for fingerprint, refs in self._old_pipelines(name, current).items():
            if not self._await_end_of_sequences(name, fingerprint):
                self._say(f"sequences of pipeline {fingerprint} still run; the next deploy prunes its stages")
                continue
            for ref in refs:
                self._delete(ref, f"pruned {ref}")

    def collect_all(self, name: str) -> int:
        """Everything of that name that Lamina made; waits until it is gone. Returns how many objects there were."""
        count = sum([self._delete(ref, f"deleted {ref}") for ref in map(Ref.of, self._own(name))])
        self.await_absence(map(Ref.of, self._own(name)))
        return count

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

    def _unasked(self, name: str, wanted: set[Ref], current: str) -> Iterator[Ref]:
        """What the spec does not ask for any more, such as the objects of a section that was taken out of it."""
        try:
            own = self._own(name)
        except NotPermitted as error:
            self._say(f"not looked for what the spec does not ask for any more: {error}")
            return
        for each in own:
            ref = Ref.of(each)
            of_an_old_pipeline = each["metadata"]["labels"].get(_PIPELINE, current) != current  # goes with its sequences
            if ref not in wanted and ref.kind not in _KEPT and not of_an_old_pipeline:
                yield ref

    def _old_pipelines(self, name: str, current: str) -> dict[str, list[Ref]]:
        """Fingerprint → what only its sequences need, in the order in which it goes."""
        old = self._old(SERVING, "Service", f"{INSTANCE}={name},{_STAGE}", current)
        if self._cluster.serves(_FLOWS, "Sequence"):
            old = self._old(_FLOWS, "Sequence", f"{INSTANCE}={name},{MANAGED_BY}=lamina", current) + old
        pipelines: dict[str, list[Ref]] = {}
        for each in old:
            pipelines.setdefault(fingerprint_of(each), []).append(Ref.of(each))
        return pipelines

    def _old(self, api_version: str, kind: str, selector: str, current: str) -> list[KubernetesObject]:
        """Objects of other pipelines than the current one."""
        found = self._cluster.find(api_version, kind, self._namespace, selector)
        return [each for each in found if fingerprint_of(each) != current]

    def _own(self, name: str) -> list[KubernetesObject]:
        selector = f"{INSTANCE}={name},{MANAGED_BY}=lamina"
        return [
            each
            for api_version, kind in _OWN_KINDS
            if self._cluster.serves(api_version, kind)
            for each in self._cluster.find(api_version, kind, self._namespace, selector)
        ]

    def _await_end_of_sequences(self, name: str, fingerprint: str) -> bool:
        """False where gateway pods of the pipeline are left after the timeout."""
        selector = f"{INSTANCE}={name},{_GATEWAY},{_PIPELINE}={fingerprint}"
        deadline = time.monotonic() + self._timeout_seconds
        said = False
        while pods := self._cluster.find("v1", "Pod", self._namespace, selector):
            if time.monotonic() > deadline:
                return False
            if not said:
                self._say(f"{len(pods)} gateway pod(s) of pipeline {fingerprint} still finish their answers")
                said = True
            time.sleep(_LOOK_SECONDS)
        return True
