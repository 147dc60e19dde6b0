"""Reads manifests from files: YAML with any number of documents, or JSON (which is YAML too)."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from knative.spec.kubernetes_object import KubernetesObject


class ManifestError(Exception):
    """A file cannot be read as manifests. The message names the file and the place."""


@dataclass(frozen=True, slots=True)
class FileObject:
    """One object, as it stands in a file."""

    object: KubernetesObject
    repeated_keys: tuple[str, ...]
    """Keys that stand twice in the file, with their line; the last one counts."""

    @property
    def kind(self) -> str:
        return str(self.object.get("kind", "object without kind"))

    @property
    def name(self) -> str:
        metadata = self.object.get("metadata")
        return str(metadata.get("name", "")) if isinstance(metadata, dict) else ""


def read_manifests(path: Path) -> list[FileObject]:
    """Every object in the file; a List counts as its items. Raises ManifestError."""
    try:
        text = path.read_text(encoding="utf-8")
        return list(_manifests(path, text))
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
            for item in _items(document):
                if not isinstance(item, dict):
                    raise ManifestError(f"{path}: a manifest is an object, not {type(item).__name__} ({str(item)[:40]!r})")
                yield FileObject(item, tuple(loader.repeated))
    finally:
        loader.dispose()


def _items(document: Any) -> list[Any]:
    if isinstance(document, dict) and document.get("kind") == "List" and isinstance(document.get("items"), list):
        return list(document["items"])
    return [document]


class _Loader(yaml.SafeLoader):
    """YAML as Kubernetes takes it: keys are strings, a date is a string, and a key that stands twice is remembered."""

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
