"""A Kubernetes object: what is rendered, checked, applied and run, and how it is written into a file."""

import re
from typing import Any, Final

import yaml

KubernetesObject = dict[str, Any]
"""As in its YAML: apiVersion, kind, metadata, and what its kind has."""

_NUMBER_LIKE: Final = re.compile(r"[-+.]?\d")


def to_yaml(objects: list[KubernetesObject]) -> str:
    """Deterministic: keys in the order of rendering, a document each."""
    return yaml.dump_all(objects, Dumper=_Dumper, sort_keys=False, width=120, explicit_start=True)


class _Dumper(yaml.SafeDumper):
    """Writes shared values out instead of anchors, indents lists, and quotes what another reader may take for a number.

    A fingerprint such as 1178e1174203 is a string to PyYAML and a float to Kubernetes.
    """

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)


def _string(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"' if _NUMBER_LIKE.match(text) else None)


_Dumper.add_representer(str, _string)
