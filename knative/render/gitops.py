"""For who lets a controller apply the manifests (Argo CD, Flux): kustomization, order, what must outlive its file, and a Job.

A new cut or model takes the old stages' files out of the folder while answers still run on them. So what carries a fingerprint
in its name is not the controller's to prune; a Job after each sync deletes it, once nobody drives it any more.
"""

from pathlib import Path
from typing import Final

from knative.render import prune_script
from knative.render.resolved_pipeline import ResolvedPipeline, labels
from knative.spec.kubernetes_object import KubernetesObject

KUSTOMIZATION: Final = "kustomization.yaml"
PRUNE_FILE: Final = "prune.yaml"
_PRUNE: Final = "prune"
_ARGO: Final = "argocd.argoproj.io/"
_WAVES: Final = {"stage": "1", "gateway": "2", "eventing": "3"}
"""Of Argo CD, which waits for each to be healthy: stages before the gateway that drives them."""
_AMONG_OTHERS: Final = ("affinity", "topologySpreadConstraints")
"""What a gateway's pod wants of its siblings; the Job's runs where gateways may, with their pull secrets."""
_ANSWERS_SECONDS: Final = 900
"""For the Job to wait for answers on old stages; an answer may take 600."""
_KEPT_SECONDS: Final = 86_400
"""A day for its log to be read."""


def with_kustomization(files: dict[str, list[KubernetesObject]]) -> dict[str, list[KubernetesObject]]:
    """The files of a folder for `kubectl apply --kustomize`."""
    document = {"apiVersion": "kustomize.config.k8s.io/v1beta1", "kind": "Kustomization", "resources": list(files)}
    return {**files, KUSTOMIZATION: [document]}


def for_gitops(pipeline: ResolvedPipeline, files: dict[str, list[KubernetesObject]]) -> dict[str, list[KubernetesObject]]:
    """The same files with annotations, and one more with the Job and what it may do."""
    marked = {name: [_marked(pipeline, each) for each in objects] for name, objects in files.items()}
    return {**marked, PRUNE_FILE: prune_objects(pipeline)}


def _marked(pipeline: ResolvedPipeline, manifest: KubernetesObject) -> KubernetesObject:
    metadata, component = manifest["metadata"], manifest["metadata"]["labels"]["app.kubernetes.io/component"]
    annotations = dict(metadata.get("annotations") or {})
    if manifest["kind"] == "Service" or component == "eventing":
        annotations[_ARGO + "sync-wave"] = _WAVES[component]
    if metadata["name"].startswith(f"{pipeline.spec.name}-{pipeline.fingerprint[:8]}"):
        annotations[_ARGO + "sync-options"] = "Prune=false"
        annotations["kustomize.toolkit.fluxcd.io/prune"] = "disabled"
    return {**manifest, "metadata": {**metadata, "annotations": annotations} if annotations else metadata}


def prune_objects(pipeline: ResolvedPipeline) -> list[KubernetesObject]:
    """The Job, its ServiceAccount and Role."""
    name, namespace = f"{pipeline.spec.name}-{_PRUNE}", pipeline.spec.namespace
    metadata = {"name": name, "namespace": namespace, "labels": labels(pipeline, _PRUNE)}
    group = "rbac.authorization.k8s.io"
    return [
        {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": metadata},
        {"apiVersion": f"{group}/v1", "kind": "Role", "metadata": metadata, "rules": _rules()},
        {
            "apiVersion": f"{group}/v1",
            "kind": "RoleBinding",
            "metadata": metadata,
            "roleRef": {"apiGroup": group, "kind": "Role", "name": name},
            "subjects": [{"kind": "ServiceAccount", "name": name, "namespace": namespace}],
        },
        _job(pipeline, name),
    ]


def _rules() -> list[KubernetesObject]:
    return [
        {"apiGroups": ["serving.knative.dev"], "resources": ["services"], "verbs": ["get", "list", "delete"]},
        {"apiGroups": ["serving.knative.dev"], "resources": ["revisions"], "verbs": ["list"]},
        {"apiGroups": ["flows.knative.dev"], "resources": ["sequences"], "verbs": ["list", "delete"]},
        {"apiGroups": [""], "resources": ["pods"], "verbs": ["list"]},
    ]


def _job(pipeline: ResolvedPipeline, account: str) -> KubernetesObject:
    """Named after the fingerprint: a Job cannot be changed, and each pipeline prunes those before it."""
    spec, own = pipeline.spec, labels(pipeline, _PRUNE)
    source = Path(prune_script.__file__).read_text(encoding="utf-8")
    container = {
        "name": _PRUNE,
        "image": spec.image,
        "command": ["python", "-c", source, spec.namespace, spec.name, pipeline.fingerprint, str(_ANSWERS_SECONDS)],
        "resources": {"requests": {"cpu": "50m", "memory": "64Mi"}, "limits": {"cpu": "500m", "memory": "128Mi"}},
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": 65532,
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
            "seccompProfile": {"type": "RuntimeDefault"},
        },
    }
    where = {name: value for name, value in spec.gateway.pod.rendered().items() if name not in _AMONG_OTHERS}
    hook = {_ARGO + "hook": "PostSync", _ARGO + "hook-delete-policy": "BeforeHookCreation"}
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {
            "name": f"{spec.name}-{pipeline.fingerprint[:8]}-{_PRUNE}",
            "namespace": spec.namespace,
            "labels": own,
            "annotations": hook,
        },
        "spec": {
            "backoffLimit": 3,
            "ttlSecondsAfterFinished": _KEPT_SECONDS,
            "template": {
                "metadata": {"labels": own},
                "spec": {**where, "serviceAccountName": account, "restartPolicy": "Never", "containers": [container]},
            },
        },
    }
