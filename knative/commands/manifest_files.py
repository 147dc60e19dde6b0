"""Reads manifests: from files with any number of YAML documents (or JSON), and from a folder that `render --output` wrote."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import yaml

from knative.spec.kubernetes_object import KubernetesObject
from knative.webhook.check import is_knative_service

_COMPONENT: Final = "app.kubernetes.io/component"
_INSTANCE: Final = "app.kubernetes.io/instance"


class ManifestError(Exception):
    """A file or folder cannot be read as manifests. The message names it and the place."""


@dataclass(frozen=True, slots=True)
class FileObject:
    object: KubernetesObject
    repeated_keys: tuple[str, ...]  # keys that occur twice in one mapping, with their line; the last one counts

    @property
    def name(self) -> str:
        metadata = self.object.get("metadata")
        return str(metadata.get("name", "")) if isinstance(metadata, dict) else ""


def read_manifests(path: Path) -> list[FileObject]:
    """Every object in the file; a List counts as its items. Raises ManifestError."""
    try:
        return list(_manifests(path, path.read_text(encoding="utf-8")))
    except OSError as error:
        raise ManifestError(f"{path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ManifestError(f"{path}: not UTF-8 at byte {error.start}") from error
    except yaml.YAMLError as error:
        raise ManifestError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    except RecursionError as error:
        raise ManifestError(f"{path}: nested too deeply") from error


def _manifests(path: Path, text: str) -> Iterator[FileObject]:
    loader = _Loader(text)
    try:
        while loader.check_data():  # type: ignore[no-untyped-call]
            loader.repeated = []
            document = loader.get_data()
            if document is None:
                continue
            is_list = isinstance(document, dict) and document.get("kind") == "List" and isinstance(document.get("items"), list)
            for item in document["items"] if is_list else [document]:
                if not isinstance(item, dict):
                    raise ManifestError(f"{path}: a manifest is an object, not {type(item).__name__} ({str(item)[:40]!r})")
                yield FileObject(item, tuple(loader.repeated))
    finally:
        loader.dispose()


class _Loader(yaml.SafeLoader):
    """Reads YAML as Kubernetes does: keys and dates are strings. Records keys that occur twice in a mapping."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.repeated: list[str] = []

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        self.flatten_mapping(node)
        mapping: dict[Any, Any] = {}
        for key_node, value_node in node.value:
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else str(self.construct_object(key_node, deep=True))
            if key in mapping:
                self.repeated.append(f"{key} (line {key_node.start_mark.line + 1})")
            mapping[key] = self.construct_object(value_node, deep=deep)
        return mapping


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def read_rendered(folder: Path) -> list[KubernetesObject]:
    """The objects of a pipeline that `render --output` wrote, possibly edited since, in the order in which they are applied.

    Objects for GitOps controllers are left out. Raises ManifestError, with a line for each fault.
    """
    found: list[KubernetesObject] = []
    for file in sorted(path for path in folder.iterdir() if path.suffix in (".yaml", ".yml")):
        for manifest in (each.object for each in read_manifests(file)):
            if str(manifest.get("apiVersion", "")).startswith("kustomize.config.k8s.io/"):
                if more := set(manifest) - {"apiVersion", "kind", "metadata", "resources"}:
                    raise ManifestError(
                        f"{file}: {min(more)} changes what is applied; build it first: "
                        f"kubectl kustomize {file.parent} > BUILT/all.yaml, then deploy BUILT"
                    )
            elif _labels(manifest).get(_COMPONENT) != "prune":  # the Job that prunes: the deployer deletes old stages itself
                found.append(manifest)
    if faults := list(_faults(found)):
        raise ManifestError("\n".join(f"{folder}: {fault}" for fault in faults))
    return sorted(found, key=_order)


def _order(manifest: KubernetesObject) -> int:
    """Rank of an object in the order of `render`: access and monitoring, stages, gateway, gateway for events, Eventing."""
    component = _labels(manifest).get(_COMPONENT)
    if component == "eventing":
        return 4
    if not is_knative_service(manifest):
        return 0
    return 1 if component == "stage" else 2 if _is_main_gateway(manifest) else 3


def _faults(found: list[KubernetesObject]) -> Iterator[str]:
    gateways = [each for each in found if is_knative_service(each) and _is_main_gateway(each)]
    if len(gateways) != 1:
        yield f"has {len(gateways)} gateways, and needs one; did `render --output` write this folder?"
    for each in found:
        metadata = each.get("metadata") or {}
        if not metadata.get("name") or not metadata.get("namespace") or not _labels(each).get(_COMPONENT):
            yield f"{each.get('kind')} {metadata.get('name')}: lacks its name, namespace, or the labels that `render` writes"
    namespaces = {str((each.get("metadata") or {}).get("namespace")) for each in found}
    for what, values in (
        ("namespace", namespaces),
        *((label, {str(_labels(each).get(label)) for each in found}) for label in (_INSTANCE, "lamina.dev/pipeline")),
    ):
        if len(values) > 1:
            yield f"{what} differs among the objects: {', '.join(sorted(values))}"


def _is_main_gateway(manifest: KubernetesObject) -> bool:
    """Whether the object is the gateway for clients, rather than the one for events."""
    labels = _labels(manifest)
    return labels.get(_COMPONENT) == "gateway" and manifest["metadata"].get("name") == labels.get(_INSTANCE)


def _labels(manifest: KubernetesObject) -> dict[str, Any]:
    return (manifest.get("metadata") or {}).get("labels") or {}
