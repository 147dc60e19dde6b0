"""Manifests for GitOps controllers (Argo CD, Flux): kustomization, order, objects that they must not prune, a Job that prunes.

A new cut or model removes the old stages' files from the folder while answers still run on them. So the controller must not
prune objects whose name carries a fingerprint. After each sync a Job deletes those that no gateway uses any more, and old
revisions that would keep pods.
"""

import hashlib
from pathlib import Path
from typing import Final

import msgspec

from functions.configuration.config import FLEET_LABEL
from knative.render import prune_script
from knative.render.access import service_account_with_role
from knative.render.resolved_pipeline import ResolvedPipeline, labels, pipeline_object
from knative.render.services import NON_ROOT
from knative.spec.kubernetes_object import KubernetesObject

KUSTOMIZATION: Final = "kustomization.yaml"
_PRUNE: Final = "prune"
_ARGO: Final = "argocd.argoproj.io/"
_WAVES: Final = {"stage": "1", "gateway": "2", "eventing": "3"}  # Argo CD waits until each wave is healthy
_PLACEMENT_AMONG_GATEWAYS: Final = ("affinity", "topologySpreadConstraints")  # pod fields that make no sense for the Job
_ANSWERS_SECONDS: Final = 900  # how long the Job waits for answers on old stages; an answer may take 600 s
_KEPT_SECONDS: Final = 86_400  # how long the finished Job is kept, so that its log can be read
_RULES: Final[list[KubernetesObject]] = [
    {"apiGroups": ["serving.knative.dev"], "resources": ["services"], "verbs": ["get", "list", "delete"]},
    {"apiGroups": ["serving.knative.dev"], "resources": ["revisions"], "verbs": ["list", "delete"]},
    {"apiGroups": ["flows.knative.dev"], "resources": ["sequences"], "verbs": ["list", "delete"]},
    {"apiGroups": [""], "resources": ["pods"], "verbs": ["list"]},
]
_FLEET_RULE: Final[KubernetesObject] = {"apiGroups": [""], "resources": ["configmaps"], "verbs": ["list"]}


def with_kustomization(files: dict[str, list[KubernetesObject]]) -> dict[str, list[KubernetesObject]]:
    """The files and one more, which `kubectl apply --kustomize` needs. files: name → objects."""
    document = {"apiVersion": "kustomize.config.k8s.io/v1beta1", "kind": "Kustomization", "resources": list(files)}
    return {**files, KUSTOMIZATION: [document]}


def for_gitops(pipeline: ResolvedPipeline, files: dict[str, list[KubernetesObject]]) -> dict[str, list[KubernetesObject]]:
    """The files with annotations for GitOps controllers, and one more with the Job that prunes.

    pipeline: or the gateway of a fleet. files: name → objects, with those of all members.
    """
    annotated = {name: [_annotated(each) for each in objects] for name, objects in files.items()}
    changes = msgspec.json.encode(files if pipeline.fleet else pipeline.spec) + pipeline.fingerprint.encode()
    return {**annotated, "prune.yaml": prune_objects(pipeline, changes)}


def _annotated(manifest: KubernetesObject) -> KubernetesObject:
    metadata, own = manifest["metadata"], manifest["metadata"]["labels"]
    component = own["app.kubernetes.io/component"]
    annotations = dict(metadata.get("annotations") or {})
    if manifest["kind"] in ("Service", "ConfigMap") or component == "eventing":
        annotations[_ARGO + "sync-wave"] = _WAVES[component]
    named_by_fingerprint = metadata["name"].startswith(f"{own['app.kubernetes.io/instance']}-{own['lamina.dev/pipeline'][:8]}")
    if named_by_fingerprint and (component == "stage" or FLEET_LABEL not in own):  # a fleet's gateway keeps its fingerprint
        annotations[_ARGO + "sync-options"] = "Prune=false"
        annotations["kustomize.toolkit.fluxcd.io/prune"] = "disabled"
    return {**manifest, "metadata": {**metadata, "annotations": annotations} if annotations else metadata}


def prune_objects(pipeline: ResolvedPipeline, changes: bytes = b"") -> list[KubernetesObject]:
    """The Job that deletes old stages and revisions, preceded by its ServiceAccount and Role.

    changes: bytes that say what is deployed. The Job's name carries a digest of them, because a Job cannot be changed: each
    change of the spec gets a Job of its own.
    """
    spec = pipeline.spec
    kept = pipeline.fingerprint if pipeline.fleet is None else "fleet"
    change = hashlib.sha256(changes).hexdigest()[:8]
    account = f"{spec.name}-{_PRUNE}"
    source = Path(prune_script.__file__).read_text(encoding="utf-8")
    container = {
        "name": _PRUNE,
        "image": spec.image,
        "command": ["python", "-c", source, spec.namespace, spec.name, kept, str(_ANSWERS_SECONDS)],
        "resources": {"requests": {"cpu": "50m", "memory": "64Mi"}, "limits": {"cpu": "500m", "memory": "128Mi"}},
        "securityContext": {**NON_ROOT, "capabilities": {"drop": ["ALL"]}},
    }
    placement = {name: value for name, value in spec.gateway.pod.rendered().items() if name not in _PLACEMENT_AMONG_GATEWAYS}
    pod = {**placement, "serviceAccountName": account, "restartPolicy": "Never", "containers": [container]}
    template = {"metadata": {"labels": labels(pipeline, _PRUNE)}, "spec": pod}
    job = pipeline_object(
        pipeline,
        "batch/v1",
        "Job",
        f"{spec.name}-{_PRUNE}-{change}",
        _PRUNE,
        annotations={_ARGO + "hook": "PostSync", _ARGO + "hook-delete-policy": "BeforeHookCreation"},
        spec={"backoffLimit": 3, "ttlSecondsAfterFinished": _KEPT_SECONDS, "template": template},
    )
    rules = _RULES if pipeline.fleet is None else [*_RULES, _FLEET_RULE]
    return [*service_account_with_role(pipeline, account, _PRUNE, rules), job]
