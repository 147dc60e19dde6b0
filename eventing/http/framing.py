"""CloudEvents in HTTP's binary mode, framed once: what a hop needs of `binding`, without an event object on either side.

A sender makes one `EventTemplate` per URL and event type, and fills in what differs from event to event. A receiver reads the
attributes of an event into a dictionary. Both are CloudEvents 1.0.2 with its HTTP protocol binding, as `binding` is.
"""

import os
import re
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Final
from urllib.parse import unquote

from eventing.http.delivery import RequestTarget, fixed_headers, request_head
from eventing.problems import MalformedEvent
from eventing.wire.cloud_event import FORBIDDEN, MAX_VALUE_LENGTH, NAME, bad_attribute, zoned_time

REQUIRED: Final = ("specversion", "id", "source", "type")
_VARYING: Final = ("ce-id", "ce-time", "content-length")
_QUOTED_PAIR: Final = re.compile(r"\\(.)")


class EventTemplate:
    """The head of every request that brings one type of event to one URL."""

    def __init__(self, event_type: str, target: RequestTarget, headers: Mapping[str, str]) -> None:
        """headers: those of one such event by `binding.to_binary_http`, and further headers of the requests."""
        self.event_type = event_type
        self.target = target
        constant = {name: value for name, value in headers.items() if name.lower() not in _VARYING}
        self._head = request_head(target, fixed_headers(constant)).removesuffix(b"\r\n")

    def head(self, body_bytes: int, extensions: Iterable[tuple[str, str]]) -> bytes:
        """With a fresh id and the present time. extensions: attributes of this event; their values need no quoting."""
        lines = f"ce-id: {os.urandom(16).hex()}\r\nce-time: {datetime.now(UTC).isoformat()[:-6]}Z\r\n"
        for name, value in extensions:
            lines += f"ce-{name}: {value}\r\n"
        return b"%b%bContent-Length: %d\r\n\r\n" % (self._head, lines.encode("ascii"), body_bytes)


class ReplyTemplate:
    """The headers of every reply with one type of event from one function."""

    def __init__(self, headers: Mapping[str, str]) -> None:
        """headers: those of one such event by `binding.to_binary_http`."""
        self._constant = [(name, value) for name, value in headers.items() if name not in _VARYING]

    def headers(self, id: str, extensions: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
        """With the present time. extensions: attributes of this reply; their values need no quoting."""
        headers = [*self._constant, ("ce-id", id), ("ce-time", datetime.now(UTC).isoformat()[:-6] + "Z")]
        for name, value in extensions:
            headers.append((f"ce-{name}", value))
        return headers


def read_attributes(headers: Iterable[tuple[str, str]]) -> dict[str, str]:
    """The attributes of an event in binary mode, the content type as `datacontenttype`.

    Raises MalformedEvent, which names the attribute.
    """
    attributes: dict[str, str] = {}
    for header, text in headers:
        name, value = header.lower(), text
        if name == "content-type":
            name = "datacontenttype"
        elif name == "ce-datacontenttype":
            raise MalformedEvent("the attribute datacontenttype travels as Content-Type, not as ce-datacontenttype")
        elif name.startswith("ce-"):
            name = name[3:]
            if text[:1] == '"' == text[1:][-1:]:  # HTTP binding, section 3.1.3.2
                value = _QUOTED_PAIR.sub(r"\1", text[1:-1])
            if "%" in value:
                value = unquote(value)
        else:
            continue
        if name in attributes:
            raise MalformedEvent(f"the header {header.lower()} is there twice: {attributes[name][:40]!r} and {value[:40]!r}")
        if not NAME.fullmatch(name) or len(value) > MAX_VALUE_LENGTH or FORBIDDEN.search(value):
            raise bad_attribute(name, value)
        attributes[name] = value
    found = attributes.get
    if found("specversion") != "1.0" or not (found("id") and found("source") and found("type")):
        raise _not_an_event(attributes)
    if "time" in attributes:
        zoned_time("time", attributes["time"])
    return attributes


def _not_an_event(attributes: Mapping[str, str]) -> MalformedEvent:
    missing = [f"ce-{name}" for name in REQUIRED if not attributes.get(name)]
    if len(missing) == len(REQUIRED):
        return MalformedEvent("not a CloudEvent: neither ce- headers nor the content type application/cloudevents+json")
    if missing:
        return MalformedEvent(f"the header {', '.join(missing)} is missing or empty")
    return MalformedEvent(f"the attribute specversion is {attributes['specversion'][:40]!r}, served is 1.0")
