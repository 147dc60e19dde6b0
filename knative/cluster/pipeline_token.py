"""Secrets that a pipeline's Services name, and the one that the deployer makes: the token between gateway and stages."""

import base64
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any, Final

from knative.cluster.client import Cluster, Ref
from knative.cluster.errors import NotPermitted
from knative.cluster.history import INSTANCE, MANAGED_BY
from knative.cluster.readiness import SERVING
from knative.spec.kubernetes_object import KubernetesObject

ROTATION: Final = "lamina.dev/rotation"
_TOKEN: Final = "LAMINA_PIPELINE_TOKEN"
_STORE_KEYS: Final = frozenset({"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"})


@dataclass(frozen=True, slots=True)
class WantedSecret:
    """What Services need of one Secret."""

    pipeline: str
    keys: frozenset[str]
    is_token: bool


def wanted_secrets(objects: list[KubernetesObject]) -> dict[Ref, WantedSecret]:
    """Secrets that the Services name, without which a pod would not start."""
    wanted: dict[Ref, WantedSecret] = {}
    for service in (each for each in objects if each["kind"] == "Service"):
        metadata = service["metadata"]
        pod = service["spec"]["template"]["spec"]
        for name, keys, is_token in chain(_mounted(pod), *map(_references, pod["containers"])):
            ref = Ref("v1", "Secret", metadata["namespace"], name)
            before = wanted.get(ref, WantedSecret("", frozenset(), False))
            pipeline = (metadata.get("labels") or {}).get(INSTANCE, "")
            wanted[ref] = WantedSecret(pipeline, keys | before.keys, is_token or before.is_token)
    return wanted


def ensure_token(cluster: Cluster, objects: list[KubernetesObject], say: Callable[[str], None]) -> None:
    """Makes the pipeline's token where there is none; one that is there stays as it is, whoever made it."""
    for ref, wanted in wanted_secrets(objects).items():
        if wanted.is_token and cluster.get(ref) is None and cluster.create(_token_secret(ref, wanted.pipeline)):
            say(f"made {ref}: the token between gateway and stages")


def marked(cluster: Cluster, objects: list[KubernetesObject]) -> list[KubernetesObject]:
    """The objects; templates of Services say how often their token was rotated, so that pods of another are made when it was.

    Without a rotation, or the right to look, they are as they were.
    """
    ref = next((ref for ref, wanted in wanted_secrets(objects).items() if wanted.is_token), None)
    try:
        secret = cluster.get(ref) if ref is not None else None
    except NotPermitted:
        secret = None
    rotation = ((secret or {"metadata": {}})["metadata"].get("annotations") or {}).get(ROTATION)
    if rotation is None:
        return objects
    return [_with_rotation(each, rotation) if each["apiVersion"] == SERVING else each for each in objects]


def _with_rotation(service: KubernetesObject, rotation: str) -> KubernetesObject:
    template = service["spec"]["template"]
    annotations = {**template["metadata"].get("annotations", {}), ROTATION: rotation}
    new = {**template, "metadata": {**template["metadata"], "annotations": annotations}}
    return {**service, "spec": {**service["spec"], "template": new}}


def new_token() -> str:
    """As a Secret holds it."""
    return base64.b64encode(secrets.token_urlsafe(32).encode()).decode()


def _mounted(pod: KubernetesObject) -> Iterator[tuple[str, frozenset[str], bool]]:
    for volume in pod.get("volumes", []):
        secret = volume.get("secret")
        if secret and not secret.get("optional"):
            yield secret["secretName"], frozenset(item["key"] for item in secret.get("items", [])), False


def _references(container: KubernetesObject) -> Iterator[tuple[str, frozenset[str], bool]]:
    """Name of the Secret, its keys, whether it is the token."""
    for entry in container.get("env", []):
        reference = (entry.get("valueFrom") or {}).get("secretKeyRef")
        if reference and not reference.get("optional"):
            yield reference["name"], frozenset({reference["key"]}), entry["name"] == _TOKEN
    for source in container.get("envFrom", []):
        if "secretRef" in source and not source["secretRef"].get("optional"):
            yield source["secretRef"]["name"], _STORE_KEYS, False


def _token_secret(ref: Ref, pipeline: str) -> KubernetesObject:
    metadata: dict[str, Any] = {
        "name": ref.name,
        "namespace": ref.namespace,
        "labels": {INSTANCE: pipeline, MANAGED_BY: "lamina"},
    }
    return {"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "type": "Opaque", "data": {"token": new_token()}}
