"""A folder that `render --output` wrote, and that somebody may have edited since: the objects of a pipeline again."""

from collections.abc import Iterator
from pathlib import Path

from knative.commands.sources.manifest_files import ManifestError, read_manifests
from knative.spec.kubernetes_object import KubernetesObject
from knative.webhook.check import is_knative_service

_COMPONENT = "app.kubernetes.io/component"
_KUSTOMIZE = "kustomize.config.k8s.io/"
_PLAIN = {"apiVersion", "kind", "metadata", "resources"}


def read_rendered(folder: Path) -> list[KubernetesObject]:
    """Without what only a controller of manifests needs. Raises ManifestError, a line for each thing that is wrong."""
    files = sorted(path for path in folder.iterdir() if path.suffix in (".yaml", ".yml"))
    found = [each for file in files for each in _of(file)]
    if problems := list(_problems(found)):
        raise ManifestError("\n".join(f"{folder}: {problem}" for problem in problems))
    return sorted(found, key=_turn)


def _turn(manifest: KubernetesObject) -> int:
    """As `render` orders them: access, network and monitoring, stages, the gateway, the one for events, Eventing."""
    if _component(manifest) == "eventing":
        return 4
    if not is_knative_service(manifest):
        return 0
    return 1 if _component(manifest) == "stage" else 2 if _is_the_gateway(manifest) else 3


def _of(file: Path) -> Iterator[KubernetesObject]:
    for each in read_manifests(file):
        manifest = each.object
        if str(manifest.get("apiVersion", "")).startswith(_KUSTOMIZE):
            if more := set(manifest) - _PLAIN:
                raise ManifestError(
                    f"{file}: {min(more)} changes what is applied; build it first: "
                    f"kubectl kustomize {file.parent} > BUILT/all.yaml, then deploy BUILT"
                )
        elif _component(manifest) != "prune":  # the deployer prunes by itself
            yield manifest


def _problems(found: list[KubernetesObject]) -> Iterator[str]:
    gateways = [each for each in found if is_knative_service(each) and _is_the_gateway(each)]
    if len(gateways) != 1:
        yield f"{len(gateways)} gateways are in it, one is wanted; is this what `render --output` wrote?"
    for each in found:
        metadata = each.get("metadata") or {}
        if not metadata.get("name") or not metadata.get("namespace") or not _component(each):
            yield f"{each.get('kind')} {metadata.get('name')}: name, namespace and the labels that `render` gave it are wanted"
    for what in ("namespace", "app.kubernetes.io/instance", "lamina.dev/pipeline"):
        if len(values := {str(_value(each, what)) for each in found}) > 1:
            yield f"{what} differs among the objects: {', '.join(sorted(values))}"


def _is_the_gateway(manifest: KubernetesObject) -> bool:
    """And not the one for events."""
    labels = manifest["metadata"].get("labels") or {}
    return labels.get(_COMPONENT) == "gateway" and manifest["metadata"].get("name") == labels.get("app.kubernetes.io/instance")


def _value(manifest: KubernetesObject, what: str) -> object:
    metadata = manifest.get("metadata") or {}
    return metadata.get(what) if what == "namespace" else (metadata.get("labels") or {}).get(what)


def _component(manifest: KubernetesObject) -> str:
    return str(_value(manifest, _COMPONENT) or "")
