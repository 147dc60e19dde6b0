"""Another token between gateway and stages, without an answer lost: three states of the Secret, a deploy after each.

1. Stages take the new one as well (`second`); gateways still send the old one.
2. Gateways send the new one; stages take the old one as well, for gateways that have not ended yet.
3. The old one is good for nothing any more.

Pods read Secrets when they start. So the Secret counts, in an annotation that goes into the templates of the pods: each state
makes new revisions. Whoever is interrupted goes on where they were.
"""

from knative.cluster.client import Cluster, Ref
from knative.cluster.errors import PreflightFailed, Refused
from knative.cluster.pipeline_token import ROTATION, new_token, wanted_secrets
from knative.spec.kubernetes_object import KubernetesObject

_LAST = 3


def unfinished(cluster: Cluster, objects: list[KubernetesObject]) -> bool:
    """Whether a rotation of these objects' token has begun and not ended."""
    return 0 < _state(_secret(cluster, objects))[1] < _LAST


def advance(cluster: Cluster, objects: list[KubernetesObject]) -> int:
    """Writes the next state of the Secret; returns its number, 1 to 3. Raises PreflightFailed, Refused."""
    secret = _secret(cluster, objects)
    rotation, state = _state(secret)
    rotation, state = (rotation, state + 1) if 0 < state < _LAST else (rotation + 1, 1)
    data = dict(secret["data"])
    if state == 1:
        data["second"] = new_token()
    elif state == 2:
        data["token"], data["second"] = data["second"], data["token"]
    else:
        del data["second"]
    metadata = {key: value for key, value in secret["metadata"].items() if key != "managedFields"}
    metadata["annotations"] = {**(metadata.get("annotations") or {}), ROTATION: f"{rotation}.{state}"}
    if cluster.replace({**secret, "metadata": metadata, "data": data}) is None:
        raise Refused(f"Secret {metadata['name']} was changed by somebody else meanwhile; look at it, and rotate again")
    return state


def _secret(cluster: Cluster, objects: list[KubernetesObject]) -> KubernetesObject:
    ref: Ref = next(ref for ref, wanted in wanted_secrets(objects).items() if wanted.is_token)
    secret = cluster.get(ref)
    if secret is None:
        raise PreflightFailed(f"{ref} is not there; deploy again, which makes it")
    return secret


def _state(secret: KubernetesObject) -> tuple[int, int]:
    """Number of the rotation and its state; 0 before the first."""
    rotation, _, state = (secret["metadata"].get("annotations") or {}).get(ROTATION, "0.0").partition(".")
    return int(rotation), int(state)
