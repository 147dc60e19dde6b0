"""The token between gateway and stages: its Secret, which the deployer makes, and its rotation without losing an answer.

A rotation has three states of the Secret, with a deployment after each:

1. Stages accept the new token as well (`second`); gateways still send the old one.
2. Gateways send the new token; stages accept the old one as well, for gateways that have not ended yet.
3. The old token is deleted.

Pods read a Secret only when they start. So the number of the state is an annotation of the Secret and of the Services'
templates: a new state makes new revisions, and so new pods. A rotation that was interrupted is continued.
"""

import base64
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from knative.cluster.client import Cluster, Ref
from knative.cluster.errors import NotPermitted, PreflightFailed, Rejected
from knative.cluster.objects import INSTANCE, MANAGED_BY, SERVING, label
from knative.spec.kubernetes_object import KubernetesObject, kubernetes_object

LAST_STATE: Final = 3
_ROTATION: Final = "lamina.dev/rotation"
_TOKEN: Final = "LAMINA_PIPELINE_TOKEN"
_STORE_KEYS: Final = frozenset({"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"})


@dataclass(frozen=True, slots=True)
class WantedSecret:
    """A Secret without which pods of a pipeline do not start.

    keys: those that it must have. is_token: whether it is the token between gateway and stages.
    """

    pipeline: str
    keys: frozenset[str]
    is_token: bool


def wanted_secrets(objects: list[KubernetesObject]) -> dict[Ref, WantedSecret]:
    """The Secrets that pods of the Services among `objects` need to start. Optional ones are left out."""
    wanted: dict[Ref, WantedSecret] = {}
    for service in (each for each in objects if each["kind"] == "Service"):
        pod = service["spec"]["template"]["spec"]
        for name, keys, is_token in _secrets_of(pod):
            ref = Ref("v1", "Secret", service["metadata"]["namespace"], name)
            before = wanted.get(ref, WantedSecret("", frozenset(), False))
            wanted[ref] = WantedSecret(label(service, INSTANCE), keys | before.keys, is_token or before.is_token)
    return wanted


def _secrets_of(pod: KubernetesObject) -> Iterator[tuple[str, frozenset[str], bool]]:
    """Yields name, needed keys and whether it is the token, for each use of a Secret in a pod's spec.

    Optional uses are left out.
    """
    for volume in pod.get("volumes", []):
        secret = volume.get("secret")
        if secret and not secret.get("optional"):
            yield secret["secretName"], frozenset(item["key"] for item in secret.get("items", [])), False

    for container in pod["containers"]:
        for entry in container.get("env", []):
            reference = (entry.get("valueFrom") or {}).get("secretKeyRef")
            if reference and not reference.get("optional"):
                yield reference["name"], frozenset({reference["key"]}), entry["name"] == _TOKEN
        for source in container.get("envFrom", []):
            if "secretRef" in source and not source["secretRef"].get("optional"):
                yield source["secretRef"]["name"], _STORE_KEYS, False


def ensure_token(cluster: Cluster, objects: list[KubernetesObject], say: Callable[[str], None]) -> None:
    """Creates the Secret with the pipeline's token unless it exists, and reports that to `say`."""
    for ref, wanted in wanted_secrets(objects).items():
        if wanted.is_token and cluster.get(ref) is None:
            own, data = {INSTANCE: wanted.pipeline, MANAGED_BY: "lamina"}, {"token": _new_token()}
            if cluster.create(kubernetes_object("v1", "Secret", ref.name, ref.namespace, own, type="Opaque", data=data)):
                say(f"made {ref}: the token between gateway and stages")


def with_rotation(cluster: Cluster, objects: list[KubernetesObject]) -> list[KubernetesObject]:
    """The objects, with the state of the token's rotation as an annotation in the Services' templates.

    Unchanged if the token was never rotated, or if reading its Secret is not permitted.
    """
    ref = _token_ref(objects)
    try:
        secret = cluster.get(ref) if ref is not None else None
    except NotPermitted:
        return objects
    rotation = (secret["metadata"].get("annotations") or {}).get(_ROTATION) if secret else None
    if rotation is None:
        return objects
    marked = []
    for each in objects:
        if each["apiVersion"] == SERVING:
            template = each["spec"]["template"]
            annotations = {**template["metadata"].get("annotations", {}), _ROTATION: rotation}
            template = {**template, "metadata": {**template["metadata"], "annotations": annotations}}
            marked.append({**each, "spec": {**each["spec"], "template": template}})
        else:
            marked.append(each)
    return marked


def rotation_is_unfinished(cluster: Cluster, objects: list[KubernetesObject]) -> bool:
    _, _, state = _token_of(cluster, objects)
    return 0 < state < LAST_STATE


def advance_rotation(cluster: Cluster, objects: list[KubernetesObject]) -> int:
    """Changes the Secret to the next state of its rotation, and returns the state's number, 1 to 3. After 3 comes 1.

    Raises PreflightFailed if there is no Secret, and Rejected if another client has changed it meanwhile.
    """
    secret, rotation, state = _token_of(cluster, objects)
    rotation, state = (rotation, state + 1) if 0 < state < LAST_STATE else (rotation + 1, 1)
    data = dict(secret["data"])
    if state == 1:
        data["second"] = _new_token()
    elif state == 2:
        data["token"], data["second"] = data["second"], data["token"]
    else:
        del data["second"]
    metadata = {key: value for key, value in secret["metadata"].items() if key != "managedFields"}
    metadata["annotations"] = {**(metadata.get("annotations") or {}), _ROTATION: f"{rotation}.{state}"}
    if cluster.replace({**secret, "metadata": metadata, "data": data}) is None:
        raise Rejected(f"Secret {metadata['name']} was changed by another client meanwhile; check it, and rotate again")
    return state


def _token_ref(objects: list[KubernetesObject]) -> Ref | None:
    return next((ref for ref, wanted in wanted_secrets(objects).items() if wanted.is_token), None)


def _token_of(cluster: Cluster, objects: list[KubernetesObject]) -> tuple[KubernetesObject, int, int]:
    """The token's Secret, the number of its latest rotation and the state of that; both are 0 before the first rotation.

    Raises PreflightFailed if there is no Secret.
    """
    ref = _token_ref(objects)
    secret = None if ref is None else cluster.get(ref)
    if secret is None:
        raise PreflightFailed(f"{ref} does not exist; deploy again, which creates it")
    rotation, _, state = (secret["metadata"].get("annotations") or {}).get(_ROTATION, "0.0").partition(".")
    return secret, int(rotation), int(state)


def _new_token() -> str:
    """A random token in base64, as the data of a Secret has it."""
    return base64.b64encode(secrets.token_urlsafe(32).encode()).decode()
