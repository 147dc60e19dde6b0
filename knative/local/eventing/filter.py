"""Which events a Trigger takes: by attributes, exactly, or in the dialects of the subscriptions API but for CESQL."""

from collections.abc import Callable, Mapping
from typing import Any, Final

from cloudevents.core.v1.event import CloudEvent

from eventing.wire.cloud_event import attribute_text
from knative.local.errors import UnsupportedManifest

Filter = Callable[[CloudEvent], bool]

_TEXT: Final[Mapping[str, Callable[[str, str], bool]]] = {
    "exact": str.__eq__,
    "prefix": str.startswith,
    "suffix": str.endswith,
}


def read_filter(spec: Mapping[str, Any]) -> Filter:
    """Of a Trigger's spec: `filters`, all of which must match, counts before `filter`. Raises UnsupportedManifest."""
    if filters := spec.get("filters"):
        return _all([_dialect(each) for each in filters])
    return _attributes((spec.get("filter") or {}).get("attributes") or {})


def _attributes(wanted: Mapping[str, str]) -> Filter:
    """Each attribute must be there and, unless the wanted value is empty, be equal."""

    def matches(event: CloudEvent) -> bool:
        seen = {name: _value(event, name) for name in wanted}
        return all(value and (not wanted[name] or value == wanted[name]) for name, value in seen.items())

    return matches


def _dialect(filter_: Mapping[str, Any]) -> Filter:
    if len(filter_) != 1:
        raise UnsupportedManifest(f"spec.filters: each has one dialect, this one has {sorted(filter_)}")
    ((dialect, value),) = filter_.items()
    if dialect in _TEXT:
        return _all([_compare(dialect, name, str(text)) for name, text in value.items()])
    if dialect == "not":
        inner = _dialect(value)
        return lambda event: not inner(event)
    if dialect in ("all", "any"):
        return (_all if dialect == "all" else _any)([_dialect(each) for each in value])
    raise UnsupportedManifest(f"spec.filters: {dialect!r} is not run on one machine; exact, prefix, suffix, all, any, not are")


def _compare(dialect: str, name: str, text: str) -> Filter:
    compare = _TEXT[dialect]

    def matches(event: CloudEvent) -> bool:
        value = _value(event, name)
        return value is not None and compare(value, text)

    return matches


def _all(filters: list[Filter]) -> Filter:
    return lambda event: all(matches(event) for matches in filters)


def _any(filters: list[Filter]) -> Filter:
    return lambda event: any(matches(event) for matches in filters)


def _value(event: CloudEvent, name: str) -> str | None:
    return attribute_text(event.get_attributes().get(name))
