"""Deploys rendered objects so that no answer is lost.

New stages are applied beside the old ones and become Ready, which for Knative means that a pod of each has run. Then the
gateway switches, Eventing is applied and becomes Ready, and the old stages are deleted when no gateway uses them any more.
Success or failure is recorded in the history before the caller learns it.
"""

import contextlib
import difflib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from knative.cluster import preflight
from knative.cluster.client import Cluster, Ref
from knative.cluster.diagnosis import hopeless_pods
from knative.cluster.errors import ClusterError, DeployFailed, DeployInProgress, NothingServes, Rejected
from knative.cluster.garbage import GarbageCollector
from knative.cluster.history import DeployedVersion, History, Outcome
from knative.cluster.lease import deploy_lease
from knative.cluster.objects import (
    COMPONENT,
    FLEET,
    INSTANCE,
    SERVING,
    canary_config_map,
    fingerprint_of,
    gateway_of,
    is_member,
    label,
    readiness,
)
from knative.cluster.pipeline_token import LAST_STATE, advance_rotation, ensure_token, rotation_is_unfinished, with_rotation
from knative.cluster.traffic import Traffic, is_ours, pinned_traffic, split, stable_revision, traffic_warnings
from knative.cluster.waiting import ReadinessWait
from knative.spec.kubernetes_object import KubernetesObject, to_yaml


@dataclass(frozen=True, slots=True)
class _Parts:
    """Objects of a pipeline, grouped by when they are applied: `first`, `stages`, `gateway`, `eventing`."""

    gateway: KubernetesObject
    first: list[KubernetesObject]  # access, network, monitoring
    stages: list[KubernetesObject]  # also the gateway for events, which gets none before Eventing is applied
    eventing: list[KubernetesObject]  # refers to Services, which must exist before

    @classmethod
    def of(cls, objects: list[KubernetesObject]) -> "_Parts":
        gateway = gateway_of(objects)
        services = [each for each in objects if each["kind"] == "Service" and each["apiVersion"] == SERVING]
        others = [each for each in objects if each not in services and each is not gateway]
        eventing = [each for each in others if each["apiVersion"].split("/")[0].endswith("knative.dev")]
        first = [each for each in others if each not in eventing]
        return cls(gateway, first, [each for each in services if each is not gateway], eventing)


class Deployer:
    """Deploys, changes and deletes pipelines in one namespace of a cluster.

    say: gets a line for each step that a user wants to know about. timeout_seconds: limit of each wait, such as for readiness.
    Methods that change a pipeline return the URL of its gateway and raise ClusterError. force: take over fields that another
    field manager has set; without it they raise FieldConflict.
    """

    def __init__(self, cluster: Cluster, namespace: str, say: Callable[[str], None], timeout_seconds: float = 900) -> None:
        self.namespace = namespace
        self._cluster = cluster
        self._say = say
        self._timeout_seconds = timeout_seconds
        self._garbage = GarbageCollector(cluster, namespace, say, timeout_seconds)
        self._check: Callable[[], None] = lambda: None  # raises if this deployment has lost its Lease

    def deploy(self, objects: list[KubernetesObject], *, force: bool = False) -> str:
        """Applies the objects, waits until all of them are Ready, and returns the gateway's URL.

        Requests stay with the old stages until the new ones are Ready. Deploying the same objects again changes nothing.
        """
        preflight.check(self._cluster, objects, self._say)
        with self._alone(gateway_of(objects)["metadata"]["name"]) as (history, wait):
            _refuse_beside_a_canary(history)
            return self._deploy(objects, history, wait, force)

    def rollback(self, name: str, number: int | None = None, *, force: bool = False) -> str:
        """Deploys an earlier version and returns the gateway's URL.

        If `number` is None, deploys the last version that served or, if that is the newest, the version that served before
        it. Deletes what a failed deployment or a canary has left.
        """
        with self._alone(name) as (history, wait):
            version = history.to_go_back_to(number)
            self._say(f"going back to version {version.number}, pipeline {version.fingerprint}")
            preflight.check(self._cluster, version.objects, self._say)
            running = history.canary()
            if running is not None and running.manifests != version.manifests:
                history.note(running, Outcome.ABORTED)
            return self._deploy(version.objects, history, wait, force)

    def canary(self, objects: list[KubernetesObject], percent: int, *, force: bool = False) -> str:
        """Deploys the objects as a canary, which gets `percent` of the requests. The others stay with the version that serves.

        Returns the gateway's URL. Called again for the same pipeline it changes the percentage. Monitoring, network and
        Eventing stay with the version that serves.
        """
        gateway = gateway_of(objects)
        name, fingerprint = gateway["metadata"]["name"], fingerprint_of(gateway)
        preflight.check(self._cluster, objects, self._say)
        with self._alone(name) as (history, wait):
            serving, running = history.serving(), history.canary()
            if serving is None:
                raise NothingServes(f"no version of {name} serves yet, so a canary is not possible; deploy it without --canary")
            if serving.fingerprint == fingerprint:
                raise Rejected(
                    f"version {serving.number} serves pipeline {fingerprint}, the same as this spec: a canary needs another "
                    "model, dtype or cut; otherwise it would change the stages that serve"
                )
            if running is not None and running.fingerprint != fingerprint:
                raise Rejected(
                    f"version {running.number} is a canary already ({running.reason}); `promote` or `abort` it before another"
                )
            stable = None if is_member(gateway) else stable_revision(self._cluster, self.namespace, name, serving)
            with self._noted(history, objects, Outcome.CANARY, f"{percent} % of the requests") as version:
                parts = self._prepare(objects)
                self._apply([each for each in parts.first if self._is_missing_access(each)], force)
                stages = [each for each in parts.stages if label(each, COMPONENT) != "gateway"]
                self._bring_up(stages, wait, force)
                if stable is None:
                    self._apply([canary_config_map(parts.gateway, percent)], force)
                    url = self._url_of_fleet(parts.gateway)
                else:
                    preflight.check_pod_network(self._cluster, parts.gateway, stages, self._say)
                    url = self._apply_gateway(parts.gateway, split(stable, percent), wait, force)
            self._say(f"version {version.number}, pipeline {fingerprint}, gets {percent} % of the requests of {url}")
            return url

    def promote(self, name: str, *, force: bool = False) -> str:
        """Sends all requests to the canary, deletes the pipeline that served before, and returns the gateway's URL.

        The old pipeline finishes its answers first.
        """
        with self._alone(name) as (history, wait):
            objects = self._canary_of(name, history).objects
            preflight.check(self._cluster, objects, self._say)
            return self._deploy(objects, history, wait, force)

    def abort(self, name: str, *, force: bool = False) -> str:
        """Sends no more requests to the canary, deletes its stages after their last answer, and returns the gateway's URL."""
        with self._alone(name) as (history, wait):
            version, serving = self._canary_of(name, history), history.serving()
            if serving is None:
                raise NothingServes(f"no version of {name} served before the canary; `delete` removes it")
            gateway = gateway_of(with_rotation(self._cluster, version.objects))
            if is_member(gateway):
                self._delete_canary(gateway)
            else:
                stable = stable_revision(self._cluster, self.namespace, name, serving)
                self._apply_gateway(gateway, split(stable, 0)[:1], wait, force)
            history.note(version, Outcome.ABORTED)
            self._say(f"version {version.number} gets no more requests")
            return self._deploy(serving.objects, history, wait, force)

    def rotate_token(self, name: str, *, force: bool = False) -> str:
        """Replaces the token between gateway and stages without losing an answer, and returns the gateway's URL.

        name: of a pipeline or a fleet, whose members have one token. A rotation that was interrupted is continued.
        """
        with self._alone(name) as (history, wait):
            objects = self._served(name, history)
            if is_member(gateway_of(objects)):
                fleet = label(gateway_of(objects), FLEET)
                raise Rejected(f"{name} shares the token of the fleet {fleet}; rotate that of the fleet: rotate-token {fleet}")
            preflight.check(self._cluster, objects, self._say)
            for member in self.members_of(name):
                self._served(member, History(self._cluster, self.namespace, member))

            def deploy_all() -> str:
                for member in self.members_of(name):
                    with self._alone(member) as (of_member, wait_for_member):
                        self._deploy(self._served(member, of_member), of_member, wait_for_member, force)
                return self._deploy(objects, history, wait, force)

            if rotation_is_unfinished(self._cluster, objects):
                deploy_all()
            while True:
                if not self._garbage.await_end_of_old_gateways(name):
                    raise DeployFailed("old gateway pods still answer, with the old token; rotate again when they have ended")
                state = advance_rotation(self._cluster, objects)
                self._say(f"token: state {state} of {LAST_STATE}")
                url = deploy_all()
                if state == LAST_STATE:
                    return url

    def delete(self, name: str) -> int:
        """Deletes everything that was made for the pipeline, and returns the number of deleted objects. Raises ClusterError."""
        with deploy_lease(self._cluster, self.namespace, name, self._say):
            return self._garbage.collect_all(name)

    def members_of(self, fleet: str) -> list[str]:
        """Names of the fleet's members on the cluster; empty if there is no such fleet."""
        found = self._cluster.find("v1", "ConfigMap", self.namespace, f"{FLEET}={fleet}")
        return sorted({label(each, INSTANCE) for each in found})

    def diff(self, objects: list[KubernetesObject]) -> Iterator[str]:
        """Yields lines of a unified diff: what applying the objects would change on the cluster.

        The cluster computes it by a server-side dry run.
        """
        for each in with_rotation(self._cluster, objects):
            live = self._cluster.get(Ref.of(each))
            after = self._cluster.apply(each, force=True, dry_run=True)
            old = _comparable(live).splitlines() if live else []
            yield from difflib.unified_diff(old, _comparable(after).splitlines(), "is", f"would be {Ref.of(each)}", lineterm="")

    # -- Steps ----------------------------------------------------------------------------------------------------------

    @contextmanager
    def _alone(self, name: str) -> Iterator[tuple[History, ReadinessWait]]:
        """Holds the pipeline's Lease, so that no other deployment changes the pipeline or its history at the same time.

        Yields the history, and a wait that ends if the Lease is lost. Raises DeployInProgress if another deployment holds it.
        """
        before = self._check
        with deploy_lease(self._cluster, self.namespace, name, self._say) as lease:
            self._check = lease.check
            yield (
                History(self._cluster, self.namespace, name),
                ReadinessWait(self._cluster, self.namespace, self._say, self._timeout_seconds, lease.check),
            )
        self._check = before

    def _deploy(self, objects: list[KubernetesObject], history: History, wait: ReadinessWait, force: bool) -> str:
        with self._noted(history, objects, Outcome.SERVED) as version:
            parts = self._prepare(objects)
            self._apply(parts.first, force)
            self._bring_up(parts.stages, wait, force)
            if is_member(parts.gateway):
                self._apply([parts.gateway], force)
                self._delete_canary(parts.gateway)
                url = self._url_of_fleet(parts.gateway)
            else:
                preflight.check_pod_network(self._cluster, parts.gateway, parts.stages, self._say)
                url = self._switch_gateway(parts.gateway, wait, force)
            self._apply(parts.eventing, force)
            wait.await_ready(parts.eventing)
        live = self._cluster.get(Ref.of(parts.gateway))
        for line in traffic_warnings(live) if live is not None and not is_member(live) else ():
            self._say(line)
        self._say(f"version {version.number}, pipeline {version.fingerprint}: {url}")
        self._garbage.collect(parts.gateway["metadata"]["name"], objects)
        return url

    @contextmanager
    def _noted(
        self, history: History, objects: list[KubernetesObject], outcome: Outcome, reason: str = ""
    ) -> Iterator[DeployedVersion]:
        """Records in the history that the objects are being deployed, and at the end the outcome. Yields the version.

        The outcome is FAILED after a ClusterError, else `outcome`. reason: text that is kept with `outcome`.
        """
        version = history.begin(objects)
        try:
            yield version
        except DeployInProgress:
            raise  # another deployment took over, and records the history now
        except ClusterError as error:
            with contextlib.suppress(ClusterError):  # the first error is the one to report
                history.note(version, Outcome.FAILED, str(error))
            raise
        history.note(version, outcome, reason)

    def _prepare(self, objects: list[KubernetesObject]) -> _Parts:
        for ref in map(Ref.of, objects):
            live = self._cluster.get(ref)
            if live is not None and live["metadata"].get("deletionTimestamp"):  # then it accepts no changes
                self._say(f"{ref} is being deleted: waiting until it is gone")
                self._garbage.await_absence([ref])
        ensure_token(self._cluster, objects, self._say)
        return _Parts.of(with_rotation(self._cluster, objects))

    def _bring_up(self, services: list[KubernetesObject], wait: ReadinessWait, force: bool) -> dict[str, KubernetesObject]:
        """Applies the Services, waits until all are Ready, and returns them by name.

        First deletes Services whose revisions all failed, because Knative never tries a failed revision again.
        """
        for ref in map(Ref.of, services):
            live = self._cluster.get(ref)
            if live is None:
                self._garbage.await_predecessor(ref)
                continue
            hopeless, status = set(hopeless_pods(self._cluster, live)), live.get("status") or {}
            if not status.get("latestReadyRevisionName") and (hopeless or readiness(live).ready is False):
                self._cluster.delete(ref)
                self._garbage.await_absence([ref])
                self._say(f"deleted {ref}, because none of its revisions ever ran, to create it again")
                self._garbage.await_predecessor(ref)
            else:  # pods that fail now get another try, because their cause may be fixed
                wait.known_hopeless |= hopeless
        self._apply(services, force)
        return wait.await_ready(services)

    def _switch_gateway(self, gateway: KubernetesObject, wait: ReadinessWait, force: bool) -> str:
        """Applies the gateway without a split, so that all requests go to its new revision once that is Ready.

        Returns its URL.
        """
        live = self._cluster.get(Ref.of(gateway))
        pinned = pinned_traffic(live) if live is not None and is_ours(live) else []
        if pinned:
            # Keep the split until the new revision is Ready: without it all requests would go to the canary.
            self._apply_gateway(gateway, pinned, wait, force)
        return _url_of(gateway, self._bring_up([gateway], wait, force))

    def _apply_gateway(self, gateway: KubernetesObject, traffic: Traffic, wait: ReadinessWait, force: bool) -> str:
        """Applies the gateway with a split of requests, waits until it is Ready, and returns its URL.

        Fields that another field manager has set raise FieldConflict unless `force`; the split is taken over in any case.
        """
        self._cluster.apply(gateway, force=force, dry_run=True)
        self._check()
        self._cluster.apply({**gateway, "spec": {**gateway["spec"], "traffic": traffic}}, force=True)
        self._say(f"applied {Ref.of(gateway)}")
        return _url_of(gateway, wait.await_ready([gateway]))

    def _delete_canary(self, gateway: KubernetesObject) -> None:
        """Deletes the ConfigMap of a member's canary, if there is one: it gets no more requests."""
        ref = Ref.of(canary_config_map(gateway, 0))
        if self._cluster.delete(ref):
            self._say(f"deleted {ref}")

    def _url_of_fleet(self, member: KubernetesObject) -> str:
        """URL of the gateway of a member's fleet; empty if there is none yet."""
        service = self._cluster.get(Ref(SERVING, "Service", self.namespace, label(member, FLEET)))
        return str(((service or {}).get("status") or {}).get("url", ""))

    def _apply(self, objects: list[KubernetesObject], force: bool) -> None:
        for each in objects:
            self._check()
            self._cluster.apply(each, force=force)
            self._say(f"applied {Ref.of(each)}")

    def _is_missing_access(self, manifest: KubernetesObject) -> bool:
        access = manifest["kind"] in ("ServiceAccount", "Role", "RoleBinding")
        return access and self._cluster.get(Ref.of(manifest)) is None

    def _served(self, name: str, history: History) -> list[KubernetesObject]:
        """Objects of the version that serves. Raises NothingServes if none does, and Rejected if a canary runs beside it."""
        version = history.serving()
        if version is None:
            raise NothingServes(f"no version of {name} serves in namespace {self.namespace}; deploy it first")
        _refuse_beside_a_canary(history)
        return version.objects

    def _canary_of(self, name: str, history: History) -> DeployedVersion:
        version = history.canary()
        if version is None:
            raise NothingServes(
                f"no canary of {name} runs in namespace {self.namespace}; start one with: deploy SPEC --canary 10"
            )
        return version


def _refuse_beside_a_canary(history: History) -> None:
    running = history.canary()
    if running is not None:
        raise Rejected(
            f"version {running.number} is a canary ({running.reason}); `promote` or `abort` it before another deploy"
        )


def _url_of(gateway: KubernetesObject, ready: dict[str, KubernetesObject]) -> str:
    status = ready[gateway["metadata"]["name"]].get("status") or {}
    return str(status.get("url", ""))


def _comparable(manifest: KubernetesObject) -> str:
    """The object as YAML for a diff, without its status and the metadata that the server writes."""
    metadata: dict[str, Any] = {
        key: value
        for key, value in manifest["metadata"].items()
        if key not in ("managedFields", "resourceVersion", "uid", "generation", "creationTimestamp")
    }
    rest = {key: value for key, value in manifest.items() if key not in ("metadata", "status")}
    return to_yaml([{**rest, "metadata": metadata}])
