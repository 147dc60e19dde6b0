"""What was deployed, or tried: each version's objects and outcome in a ConfigMap, so that going back needs no file."""

from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any, Final

import yaml

from knative.cluster.client import Cluster, Ref
from knative.cluster.errors import NothingServes
from knative.spec.kubernetes_object import KubernetesObject, to_yaml

KEPT_VERSIONS: Final = 10
INSTANCE: Final = "app.kubernetes.io/instance"
MANAGED_BY: Final = "app.kubernetes.io/managed-by"
COMPONENT: Final = "app.kubernetes.io/component"
PIPELINE: Final = "lamina.dev/pipeline"
HISTORY: Final = "lamina.dev/history"
_KEY: Final = "manifests.yaml"
_NUMBER: Final = "lamina.dev/version"
_OUTCOME: Final = "lamina.dev/outcome"
_REASON: Final = "lamina.dev/reason"
_REASON_LENGTH: Final = 500


class Outcome(StrEnum):
    """What became of a version."""

    STARTED = "started"
    """Under way; or whoever deployed it has died."""
    SERVED = "served"
    CANARY = "canary"
    """Gets a part of the requests, beside the last that served."""
    FAILED = "failed"
    ABORTED = "aborted"
    """A canary that was taken back."""


@dataclass(frozen=True, slots=True)
class Version:
    """One state of a pipeline. `number` counts up; a rollback repeats an old state under a new number."""

    number: int
    manifests: str
    """All rendered objects, as YAML."""
    fingerprint: str
    outcome: Outcome
    reason: str = ""
    """Of a failure: its first line; of a canary: its share."""

    @property
    def objects(self) -> list[KubernetesObject]:
        return _objects(self.manifests)


def gateway_of(objects: list[KubernetesObject]) -> KubernetesObject:
    return next(each for each in objects if each["metadata"]["labels"].get(COMPONENT) == "gateway"
                and each["kind"] == "Service")  # fmt: skip


def fingerprint_of(manifest: KubernetesObject) -> str:
    fingerprint: str = manifest["metadata"]["labels"][PIPELINE]
    return fingerprint


class History:
    """Of one pipeline."""

    def __init__(self, cluster: Cluster, namespace: str, name: str) -> None:
        self._cluster = cluster
        self._namespace = namespace
        self._name = name

    def versions(self) -> list[Version]:
        """Oldest first."""
        found = self._cluster.find("v1", "ConfigMap", self._namespace, f"{INSTANCE}={self._name},{HISTORY}=true")
        return sorted(map(_read, found), key=lambda version: version.number)

    def begin(self, objects: list[KubernetesObject]) -> Version:
        """Writes an attempt down; the newest version, if that has these objects already. Forgets what nobody goes back to."""
        known, manifests = self.versions(), to_yaml(objects)
        if known and known[-1].manifests == manifests:
            newest = known[-1]
            return newest if newest.outcome is Outcome.SERVED else self.note(newest, Outcome.STARTED)
        fingerprint = fingerprint_of(gateway_of(objects))
        version = Version(known[-1].number + 1 if known else 1, manifests, fingerprint, Outcome.STARTED)
        self._write(version)
        for each in _forgotten([*known, version]):
            self._cluster.delete(Ref("v1", "ConfigMap", self._namespace, self._map_name(each.number)))
        return version

    def note(self, version: Version, outcome: Outcome, reason: str = "") -> Version:
        """What became of it. A version that served has served, whatever became of a later attempt at the same."""
        noted = replace(version, outcome=outcome, reason=reason)
        if version.outcome is not Outcome.SERVED:
            self._write(noted)
        return noted

    def serving(self) -> Version | None:
        """The last that served: what serves now, unless somebody changed it by other means."""
        return last_served(self.versions())

    def canary(self) -> Version | None:
        """The newest version, while it is one."""
        known = self.versions()
        return known[-1] if known and known[-1].outcome is Outcome.CANARY else None

    def to_go_back_to(self, number: int | None) -> Version:
        """The version of this number; by default what last served, or what served before that. Raises NothingServes."""
        known = self.versions()
        if not known:
            raise NothingServes(f"no version of {self._name} in namespace {self._namespace} is known; deploy it first")
        if number is not None:
            found = next((version for version in known if version.number == number), None)
            if found is None:
                raise NothingServes(f"version {number} is not known; known are {', '.join(map(_told, known))}")
            return found
        serving = last_served(known)
        if serving is None:
            raise NothingServes(f"no version of {self._name} has served; known are {', '.join(map(_told, known))}; "
                                "`delete` takes away what they left")  # fmt: skip
        if known[-1].outcome is not Outcome.SERVED:
            return serving
        before = last_served([version for version in known if version.manifests != serving.manifests])
        if before is None:
            raise NothingServes(f"version {serving.number} is the only one that served; there is nothing to go back to")
        return before

    def _map_name(self, number: int) -> str:
        return f"{self._name}-v{number}"

    def _write(self, version: Version) -> None:
        annotations = {_NUMBER: str(version.number), PIPELINE: version.fingerprint, _OUTCOME: str(version.outcome)}
        if version.reason:
            annotations[_REASON] = version.reason.splitlines()[0][:_REASON_LENGTH]
        metadata: dict[str, Any] = {
            "name": self._map_name(version.number),
            "namespace": self._namespace,
            "labels": {INSTANCE: self._name, MANAGED_BY: "lamina", HISTORY: "true"},
            "annotations": annotations,
        }
        data = {_KEY: version.manifests}
        self._cluster.apply({"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": data})


def last_served(known: list[Version]) -> Version | None:
    return next((version for version in reversed(known) if version.outcome is Outcome.SERVED), None)


def _told(version: Version) -> str:
    return f"{version.number} ({version.outcome})"


def _forgotten(known: list[Version]) -> list[Version]:
    """All but the last ten, and the last ten that served: many failures in a row take away nothing to go back to."""
    served = [version for version in known if version.outcome is Outcome.SERVED]
    kept = {version.number for version in (*known[-KEPT_VERSIONS:], *served[-KEPT_VERSIONS:])}
    return [version for version in known if version.number not in kept]


def _read(config_map: KubernetesObject) -> Version:
    annotations = config_map["metadata"]["annotations"]
    manifests: str = config_map["data"][_KEY]
    outcome = Outcome(annotations.get(_OUTCOME, Outcome.SERVED))  # before there were outcomes, none but these were kept
    fingerprint = annotations.get(PIPELINE) or fingerprint_of(gateway_of(_objects(manifests)))
    return Version(int(annotations[_NUMBER]), manifests, fingerprint, outcome, annotations.get(_REASON, ""))


def _objects(manifests: str) -> list[KubernetesObject]:
    return list(yaml.load_all(manifests, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)))  # ten times as fast, in C
