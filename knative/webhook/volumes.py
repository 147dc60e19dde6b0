"""Volumes of a revision, as Knative's webhook takes them (pkg/apis/serving/k8s_validation.go, fieldmask.go)."""

from typing import Any, Final

from knative.webhook.feature_flags import VOLUME_FIELDS, FeatureFlags
from knative.webhook.values import is_dns_1123_label, parse_quantity
from knative.webhook.violation import Violation, Violations, disallowed, exactly_one_of, invalid, missing

_UNFLAGGED: Final = ("secret", "configMap", "projected")
_PROJECTIONS: Final = ("secret", "configMap", "serviceAccountToken", "downwardAPI")


def volumes(items: list[dict[str, Any]], mounted: set[str], at: str, features: FeatureFlags) -> Violations:
    """mounted: names of all volumes that a container mounts."""
    names: set[str] = set()
    for index, volume in enumerate(items):
        field, name = f"{at}[{index}]", volume["name"]
        if name in names:
            yield Violation(f"{field}.name", f'duplicate volume name "{name}"')
        names.add(name)
        if name not in mounted:
            yield Violation(f"{field}.name", f'volume with name "{name}" not mounted')
        yield from _volume(volume, field, features)


def _volume(volume: dict[str, Any], at: str, features: FeatureFlags) -> Violations:
    name = volume["name"]
    if not name:
        yield missing(f"{at}.name")
    elif not is_dns_1123_label(name):
        yield invalid(f"{at}.name", name, "not a DNS 1123 label")
    for kind, flag in VOLUME_FIELDS.items():
        if kind in volume and not features.let_through(flag):
            yield disallowed(f"{at}.{kind}", flag)
    sources = (*_UNFLAGGED, *(kind for kind, flag in VOLUME_FIELDS.items() if features.enabled(flag)))
    yield from exactly_one_of(at, sources, [kind for kind in (*_UNFLAGGED, *VOLUME_FIELDS) if kind in volume])
    for kind in ("secret", "configMap"):
        yield from _items(volume.get(kind, {}).get("items", []), f"{at}.items")
    for index, source in enumerate(volume.get("projected", {}).get("sources", [])):
        yield from _projection(source, f"{at}.projected[{index}]")
    if "emptyDir" in volume:
        yield from _empty_dir(volume["emptyDir"], f"{at}.emptyDir")


def _items(items: list[dict[str, Any]], at: str) -> Violations:
    for index, item in enumerate(items):
        for name in ("key", "path"):
            if not item[name]:
                yield missing(f"{at}[{index}].{name}")


def _empty_dir(source: dict[str, Any], at: str) -> Violations:
    medium = source.get("medium", "")
    if medium not in ("", "Memory"):
        yield invalid(f"{at}.medium", medium, "only the default and Memory")
    if "sizeLimit" in source and parse_quantity(source["sizeLimit"]) < 0:
        yield invalid(f"{at}.sizeLimit", source["sizeLimit"])


def _projection(source: dict[str, Any], at: str) -> Violations:
    yield from exactly_one_of(at, _PROJECTIONS, [kind for kind in _PROJECTIONS if kind in source])
    for kind in ("secret", "configMap"):
        if kind in source:
            if not source[kind].get("name"):
                yield missing(f"{at}.{kind}.name")
            yield from _items(source[kind].get("items", []), f"{at}.{kind}.items")
    if "serviceAccountToken" in source and not source["serviceAccountToken"]["path"]:
        yield missing(f"{at}.serviceAccountToken.path")
    for index, item in enumerate(source.get("downwardAPI", {}).get("items", [])):
        field = f"{at}.downwardAPI.items[{index}]"
        yield from exactly_one_of(
            field, ("fieldRef", "resourceFieldRef"), [name for name in ("fieldRef", "resourceFieldRef") if name in item]
        )
        if not item["path"]:
            yield missing(f"{field}.path")
