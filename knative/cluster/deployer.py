"""Rendered objects → a running pipeline, changed without losing an answer.

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
from knative.cluster.errors import ClusterError, DeployFailed
from knative.cluster.garbage import GarbageCollector
from knative.cluster.history import INSTANCE, Version, fingerprint_of, gateway_of, remember, versions
from knative.spec.kubernetes_object import KubernetesObject, to_yaml

_WATCH_SECONDS: Final = 2


class Deployer:
    """Acts on one namespace of one cluster; `say` gets a line whenever something happened that a person wants to know."""

    def __init__(self, cluster: Cluster, namespace: str, say: Callable[[str], None], timeout_seconds: float = 900) -> None:
        self._cluster = cluster
        self._namespace = namespace
        self._say = say
        self._timeout_seconds = timeout_seconds
        self._garbage = GarbageCollector(cluster, namespace, say, timeout_seconds)

    def deploy(self, objects: list[KubernetesObject], *, force: bool = False) -> str:
        """Idempotent. Returns the gateway's URL.

        Raises ClusterError: nothing that served before is touched until the new stages are Ready.
        """
        gateway = gateway_of(objects)
        name = gateway["metadata"]["name"]
        preflight.check(self._cluster, objects, self._say)
        self._garbage.await_deletions(objects)
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
        self._garbage.collect(name, objects)
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

    def _apply(self, objects: list[KubernetesObject], force: bool) -> None:
        for each in objects:
            self._cluster.apply(each, force=force)
            self._say(f"applied {Ref.of(each)}")

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
