"""Rendered objects → a running pipeline, changed without losing an answer.

New stages are applied beside the old ones and become Ready, which for Knative means that a pod of each has run; then the
gateway moves; then Eventing, which has to become Ready as well; the old stages go once nothing drives them any more. What
happened, good or bad, is in the history before anybody is told.
"""

import contextlib
import difflib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from knative.cluster import pod_network, preflight, rotation
from knative.cluster.advice import advice
from knative.cluster.canary import is_ours, pinned_traffic, split, stable_revision, with_traffic
from knative.cluster.client import Cluster, Ref
from knative.cluster.diagnosis import hopeless_pod
from knative.cluster.errors import ClusterError, DeployFailed, DeployInProgress, NothingServes, Refused
from knative.cluster.garbage import GarbageCollector
from knative.cluster.history import COMPONENT, History, Outcome, Version, fingerprint_of, gateway_of
from knative.cluster.lease import deploy_lease
from knative.cluster.pipeline_token import ensure_token, marked
from knative.cluster.readiness import SERVING, readiness
from knative.cluster.waiting import ReadinessWait
from knative.spec.kubernetes_object import KubernetesObject, to_yaml


@dataclass(frozen=True, slots=True)
class _Parts:
    """Objects by when they are applied."""

    gateway: KubernetesObject
    first: list[KubernetesObject]
    """Access, network, monitoring."""
    stages: list[KubernetesObject]
    """And the gateway for events, which nothing leads to before Eventing does."""
    eventing: list[KubernetesObject]
    """They name Services."""

    @classmethod
    def of(cls, objects: list[KubernetesObject]) -> "_Parts":
        gateway = gateway_of(objects)
        services = [each for each in objects if each["kind"] == "Service" and each["apiVersion"] == SERVING]
        eventing = [each for each in objects if each not in services and _group(each).endswith("knative.dev")]
        first = [each for each in objects if each not in services and each not in eventing]
        return cls(gateway, first, [each for each in services if each is not gateway], eventing)


class Deployer:
    """Acts on one namespace of one cluster; `say` gets a line whenever something happened that a person wants to know."""

    def __init__(self, cluster: Cluster, namespace: str, say: Callable[[str], None], timeout_seconds: float = 900) -> None:
        self._cluster = cluster
        self._namespace = namespace
        self._say = say
        self._timeout_seconds = timeout_seconds
        self._garbage = GarbageCollector(cluster, namespace, say, timeout_seconds)
        self._check: Callable[[], None] = lambda: None
        """Whether this deployment may go on: the Lease's, while there is one."""

    def deploy(self, objects: list[KubernetesObject], *, force: bool = False) -> str:
        """Idempotent. Returns the gateway's URL once everything is Ready.

        Raises ClusterError: nothing that served before is touched until the new stages are Ready.
        """
        preflight.check(self._cluster, objects, self._say)
        with self._alone(_name_of(objects)) as (history, wait):
            self._refuse_beside_a_canary(history)
            return self._deploy(objects, history, wait, force)

    def rollback(self, name: str, number: int | None = None, *, force: bool = False) -> str:
        """Deploys what last served, or what served before that, or the version of this number. Returns the gateway's URL.

        What a deploy that failed, or a canary, has left is taken away. Raises ClusterError.
        """
        with self._alone(name) as (history, wait):
            version = history.to_go_back_to(number)
            self._say(f"going back to version {version.number}, pipeline {version.fingerprint}")
            objects = version.objects
            preflight.check(self._cluster, objects, self._say)
            running = history.canary()
            if running is not None and running.manifests != version.manifests:
                history.note(running, Outcome.ABORTED)
            return self._deploy(objects, history, wait, force)

    def canary(self, objects: list[KubernetesObject], percent: int, *, force: bool = False) -> str:
        """Gives the pipeline of these objects so many percent of the requests, beside the one that serves.

        Once more: another share. Monitoring, network and Eventing stay with the pipeline that serves.
        Returns the gateway's URL. Raises ClusterError.
        """
        name, fingerprint = _name_of(objects), fingerprint_of(gateway_of(objects))
        preflight.check(self._cluster, objects, self._say)
        with self._alone(name) as (history, wait):
            serving, running = history.serving(), history.canary()
            if serving is None:
                raise NothingServes(f"no version of {name} serves yet, so nothing can go beside it; deploy it without --canary")
            if serving.fingerprint == fingerprint:
                raise Refused(
                    f"version {serving.number} serves pipeline {fingerprint}, and so does this spec: a canary needs another "
                    "model, dtype or cut, for with those alike it would change the stages that serve"
                )
            if running is not None and running.fingerprint != fingerprint:
                raise Refused(
                    f"version {running.number} is a canary already ({running.reason}); `promote` or `abort` it before another"
                )
            stable = stable_revision(self._cluster, self._namespace, name, serving)
            with self._noted(history, objects, Outcome.CANARY, f"{percent} % of the requests") as version:
                parts = self._prepare(objects)
                self._apply([each for each in parts.first if self._is_missing_access(each)], force)
                stages = [each for each in parts.stages if not _is_gateway(each)]
                self._bring_up_stages(parts.gateway, stages, wait, force)
                url = self._apply_gateway(parts.gateway, split(stable, percent), wait, force)
            self._say(f"version {version.number}, pipeline {fingerprint}, gets {percent} % of the requests of {url}")
            return url

    def promote(self, name: str, *, force: bool = False) -> str:
        """The canary gets all requests; the pipeline that served before goes as after any deploy. Returns the gateway's URL."""
        with self._alone(name) as (history, wait):
            objects = self._canary_of(name, history).objects
            preflight.check(self._cluster, objects, self._say)
            return self._deploy(objects, history, wait, force)

    def abort(self, name: str, *, force: bool = False) -> str:
        """The canary gets no more requests, at once; then its stages go. Returns the gateway's URL."""
        with self._alone(name) as (history, wait):
            version, serving = self._canary_of(name, history), history.serving()
            if serving is None:
                raise NothingServes(f"no version of {name} served before the canary; `delete` takes it away")
            stable = stable_revision(self._cluster, self._namespace, name, serving)
            canary = _Parts.of(marked(self._cluster, version.objects))
            self._apply_gateway(canary.gateway, split(stable, 0)[:1], wait, force)
            history.note(version, Outcome.ABORTED)
            self._say(f"version {version.number} gets no more requests")
            return self._deploy(serving.objects, history, wait, force)

    def rotate_token(self, name: str, *, force: bool = False) -> str:
        """Another token between gateway and stages; no answer is lost. Returns the gateway's URL. Raises ClusterError.

        Interrupted, it is done again and goes on.
        """
        with self._alone(name) as (history, wait):
            version = history.serving()
            if version is None:
                raise NothingServes(f"no version of {name} serves in namespace {self._namespace}; deploy it first")
            objects = version.objects
            preflight.check(self._cluster, objects, self._say)
            self._refuse_beside_a_canary(history)
            if rotation.unfinished(self._cluster, objects):
                self._deploy(objects, history, wait, force)
            while True:
                if not self._garbage.await_end_of_old_gateways(name):
                    raise DeployFailed("old gateway pods still answer, with the old token; rotate again when they have ended")
                state = rotation.advance(self._cluster, objects)
                self._say(f"token: state {state} of 3")
                url = self._deploy(objects, history, wait, force)
                if state == 3:
                    return url

    def delete(self, name: str) -> int:
        """Everything that was made for the pipeline; returns how many objects that were. Raises ClusterError."""
        with deploy_lease(self._cluster, self._namespace, name, self._say):
            return self._garbage.collect_all(name)

    def diff(self, objects: list[KubernetesObject]) -> Iterator[str]:
        """Unified diff of what is there and what applying would make of it, by the cluster's own dry run."""
        for each in marked(self._cluster, objects):
            live = self._cluster.get(Ref.of(each))
            after = self._cluster.apply(each, force=True, dry_run=True)
            old = _comparable(live).splitlines() if live else []
            yield from difflib.unified_diff(old, _comparable(after).splitlines(), "is", f"would be {Ref.of(each)}", lineterm="")

    # -- Steps ----------------------------------------------------------------------------------------------------------

    def _refuse_beside_a_canary(self, history: History) -> None:
        running = history.canary()
        if running is not None:
            raise Refused(
                f"version {running.number} is a canary ({running.reason}); `promote` or `abort` it before another deploy"
            )

    @contextmanager
    def _alone(self, name: str) -> Iterator[tuple[History, ReadinessWait]]:
        """No other deployment of this pipeline goes on meanwhile, so what the history says stays true."""
        with deploy_lease(self._cluster, self._namespace, name, self._say) as lease:
            self._check = lease.check
            yield (
                History(self._cluster, self._namespace, name),
                ReadinessWait(self._cluster, self._namespace, self._say, self._timeout_seconds, lease.check),
            )

    def _deploy(self, objects: list[KubernetesObject], history: History, wait: ReadinessWait, force: bool) -> str:
        name = _name_of(objects)
        with self._noted(history, objects, Outcome.SERVED) as version:
            parts = self._prepare(objects)
            self._apply(parts.first, force)
            self._bring_up_stages(parts.gateway, parts.stages, wait, force)
            url = self._move_gateway(parts.gateway, wait, force)
            self._apply(parts.eventing, force)
            wait.await_ready(parts.eventing)
        for line in advice(self._cluster, parts.gateway):
            self._say(line)
        self._say(f"version {version.number}, pipeline {version.fingerprint}: {url}")
        self._garbage.collect(name, objects)
        return url

    @contextmanager
    def _noted(
        self, history: History, objects: list[KubernetesObject], outcome: Outcome, reason: str = ""
    ) -> Iterator[Version]:
        """Written into the history: that it begins, and what became of it."""
        version = history.begin(objects)
        try:
            yield version
        except DeployInProgress:
            raise  # whoever took over writes the history now
        except ClusterError as error:
            with contextlib.suppress(ClusterError):  # what went wrong first is what is told
                history.note(version, Outcome.FAILED, str(error))
            raise
        history.note(version, outcome, reason)

    def _prepare(self, objects: list[KubernetesObject]) -> _Parts:
        """The objects as they are applied."""
        self._garbage.await_deletions(objects)
        ensure_token(self._cluster, objects, self._say)
        return _Parts.of(marked(self._cluster, objects))

    def _bring_up_stages(
        self, gateway: KubernetesObject, stages: list[KubernetesObject], wait: ReadinessWait, force: bool
    ) -> None:
        """gateway: that will follow their pods."""
        self._clear_failed(stages)
        wait.note_hopeless(stages)
        self._apply(stages, force)
        wait.await_ready(stages)
        pod_network.check(self._cluster, gateway, stages, self._say)

    def _clear_failed(self, services: list[KubernetesObject]) -> None:
        """Services of an earlier attempt that never ran: Knative gives up on a revision for good, whatever is mended later."""
        for ref in map(Ref.of, services):
            live = self._cluster.get(ref)
            if live is None or (live.get("status") or {}).get("latestReadyRevisionName"):
                continue
            if readiness(live).ready is False or hopeless_pod(self._cluster, live) is not None:
                self._cluster.delete(ref)
                self._garbage.await_absence([ref])
                self._say(f"deleted {ref}, of which no revision ever ran, to make it anew")

    def _move_gateway(self, gateway: KubernetesObject, wait: ReadinessWait, force: bool) -> str:
        """All requests to these objects' gateway, once it is Ready. Returns its URL."""
        live = self._cluster.get(Ref.of(gateway))
        pinned = pinned_traffic(live) if live is not None and is_ours(live) else []
        if pinned:
            # Without a split requests go to the last revision that became Ready: to a canary, until this one has.
            self._apply_gateway(gateway, pinned, wait, force)
        self._clear_failed([gateway])
        wait.note_hopeless([gateway])
        self._apply([gateway], force)
        return _url(wait.await_ready([gateway])[gateway["metadata"]["name"]])

    def _apply_gateway(self, gateway: KubernetesObject, traffic: list[dict[str, Any]], wait: ReadinessWait, force: bool) -> str:
        """With requests split so. Fields that somebody else set are a conflict all the same; the split itself never is."""
        self._cluster.apply(gateway, force=force, dry_run=True)
        self._check()
        self._cluster.apply(with_traffic(gateway, traffic), force=True)
        self._say(f"applied {Ref.of(gateway)}")
        return _url(wait.await_ready([gateway])[gateway["metadata"]["name"]])

    def _apply(self, objects: list[KubernetesObject], force: bool) -> None:
        for each in objects:
            self._check()
            self._cluster.apply(each, force=force)
            self._say(f"applied {Ref.of(each)}")

    def _is_missing_access(self, manifest: KubernetesObject) -> bool:
        access = manifest["kind"] in ("ServiceAccount", "Role", "RoleBinding")
        return access and self._cluster.get(Ref.of(manifest)) is None

    def _canary_of(self, name: str, history: History) -> Version:
        version = history.canary()
        if version is None:
            raise NothingServes(
                f"no canary of {name} runs in namespace {self._namespace}; start one with: deploy SPEC --canary 10"
            )
        return version


def _name_of(objects: list[KubernetesObject]) -> str:
    name: str = gateway_of(objects)["metadata"]["name"]
    return name


def _group(manifest: KubernetesObject) -> str:
    group: str = manifest["apiVersion"].split("/")[0]
    return group


def _is_gateway(manifest: KubernetesObject) -> bool:
    component: str = manifest["metadata"]["labels"].get(COMPONENT, "")
    return component == "gateway"


def _url(gateway: KubernetesObject) -> str:
    url: str = (gateway.get("status") or {}).get("url", "")
    return url


def _comparable(manifest: KubernetesObject) -> str:
    """Without what the server keeps for itself."""
    metadata: dict[str, Any] = {
        key: value
        for key, value in manifest["metadata"].items()
        if key not in ("managedFields", "resourceVersion", "uid", "generation", "creationTimestamp")
    }
    rest = {key: value for key, value in manifest.items() if key not in ("metadata", "status")}
    return to_yaml([{**rest, "metadata": metadata}])
