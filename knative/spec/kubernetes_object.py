"""Kubernetes objects as dicts, and their YAML."""

import re
from collections.abc import Mapping
from typing import Any, Final

import yaml

KubernetesObject = dict[str, Any]  # apiVersion, kind, metadata and the fields of its kind

_NUMBER_LIKE: Final = re.compile(r"[-+.]?\d")


def kubernetes_object(
    api_version: str,
    kind: str,
    name: str,
    namespace: str,
    labels: Mapping[str, str],
    annotations: Mapping[str, str] | None = None,
    **fields: Any,
) -> KubernetesObject:
    """An object with this metadata. fields: all others, such as `spec`."""
    metadata: KubernetesObject = {"name": name, "namespace": namespace, "labels": labels}
    if annotations is not None:
        metadata["annotations"] = annotations
    return {"apiVersion": api_version, "kind": kind, "metadata": metadata, **fields}


def to_yaml(objects: list[KubernetesObject]) -> str:
    """One YAML document for each object. Keys keep their order, so equal objects give the same text."""
    return yaml.dump_all(objects, Dumper=_Dumper, sort_keys=False, width=120, explicit_start=True)


class _Dumper(yaml.SafeDumper):
    """Repeats shared values instead of using anchors, indents lists, and quotes strings that look like numbers.

    PyYAML reads a fingerprint such as 1178e1174203 as a string, Kubernetes reads it as a float.
    """

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)


def _string(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"' if _NUMBER_LIKE.match(text) else None)


_Dumper.add_representer(str, _string)
