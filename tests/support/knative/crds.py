"""Validates manifests against the schemas in Knative's CRDs, as an API server does with strict field validation.

tests/data/knative-crds.json names the source and licence of each schema.
"""

import json
from collections.abc import Iterator
from functools import cache
from typing import Any, Final

from jsonschema import Draft202012Validator

from tests.support.paths import DATA

_CRDS: Final = json.loads((DATA / "knative-crds.json").read_text())["crds"]
KINDS: Final = frozenset(_CRDS)  # such as `serving.knative.dev/v1 Service`
_OF_EVERY_OBJECT: Final = {"apiVersion": {"type": "string"}, "kind": {"type": "string"}, "metadata": {"type": "object"}}
_BITS: Final = {"int32": 31, "int64": 63}


def kind_of(manifest: dict[str, Any]) -> str:
    return f"{manifest['apiVersion']} {manifest['kind']}"


def schema_violations(manifest: dict[str, Any]) -> list[str]:
    """One line, with the field, for each violation."""
    schema = _CRDS[kind_of(manifest)]["schema"]
    found = [f"{error.json_path}: {error.message}" for error in _validator(kind_of(manifest)).iter_errors(manifest)]
    return [*found, *_repeated(manifest, schema, "$")]


@cache
def _validator(kind: str) -> Draft202012Validator:
    schema = _CRDS[kind]["schema"]
    strict = _strict({**schema, "properties": {**schema["properties"], **_OF_EVERY_OBJECT}})
    strict["properties"]["metadata"] = _OF_EVERY_OBJECT["metadata"]
    return Draft202012Validator(strict)


def _strict(schema: dict[str, Any]) -> dict[str, Any]:
    """A structural schema (Kubernetes) as a JSON schema that also refuses unknown fields and integers out of range."""
    strict = dict(schema)
    if "properties" in schema:
        strict["properties"] = {name: _strict(each) for name, each in schema["properties"].items()}
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            strict.setdefault("additionalProperties", False)
    for key in ("items", "additionalProperties"):
        if isinstance(schema.get(key), dict):
            strict[key] = _strict(schema[key])
    if bits := _BITS.get(schema.get("format", "")):
        strict |= {"minimum": -(2**bits), "maximum": 2**bits - 1}
    return strict


def _repeated(value: Any, schema: dict[str, Any], path: str) -> Iterator[str]:
    """Elements of a list of type `map` that have the same keys."""
    if isinstance(value, dict):
        for name, inner in value.items():
            extra = schema.get("additionalProperties")
            known = schema.get("properties", {}).get(name, extra if isinstance(extra, dict) else {})
            yield from _repeated(inner, known, f"{path}.{name}")
    elif isinstance(value, list):
        keys = schema.get("x-kubernetes-list-map-keys", ())
        named = [tuple(str(each.get(key)) for key in keys) for each in value if keys]
        for name in sorted({name for name in named if named.count(name) > 1}):
            yield f"{path}: {', '.join(name)} is there more than once"
        for number, inner in enumerate(value):
            yield from _repeated(inner, schema.get("items", {}), f"{path}[{number}]")
