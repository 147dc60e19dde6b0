"""What must be true of a cluster before anything is applied to it: kinds, versions, extensions, Secrets."""

import base64
import re
import secrets
from collections.abc import Callable, Iterator
from typing import Any, Final

from knative.cluster.client import Cluster, Ref
from knative.cluster.errors import NotPermitted, PreflightFailed
from knative.cluster.history import INSTANCE, MANAGED_BY
from knative.spec.kubernetes_object import KubernetesObject

OLDEST_KNATIVE: Final = (1, 10)
"""The oldest whose webhook takes every field that we render."""

_SYSTEM_NAMESPACE: Final = "knative-serving"
_CLASS: Final = "autoscaling.knative.dev/class"


def check(cluster: Cluster, objects: list[KubernetesObject], say: Callable[[str], None]) -> None:
    """Raises KindMissing or PreflightFailed; says what could not be looked at."""
    for api_version, kind in dict.fromkeys((each["apiVersion"], each["kind"]) for each in objects):
        cluster.require(api_version, kind)
    try:
        _check_version(cluster)
        if any("hpa" in annotations.get(_CLASS, "") for annotations in _template_annotations(objects)):
            _check_hpa(cluster)
    except NotPermitted as error:
        say(f"not checked, since we may not look: {error}")


def ensure_secrets(cluster: Cluster, objects: list[KubernetesObject], say: Callable[[str], None]) -> None:
    """Makes the pipeline's token where there is none. Raises PreflightFailed for any other Secret that is missing."""
    for ref, (instance, keys) in _wanted_secrets(objects).items():
        found = cluster.get(ref)
        if found is None and keys == {"token"}:
            cluster.apply(_token_secret(ref, instance))
            say(f"made {ref}: the token between gateway and stages")
        elif found is None or not keys <= set(found.get("data") or {}):
            raise PreflightFailed(f"{ref} is missing or lacks {', '.join(sorted(keys))}; make it with: {_command(ref, keys)}")


def _check_version(cluster: Cluster) -> None:
    controller = cluster.get(Ref("apps/v1", "Deployment", _SYSTEM_NAMESPACE, "controller"))
    version = (controller or {"metadata": {}})["metadata"].get("labels", {}).get("app.kubernetes.io/version", "")
    match = re.match(r"v?(\d+)\.(\d+)", version)
    if match and (int(match[1]), int(match[2])) < OLDEST_KNATIVE:
        oldest = ".".join(map(str, OLDEST_KNATIVE))
        raise PreflightFailed(f"Knative Serving {version} is too old; upgrade it to {oldest} or newer")


def _check_hpa(cluster: Cluster) -> None:
    if cluster.get(Ref("apps/v1", "Deployment", _SYSTEM_NAMESPACE, "autoscaler-hpa")) is None:
        raise PreflightFailed("the class hpa needs Knative's HPA extension (Deployment autoscaler-hpa): install it, or use kpa")
    if not cluster.serves_group("metrics.k8s.io"):
        raise PreflightFailed("the class hpa needs a metrics server (API metrics.k8s.io): install one, or use the class kpa")


def _template_annotations(objects: list[KubernetesObject]) -> Iterator[dict[str, str]]:
    for each in objects:
        if each["kind"] == "Service":
            yield each["spec"]["template"]["metadata"].get("annotations", {})


def _wanted_secrets(objects: list[KubernetesObject]) -> dict[Ref, tuple[str, set[str]]]:
    """Secrets that the Services name → the pipeline's name, and the keys that are needed of it."""
    wanted: dict[Ref, tuple[str, set[str]]] = {}
    for service in (each for each in objects if each["kind"] == "Service"):
        metadata = service["metadata"]
        for container in service["spec"]["template"]["spec"]["containers"]:
            for name, keys in _secret_keys(container):
                ref = Ref("v1", "Secret", metadata["namespace"], name)
                wanted.setdefault(ref, (metadata["labels"][INSTANCE], set()))[1].update(keys)
    return wanted


def _secret_keys(container: KubernetesObject) -> Iterator[tuple[str, set[str]]]:
    for entry in container.get("env", []):
        reference = entry.get("valueFrom", {}).get("secretKeyRef")
        if reference and not reference.get("optional"):
            yield reference["name"], {reference["key"]}
    for source in container.get("envFrom", []):
        if "secretRef" in source:
            yield source["secretRef"]["name"], {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"}


def _token_secret(ref: Ref, instance: str) -> KubernetesObject:
    token = base64.b64encode(secrets.token_urlsafe(32).encode()).decode()
    metadata: dict[str, Any] = {
        "name": ref.name,
        "namespace": ref.namespace,
        "labels": {INSTANCE: instance, MANAGED_BY: "lamina"},
    }
    return {"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "type": "Opaque", "data": {"token": token}}


def _command(ref: Ref, keys: set[str]) -> str:
    literals = " ".join(f"--from-literal={key}=…" for key in sorted(keys))
    return f"kubectl -n {ref.namespace} create secret generic {ref.name} {literals}"
