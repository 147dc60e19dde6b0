"""Rendered objects → a running pipeline, changed without losing an answer, and taken away without leaving anything.

New stages are applied beside the old ones and become Ready, which for Knative means that a pod of each has run; then the
gateway moves; the old stages go once the last old gateway pod, and with it the last sequence, has ended.
"""

import difflib
import time
from collections.abc import Callable, Iterator
from typing import Any, Final

from knative.cluster import preflight
from knative.cluster.client import Cluster, Ref
from knative.cluster.diagnosis import SERVING, diagnose, hopeless_pod, next_step, readiness
from knative.cluster.errors import ClusterError, DeployFailed, NotPermitted
from knative.cluster.history import INSTANCE, MANAGED_BY, Version, fingerprint_of, gateway_of, remember, versions
from knative.spec.kubernetes_object import KubernetesObject, to_yaml

_WATCH_SECONDS: Final = 2
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


class Deployer:
    """Acts on one namespace of one cluster; `say` gets a line whenever something happened that a person wants to know."""

    def __init__(self, cluster: Cluster, namespace: str, say: Callable[[str], None], timeout_seconds: float = 900) -> None:
        self._cluster = cluster
        self._namespace = namespace
        self._say = say
        self._timeout_seconds = timeout_seconds

    def deploy(self, objects: list[KubernetesObject], *, force: bool = False) -> str:
        """Idempotent. Returns the gateway's URL.

        Raises ClusterError: nothing that served before is touched until the new stages are Ready.
        """
        gateway = gateway_of(objects)
        name = gateway["metadata"]["name"]
        preflight.check(self._cluster, objects, self._say)
        self._await_deletions(objects)
        preflight.ensure_secrets(self._cluster, objects, self._say)
        before = [each for each in objects if each["kind"] != "Service" or each["apiVersion"] != SERVING]
        stages = [each for each in objects if each not in before and each is not gateway]
        late = [each for each in before if each["apiVersion"].split("/")[0].endswith("knative.dev")]  # they name Services
        self._apply([each for each in before if each not in late], force)
        self._apply(stages, force)
        self._await_ready(stages)
        self._apply([gateway], force)
        url = self._await_ready([gateway])
        self._apply(late, force)
        number = remember(self._cluster, self._namespace, name, objects)
        self._say(f"version {number}, pipeline {fingerprint_of(gateway)}: {url}")
        self._drop(name, objects)
        self.prune(name, fingerprint_of(gateway))
        return url

    def rollback(self, name: str, number: int | None = None, *, force: bool = False) -> str:
        """Deploys what an earlier version was: the last with other objects, or the one of this number."""
        known = versions(self._cluster, self._namespace, name)
        if not known:
            raise ClusterError(f"no version of {name} in namespace {self._namespace} is known; deploy it first")
        version = _to_go_back_to(known, number)
        self._say(f"going back to version {version.number}, pipeline {version.fingerprint}")
        return self.deploy(list(version.objects), force=force)

    def diff(self, objects: list[KubernetesObject]) -> Iterator[str]:
        """Unified diff of what is there and what applying would make of it, by the cluster's own dry run."""
        for each in objects:
            live = self._cluster.get(Ref.of(each))
            after = self._cluster.apply(each, force=True, dry_run=True)
            old = _comparable(live).splitlines() if live else []
            yield from difflib.unified_diff(old, _comparable(after).splitlines(), "is", f"would be {Ref.of(each)}", lineterm="")

    def prune(self, name: str, current: str) -> None:
        """Deletes the stages of other pipelines once no gateway pod is left that drives them. Waits for that."""
        for gateway in self._old(SERVING, "Service", f"{INSTANCE}={name},{_GATEWAY}", current):
            # For events, which go to the current one by now: its pods finish what they have in hand.
            self._cluster.delete(Ref.of(gateway))
        old = self._old(SERVING, "Service", f"{INSTANCE}={name},{_STAGE}", current)
        if self._cluster.serves(_FLOWS, "Sequence"):
            old = self._old(_FLOWS, "Sequence", f"{INSTANCE}={name},{MANAGED_BY}=lamina", current) + old
        for fingerprint in dict.fromkeys(map(fingerprint_of, old)):
            if not self._await_end_of_sequences(name, fingerprint):
                self._say(f"sequences of pipeline {fingerprint} still run; the next deploy prunes its stages")
                continue
            for service in old:
                if fingerprint_of(service) == fingerprint:
                    self._cluster.delete(Ref.of(service))
                    self._say(f"pruned {Ref.of(service)}")

    def _old(self, api_version: str, kind: str, selector: str, current: str) -> list[KubernetesObject]:
        """Objects of other pipelines than the current one."""
        found = self._cluster.find(api_version, kind, self._namespace, selector)
        return [each for each in found if fingerprint_of(each) != current]

    def delete(self, name: str) -> int:
        """Takes away everything that carries the pipeline's name and was made by Lamina. Returns how many objects."""
        count = 0
        for ref in map(Ref.of, self._own(name)):
            count += self._cluster.delete(ref)
            self._say(f"deleted {ref}")
        deadline = time.monotonic() + self._timeout_seconds
        for ref in map(Ref.of, self._own(name)):
            self._await_absence(ref, deadline)
        return count

    def services(self, name: str) -> list[KubernetesObject]:
        """The pipeline's Services: gateway first, then stages by name."""
        found = self._cluster.find(SERVING, "Service", self._namespace, f"{INSTANCE}={name},{MANAGED_BY}=lamina")
        return sorted(found, key=lambda service: (service["metadata"]["name"] != name, service["metadata"]["name"]))

    def _drop(self, name: str, objects: list[KubernetesObject]) -> None:
        """Deletes what the spec does not ask for any more, such as the objects of a section that was taken out of it."""
        wanted, current = set(map(Ref.of, objects)), fingerprint_of(gateway_of(objects))
        try:
            own = self._own(name)
        except NotPermitted as error:
            self._say(f"not looked for what the spec does not ask for any more: {error}")
            return
        for each in own:
            ref = Ref.of(each)
            of_an_old_pipeline = each["metadata"]["labels"].get(_PIPELINE, current) != current  # `prune` knows when
            if ref not in wanted and ref.kind not in _KEPT and not of_an_old_pipeline:
                self._cluster.delete(ref)
                self._say(f"deleted {ref}, which the spec does not ask for any more")

    def _own(self, name: str) -> list[KubernetesObject]:
        selector = f"{INSTANCE}={name},{MANAGED_BY}=lamina"
        return [
            each
            for api_version, kind in _OWN_KINDS
            if self._cluster.serves(api_version, kind)
            for each in self._cluster.find(api_version, kind, self._namespace, selector)
        ]

    def _apply(self, objects: list[KubernetesObject], force: bool) -> None:
        for each in objects:
            self._cluster.apply(each, force=force)
            self._say(f"applied {Ref.of(each)}")

    def _await_deletions(self, objects: list[KubernetesObject]) -> None:
        """A half-deleted object takes no changes: wait until it is gone."""
        deadline = time.monotonic() + self._timeout_seconds
        for ref in map(Ref.of, objects):
            live = self._cluster.get(ref)
            if live is not None and live["metadata"].get("deletionTimestamp"):
                self._say(f"{ref} is being deleted: waiting until it is gone")
                self._await_absence(ref, deadline)

    def _await_absence(self, ref: Ref, deadline: float) -> None:
        while (live := self._cluster.get(ref)) is not None:
            if time.monotonic() > deadline:
                finalizers = ", ".join(live["metadata"].get("finalizers") or ["none"])
                raise DeployFailed(f"{ref} is still there; its finalizers: {finalizers}; look at what should remove them")
            time.sleep(_WATCH_SECONDS / 4)

    def _await_ready(self, services: list[KubernetesObject]) -> str:
        """Waits for all of them; returns the last one's URL. Raises DeployFailed as soon as one cannot become Ready."""
        waiting = {service["metadata"]["name"]: "" for service in services}
        deadline = time.monotonic() + self._timeout_seconds
        url = ""
        selector = f"{INSTANCE}={services[0]['metadata']['labels'][INSTANCE]}"
        while waiting:
            for live in self._cluster.watch(SERVING, "Service", self._namespace, selector, _WATCH_SECONDS):
                if live["metadata"]["name"] in waiting and self._note(live, waiting):
                    url = live["status"].get("url", "")
                if not waiting:
                    break
            for name in waiting:
                self._give_up_if_hopeless(name, deadline)
        return url

    def _note(self, live: KubernetesObject, waiting: dict[str, str]) -> bool:
        """Whether the Service is Ready; says what changed."""
        name, state = live["metadata"]["name"], readiness(live)
        if state.ready:
            del waiting[name]
            self._say(f"{name} is ready")
            return True
        if state.ready is False:
            raise DeployFailed(_failure(f"{name} failed: {state.reason}", diagnose(self._cluster, live)))
        if state.reason != waiting[name]:
            waiting[name] = state.reason
            self._say(f"{name}: {state.reason}")
        return False

    def _give_up_if_hopeless(self, name: str, deadline: float) -> None:
        live = self._cluster.get(Ref(SERVING, "Service", self._namespace, name))
        if live is None:
            raise DeployFailed(f"Service {name} was deleted by someone else while we waited for it")
        reason = hopeless_pod(self._cluster, live)
        if reason is None and time.monotonic() > deadline:
            reason = f"not ready after {self._timeout_seconds:g} s; --timeout waits longer"
        if reason is not None:
            raise DeployFailed(_failure(f"{name} does not become ready: {reason}", diagnose(self._cluster, live)))

    def _await_end_of_sequences(self, name: str, fingerprint: str) -> bool:
        selector = f"{INSTANCE}={name},{_GATEWAY},{_PIPELINE}={fingerprint}"
        deadline = time.monotonic() + self._timeout_seconds
        said = False
        while pods := self._cluster.find("v1", "Pod", self._namespace, selector):
            if time.monotonic() > deadline:
                return False
            if not said:
                self._say(f"{len(pods)} gateway pod(s) of pipeline {fingerprint} still finish their answers")
                said = True
            time.sleep(_WATCH_SECONDS / 4)
        return True


def _to_go_back_to(known: list[Version], number: int | None) -> Version:
    if number is None:
        others = [version for version in known if version.digest != known[-1].digest]
        if not others:
            raise ClusterError(f"version {known[-1].number} is the only one that is known; there is nothing to go back to")
        return others[-1]
    found = next((version for version in known if version.number == number), None)
    if found is None:
        raise ClusterError(f"version {number} is not known; known are {', '.join(str(each.number) for each in known)}")
    return found


def _failure(headline: str, details: list[str]) -> str:
    return "\n  ".join([headline, *details, next_step([headline, *details])])


def _comparable(manifest: KubernetesObject) -> str:
    """Without what the server keeps for itself."""
    metadata: dict[str, Any] = {
        key: value
        for key, value in manifest["metadata"].items()
        if key not in ("managedFields", "resourceVersion", "uid", "generation", "creationTimestamp")
    }
    rest = {key: value for key, value in manifest.items() if key not in ("metadata", "status")}
    return to_yaml([{**rest, "metadata": metadata}])
