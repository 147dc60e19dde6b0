"""Versions of a pipeline that were deployed or tried.

A ConfigMap for each keeps its objects and outcome, so that a rollback needs no file.
"""

from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Final

import yaml

from knative.cluster.client import Cluster, Ref
from knative.cluster.errors import NothingServes
from knative.cluster.objects import INSTANCE, MANAGED_BY, PIPELINE, fingerprint_of, gateway_of
from knative.spec.kubernetes_object import KubernetesObject, kubernetes_object, to_yaml

KEPT_VERSIONS: Final = 10
_HISTORY: Final = "lamina.dev/history"
_NUMBER: Final = "lamina.dev/version"
_OUTCOME: Final = "lamina.dev/outcome"
_REASON: Final = "lamina.dev/reason"
_MANIFESTS: Final = "manifests.yaml"
_REASON_LENGTH: Final = 500


class Outcome(StrEnum):
    """How the deployment of a version of a pipeline has ended, or that it is still in progress."""

    STARTED = "started"  # in progress, or its deployer has died
    SERVED = "served"
    CANARY = "canary"  # gets a part of the requests, beside the last version that served
    FAILED = "failed"
    ABORTED = "aborted"  # a canary that was removed


@dataclass(frozen=True, slots=True)
class DeployedVersion:
    """One version of a pipeline: the objects of one deployment, and its outcome.

    A rollback deploys the objects of an old version as a new version.
    """

    number: int
    manifests: str  # all rendered objects, as YAML
    fingerprint: str
    outcome: Outcome
    reason: str = ""  # FAILED: first line of the error; CANARY: its share of the requests

    @property
    def objects(self) -> list[KubernetesObject]:
        loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # PyYAML's parser in C, ten times as fast
        return list(yaml.load_all(self.manifests, Loader=loader))

    def __str__(self) -> str:
        return f"{self.number} ({self.outcome})"


class History:
    """The versions of one pipeline in a namespace, read from the cluster by each call."""

    def __init__(self, cluster: Cluster, namespace: str, name: str) -> None:
        self._cluster = cluster
        self._namespace = namespace
        self._name = name

    def versions(self) -> list[DeployedVersion]:
        """All versions that are kept, oldest first."""
        found = self._cluster.find("v1", "ConfigMap", self._namespace, f"{INSTANCE}={self._name},{_HISTORY}=true")
        return sorted(map(_read, found), key=lambda version: version.number)

    def begin(self, objects: list[KubernetesObject]) -> DeployedVersion:
        """Records that the objects are being deployed, deletes versions that are too old, and returns the version.

        That is the newest version if it has the same objects, else a new one.
        """
        known, manifests = self.versions(), to_yaml(objects)
        if known and known[-1].manifests == manifests:
            newest = known[-1]
            return newest if newest.outcome is Outcome.SERVED else self.note(newest, Outcome.STARTED)
        number = known[-1].number + 1 if known else 1
        version = DeployedVersion(number, manifests, fingerprint_of(gateway_of(objects)), Outcome.STARTED)
        self._write(version)
        for each in _outdated([*known, version]):
            self._cluster.delete(Ref("v1", "ConfigMap", self._namespace, f"{self._name}-v{each.number}"))
        return version

    def note(self, version: DeployedVersion, outcome: Outcome, reason: str = "") -> DeployedVersion:
        """Records the outcome, and returns the version with that outcome.

        A version that has served stays recorded as SERVED, even if deploying it again fails. reason: first line is kept.
        """
        noted = replace(version, outcome=outcome, reason=reason)
        if version.outcome is not Outcome.SERVED:
            self._write(noted)
        return noted

    def serving(self) -> DeployedVersion | None:
        """The last version that served, or None. It serves now unless the pipeline was changed by other means."""
        return last_served(self.versions())

    def canary(self) -> DeployedVersion | None:
        """The newest version if it is a canary, else None."""
        known = self.versions()
        return known[-1] if known and known[-1].outcome is Outcome.CANARY else None

    def to_go_back_to(self, number: int | None) -> DeployedVersion:
        """The version that a rollback deploys. Raises NothingServes if there is none.

        If `number` is None, this is the last version that served or, if that is the newest, the version with other objects
        that served before it.
        """
        known = self.versions()
        if not known:
            raise NothingServes(f"no version of {self._name} in namespace {self._namespace} is known; deploy it first")
        listed = ", ".join(map(str, known))
        if number is not None:
            found = next((version for version in known if version.number == number), None)
            if found is None:
                raise NothingServes(f"version {number} is not known; known are {listed}")
            return found
        serving = last_served(known)
        if serving is None:
            raise NothingServes(f"no version of {self._name} has served; known are {listed}; `delete` removes what they left")
        if known[-1].outcome is not Outcome.SERVED:
            return serving
        before = last_served([version for version in known if version.manifests != serving.manifests])
        if before is None:
            raise NothingServes(f"version {serving.number} is the only one that served; there is nothing to go back to")
        return before

    def _write(self, version: DeployedVersion) -> None:
        annotations = {_NUMBER: str(version.number), PIPELINE: version.fingerprint, _OUTCOME: str(version.outcome)}
        if version.reason:
            annotations[_REASON] = version.reason.splitlines()[0][:_REASON_LENGTH]
        own = {INSTANCE: self._name, MANAGED_BY: "lamina", _HISTORY: "true"}
        name, data = f"{self._name}-v{version.number}", {_MANIFESTS: version.manifests}
        self._cluster.apply(kubernetes_object("v1", "ConfigMap", name, self._namespace, own, annotations, data=data))


def last_served(known: list[DeployedVersion]) -> DeployedVersion | None:
    return next((version for version in reversed(known) if version.outcome is Outcome.SERVED), None)


def _outdated(known: list[DeployedVersion]) -> list[DeployedVersion]:
    """Returns the versions to delete. Kept are the last KEPT_VERSIONS and, besides, the last KEPT_VERSIONS that served.

    So a series of failures does not delete the versions that served. known: all versions, oldest first.
    """
    served = [version for version in known if version.outcome is Outcome.SERVED]
    kept = {version.number for version in (*known[-KEPT_VERSIONS:], *served[-KEPT_VERSIONS:])}
    return [version for version in known if version.number not in kept]


def _read(config_map: KubernetesObject) -> DeployedVersion:
    annotations = config_map["metadata"]["annotations"]
    outcome = Outcome(annotations.get(_OUTCOME, Outcome.SERVED))  # versions of older releases had all served
    number, fingerprint, reason = int(annotations[_NUMBER]), annotations.get(PIPELINE, ""), annotations.get(_REASON, "")
    version = DeployedVersion(number, config_map["data"][_MANIFESTS], fingerprint, outcome, reason)
    return version if fingerprint else replace(version, fingerprint=fingerprint_of(gateway_of(version.objects)))
