"""Server-side apply as an API server does it: owners of fields, conflicts, and removal of fields without an owner.

Lists count as one field, as they do in Knative's CRDs.
"""

from collections.abc import Iterator
from typing import Any

Object = dict[str, Any]
Path = tuple[str, ...]
Owners = dict[str, set[Path]]  # by field manager: the leaves that it set last

_NAMES = {("apiVersion",), ("kind",), ("metadata", "name"), ("metadata", "namespace")}


def fields_of(manifest: Object) -> set[Path]:
    return {path for path in _leaves(manifest, ()) if path not in _NAMES}


def conflicts(live: Object, manifest: Object, manager: str, owners: Owners) -> dict[str, list[str]]:
    """Other managers → their fields that the manifest would change, in the API server's notation."""
    paths = fields_of(manifest)
    found = {
        other: sorted(
            "".join(f".{key}" for key in path) for path in paths & owned if value_at(live, path) != value_at(manifest, path)
        )
        for other, owned in owners.items()
        if other != manager
    }
    return {other: fields for other, fields in found.items() if fields}


def merged(live: Object, manifest: Object, manager: str, owners: Owners) -> Object:
    """Removes fields that this manager set before and leaves out now, unless another manager owns them."""
    others = set().union(*(owned for other, owned in owners.items() if other != manager))
    dropped = owners.get(manager, set()) - fields_of(manifest) - others
    return _merge(_without(live, dropped, ()), manifest)


def taken_over(manifest: Object, manager: str, owners: Owners) -> Owners:
    paths = fields_of(manifest)
    return {**{other: owned - paths for other, owned in owners.items() if other != manager}, manager: paths}


def managed_fields(owners: Owners, api_version: str) -> list[Object]:
    return [
        {
            "manager": manager,
            "operation": "Apply",
            "apiVersion": api_version,
            "fieldsType": "FieldsV1",
            "fieldsV1": _nested(paths),
        }
        for manager, paths in sorted(owners.items())
        if paths
    ]


def value_at(value: Any, path: Path) -> Any:
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _nested(paths: set[Path]) -> Object:
    tree: Object = {}
    for path in sorted(paths):
        inner = tree
        for key in path:
            inner = inner.setdefault(f"f:{key}", {})
    return tree


def _leaves(value: Any, path: Path) -> Iterator[Path]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _leaves(inner, (*path, key))
    elif path:
        yield path


def _without(value: Object, paths: set[Path], prefix: Path) -> Object:
    kept: Object = {}
    for key, inner in value.items():
        path = (*prefix, key)
        if path in paths:
            continue
        if isinstance(inner, dict) and inner:
            rest = _without(inner, paths, path)
            if rest or not any(gone[: len(path)] == path for gone in paths):
                kept[key] = rest
        else:
            kept[key] = inner
    return kept


def _merge(live: Object, applied: Object) -> Object:
    result = dict(live)
    for key, value in applied.items():
        inner = live.get(key)
        result[key] = _merge(inner if isinstance(inner, dict) else {}, value) if isinstance(value, dict) else value
    return result
