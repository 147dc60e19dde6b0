"""What was deployed before: each version's rendered objects in a ConfigMap of its own, so that going back needs no files."""

import hashlib
from dataclasses import dataclass
from typing import Any, Final

import yaml

from knative.cluster.client import Cluster, Ref
from knative.spec.kubernetes_object import KubernetesObject, to_yaml

KEPT_VERSIONS: Final = 10
_KEY: Final = "manifests.yaml"
_NUMBER: Final = "lamina.dev/version"
INSTANCE: Final = "app.kubernetes.io/instance"
MANAGED_BY: Final = "app.kubernetes.io/managed-by"
_HISTORY: Final = "lamina.dev/history"


@dataclass(frozen=True, slots=True)
class Version:
    """One deployed state of a pipeline. `number` counts up; a rollback repeats an old state under a new number."""

    number: int
    objects: tuple[KubernetesObject, ...]
    digest: str

    @property
    def fingerprint(self) -> str:
        return fingerprint_of(gateway_of(list(self.objects)))


def gateway_of(objects: list[KubernetesObject]) -> KubernetesObject:
    return next(each for each in objects if each["metadata"]["labels"].get("app.kubernetes.io/component") == "gateway"
                and each["kind"] == "Service")  # fmt: skip


def fingerprint_of(manifest: KubernetesObject) -> str:
    fingerprint: str = manifest["metadata"]["labels"]["lamina.dev/pipeline"]
    return fingerprint


def digest_of(objects: list[KubernetesObject]) -> str:
    return hashlib.sha256(to_yaml(objects).encode()).hexdigest()[:12]


def versions(cluster: Cluster, namespace: str, name: str) -> list[Version]:
    """Oldest first."""
    found = cluster.find("v1", "ConfigMap", namespace, f"{INSTANCE}={name},{_HISTORY}=true")
    return sorted((_read(each) for each in found), key=lambda version: version.number)


def remember(cluster: Cluster, namespace: str, name: str, objects: list[KubernetesObject]) -> int:
    """Writes a version down unless it is the newest already; returns its number. Forgets what is older than the last ten."""
    known = versions(cluster, namespace, name)
    digest = digest_of(objects)
    if known and known[-1].digest == digest:
        return known[-1].number
    number = known[-1].number + 1 if known else 1
    cluster.apply(_config_map(namespace, name, number, objects, digest))
    for version in known[: -(KEPT_VERSIONS - 1)]:
        cluster.delete(Ref("v1", "ConfigMap", namespace, _map_name(name, version.number)))
    return number


def _map_name(name: str, number: int) -> str:
    return f"{name}-v{number}"


def _config_map(namespace: str, name: str, number: int, objects: list[KubernetesObject], digest: str) -> KubernetesObject:
    metadata: dict[str, Any] = {
        "name": _map_name(name, number),
        "namespace": namespace,
        "labels": {INSTANCE: name, MANAGED_BY: "lamina", _HISTORY: "true"},
        "annotations": {_NUMBER: str(number), "lamina.dev/digest": digest},
    }
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": {_KEY: to_yaml(objects)}}


def _read(config_map: KubernetesObject) -> Version:
    annotations = config_map["metadata"]["annotations"]
    objects = tuple(yaml.safe_load_all(config_map["data"][_KEY]))
    return Version(int(annotations[_NUMBER]), objects, annotations["lamina.dev/digest"])
