"""Parses Brokers, Triggers and Sequences from YAML. Refuses fields that would have another effect here than on a cluster."""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from cloudevents.core.v1.event import CloudEvent

from eventing.wire.cloud_event import attribute_text
from knative.local.errors import UnsupportedManifest

Filter = Callable[[CloudEvent], bool]

BROKER: Final = ("eventing.knative.dev/v1", "Broker")
TRIGGER: Final = ("eventing.knative.dev/v1", "Trigger")
SEQUENCE: Final = ("flows.knative.dev/v1", "Sequence")
_GROUPS: Final = ("eventing.knative.dev", "flows.knative.dev", "messaging.knative.dev", "sources.knative.dev")
SERVICE: Final = ("serving.knative.dev/v1", "Service")
_DURATION: Final = re.compile(r"P(?:(\d+)D)?(?:T(?:(\d+)H)?(?:(\d+)M)?(?:(\d+(?:\.\d+)?)S)?)?")
_UNIT_SECONDS: Final = (86_400, 3_600, 60, 1)
_TEXT_DIALECTS: Final[Mapping[str, Callable[[str, str], bool]]] = {
    "exact": str.__eq__,
    "prefix": str.startswith,
    "suffix": str.endswith,
}


@dataclass(frozen=True, slots=True)
class Destination:
    """The address of a delivery: an object by kind and name, or a URL. With both, `uri` is a path at the object's URL."""

    kind: tuple[str, str] | None = None  # (apiVersion, kind)
    namespace: str = ""
    name: str = ""
    uri: str | None = None

    def __str__(self) -> str:
        return self.uri or "" if self.kind is None else f"{self.kind[1]} {self.namespace}/{self.name}{self.uri or ''}"


@dataclass(frozen=True, slots=True)
class Delivery:
    """The rules of delivery for a Trigger or step (Knative's DeliverySpec); by default one attempt, no dead letter sink."""

    retry: int = 0
    policy: str | None = None  # exponential, linear, or None: no pause
    backoff_seconds: float = 0.0
    timeout_seconds: float | None = None  # of one attempt
    dead_letter_sink: Destination | None = None

    def pause_seconds(self, retry: int) -> float:
        """Seconds to wait before retry number `retry`, from 0 as in Knative: the first linear retry has no pause."""
        if self.policy == "exponential":
            return self.backoff_seconds * math.exp2(retry)
        return self.backoff_seconds * retry if self.policy == "linear" else 0.0


@dataclass(frozen=True, slots=True)
class Broker:
    namespace: str
    name: str
    delivery: Delivery | None


@dataclass(frozen=True, slots=True)
class Trigger:
    namespace: str
    name: str
    broker: str
    filter: Filter
    subscriber: Destination
    delivery: Delivery | None


@dataclass(frozen=True, slots=True)
class SequenceStep:
    subscriber: Destination
    delivery: Delivery = field(default_factory=Delivery)


@dataclass(frozen=True, slots=True)
class EventSequence:
    """Knative's Sequence: steps that pass each reply to the next step, and the last reply to `reply`."""

    namespace: str
    name: str
    steps: tuple[SequenceStep, ...]
    reply: Destination | None


EventingObject = Broker | Trigger | EventSequence


def read_eventing_object(manifest: Mapping[str, Any]) -> EventingObject | None:
    """The Broker, Trigger or Sequence in a manifest; None for a SinkBinding, which is not run here, or another API group's.

    Raises UnsupportedManifest, which names object and field.
    """
    kind = (str(manifest.get("apiVersion")), str(manifest.get("kind")))
    group = kind[0].split("/")[0]
    if kind[1] == "SinkBinding" or group not in _GROUPS:
        return None
    metadata, spec = manifest["metadata"], manifest.get("spec") or {}
    namespace, name = metadata.get("namespace", "default"), metadata["name"]
    try:
        if kind == BROKER:
            return Broker(namespace, name, _delivery(spec.get("delivery"), namespace))
        if kind == TRIGGER:
            return Trigger(
                namespace,
                name,
                str(_required(spec, "broker")),
                read_filter(spec),
                _destination(_required(spec, "subscriber"), namespace, "subscriber"),
                _delivery(spec.get("delivery"), namespace),
            )
        if kind == SEQUENCE:
            return _sequence(namespace, name, spec)
    except UnsupportedManifest as error:
        raise UnsupportedManifest(f"{kind[1]} {name}: {error}") from error
    raise UnsupportedManifest(f"{kind[1]} {name} ({kind[0]}) is not run on one machine; Broker, Trigger and Sequence are")


def _sequence(namespace: str, name: str, spec: Mapping[str, Any]) -> EventSequence:
    steps = tuple(
        SequenceStep(_destination(step, namespace, f"steps[{index}]"), _delivery(step.get("delivery"), namespace) or Delivery())
        for index, step in enumerate(_required(spec, "steps"))
    )
    if not steps:
        raise UnsupportedManifest("spec.steps: there must be at least one")
    reply = spec.get("reply")
    return EventSequence(namespace, name, steps, None if reply is None else _destination(reply, namespace, "reply"))


def _destination(value: Mapping[str, Any], namespace: str, path: str) -> Destination:
    reference, uri = value.get("ref"), value.get("uri")
    if reference is None:
        if not re.match("https?://[^/]", uri or ""):
            raise UnsupportedManifest(f"spec.{path}: {uri!r} is no http URL, and there is no ref")
        return Destination(uri=uri)
    kind = (reference.get("apiVersion"), reference.get("kind"))
    if kind not in (SERVICE, BROKER, SEQUENCE):
        raise UnsupportedManifest(
            f"spec.{path}.ref: {kind[1]} ({kind[0]}) is not here; a Knative Service, Broker or Sequence is"
        )
    return Destination(kind, reference.get("namespace") or namespace, reference["name"], uri)


def _delivery(value: Mapping[str, Any] | None, namespace: str) -> Delivery | None:
    if value is None:
        return None
    policy, sink, timeout = value.get("backoffPolicy"), value.get("deadLetterSink"), value.get("timeout")
    if policy not in (None, "exponential", "linear"):
        raise UnsupportedManifest(f"spec.delivery.backoffPolicy: {policy!r} is neither exponential nor linear")
    return Delivery(
        retry=int(value.get("retry") or 0),
        policy=policy,
        backoff_seconds=_seconds(value.get("backoffDelay") or "PT0S", "backoffDelay"),
        timeout_seconds=None if timeout is None else _seconds(timeout, "timeout"),
        dead_letter_sink=None if sink is None else _destination(sink, namespace, "delivery.deadLetterSink"),
    )


def _seconds(text: str, key: str) -> float:
    """Parses an ISO 8601 duration without years and months, such as PT1M30S. key: field that messages name."""
    match = _DURATION.fullmatch(text)
    if match is None or text[-1] in "PT":
        raise UnsupportedManifest(f"spec.delivery.{key}: {text!r} is no ISO 8601 duration such as PT1.5S")
    return sum(float(amount or 0) * unit for amount, unit in zip(match.groups(), _UNIT_SECONDS, strict=True))


def _required(spec: Mapping[str, Any], key: str) -> Any:
    if spec.get(key) is None:
        raise UnsupportedManifest(f"spec.{key} is missing")
    return spec[key]


def read_filter(spec: Mapping[str, Any]) -> Filter:
    """Makes the filter of a Trigger from its `spec`: a function that tells whether an event matches.

    If there are `filters`, all must match and `filter` is ignored. Raises UnsupportedManifest.
    """
    if filters := spec.get("filters"):
        return _all([_dialect_filter(each) for each in filters])
    attributes: Mapping[str, str] = (spec.get("filter") or {}).get("attributes") or {}

    def matches(event: CloudEvent) -> bool:
        """Whether the event has each attribute of the filter, with an equal value unless the filter's value is empty."""
        seen = {name: attribute_text(event.get_attributes().get(name)) for name in attributes}
        return all(value and attributes[name] in ("", value) for name, value in seen.items())

    return matches


def _dialect_filter(filter_: Mapping[str, Any]) -> Filter:
    if len(filter_) != 1:
        raise UnsupportedManifest(f"spec.filters: each has one dialect, this one has {sorted(filter_)}")
    ((dialect, value),) = filter_.items()
    if dialect in _TEXT_DIALECTS:
        return _all([_text_filter(dialect, name, str(text)) for name, text in value.items()])
    if dialect == "not":
        inner = _dialect_filter(value)
        return lambda event: not inner(event)
    if dialect in ("all", "any"):
        filters = [_dialect_filter(each) for each in value]
        return _all(filters) if dialect == "all" else lambda event: any(matches(event) for matches in filters)
    raise UnsupportedManifest(f"spec.filters: {dialect!r} is not run on one machine; exact, prefix, suffix, all, any, not are")


def _text_filter(dialect: str, name: str, text: str) -> Filter:
    compare = _TEXT_DIALECTS[dialect]

    def matches(event: CloudEvent) -> bool:
        value = attribute_text(event.get_attributes().get(name))
        return value is not None and compare(value, text)

    return matches


def _all(filters: list[Filter]) -> Filter:
    return lambda event: all(matches(event) for matches in filters)
