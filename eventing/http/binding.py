"""Converts CloudEvents to HTTP and back (CloudEvents 1.0.2, HTTP protocol binding and JSON format), over the cloudevents SDK.

Binary mode carries any data; structured and batched mode carry only JSON. A Batch in structured mode is refused with 415.
`from_http` refuses batched mode, for which there is `from_batched_http`. The SDK's own JSONFormat would decode the event's
data, copy it and guess its type, so `_PassThrough` replaces it and keeps the data as bytes.
"""

import base64
import json
from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any, Final, NoReturn, cast

import msgspec
from cloudevents.core.base import BaseCloudEvent, EventFactory
from cloudevents.core.bindings.http import HTTPMessage, from_structured, to_binary, to_structured
from cloudevents.core.formats.json import JSONFormat
from cloudevents.core.v1.event import CloudEvent

from eventing.problems import MalformedEvent, UnsupportedMediaType
from eventing.wire.cloud_event import attribute_text, checked_event, data_buffers, event_of
from eventing.wire.events import BATCH_CONTENT_TYPE
from eventing.wire.framing import JSON_CONTENT_TYPE, REQUIRED, Buffer, is_json, media_type, read_attributes, zoned_time

STRUCTURED_CONTENT_TYPE: Final = JSONFormat.CONTENT_TYPE
BATCHED_CONTENT_TYPE: Final = "application/cloudevents-batch+json"

Headers = Mapping[str, str] | Iterable[tuple[str, str]]

# Extensions may be integers and booleans too (JSON format, section 2.2).
_STRINGS: Final = (*REQUIRED, "datacontenttype", "dataschema", "subject", "time")


def to_binary_http(event: CloudEvent) -> tuple[dict[str, str], list[Buffer]]:
    """Returns the headers (names in lower case) and the body of an event in binary mode.

    The body is a list of buffers that are the event's own data: nothing is copied.
    """
    return to_binary(event, _FORMAT).headers, data_buffers(event)


def to_structured_http(event: CloudEvent) -> tuple[dict[str, str], list[Buffer]]:
    """Returns the headers and the body of an event in structured mode. Raises UnsupportedMediaType if its data is not JSON."""
    message = to_structured(event, _FORMAT)
    return message.headers, [message.body]


def from_http(headers: Headers, body: bytes | bytearray | memoryview) -> CloudEvent:
    """Reads the event of a request or reply in binary or structured mode.

    The event's data is `body` itself in binary mode, and bytes taken from the JSON document in structured mode. Raises
    MalformedEvent, which names the attribute, and UnsupportedMediaType.
    """
    items = list(headers.items() if isinstance(headers, Mapping) else headers)
    content_type = next((value for name, value in items if name.lower() == "content-type"), "")
    type_ = media_type(content_type)
    if not type_.startswith("application/cloudevents"):
        return event_of(read_attributes(items), cast("bytes", body))
    if type_ != STRUCTURED_CONTENT_TYPE:
        raise UnsupportedMediaType(f"{content_type} is not served; send one event, binary or as {STRUCTURED_CONTENT_TYPE}")
    return cast("CloudEvent", from_structured(HTTPMessage(dict(items), cast("bytes", body)), _FORMAT, checked_event))


def from_batched_http(body: bytes | memoryview) -> list[CloudEvent]:
    """Reads the events of a request in batched mode (JSON batch format, CloudEvents 1.0.2, JSON format, section 4).

    Raises MalformedEvent; its message says which of the events is wrong.
    """
    try:
        pieces = msgspec.json.decode(body, type=list[msgspec.Raw])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise MalformedEvent(f"the batch is no JSON array of events: {error}") from error
    events = []
    for number, piece in enumerate(pieces):
        try:
            events.append(cast("CloudEvent", _FORMAT.read(checked_event, bytes(piece))))
        except MalformedEvent as error:
            raise MalformedEvent(f"event {number} of the batch: {error}") from error
    return events


def to_batched_http(events: Iterable[CloudEvent]) -> tuple[dict[str, str], list[Buffer]]:
    """Returns the headers and the body of events in batched mode.

    Raises UnsupportedMediaType if an event's data is not JSON.
    """
    return {"content-type": BATCHED_CONTENT_TYPE}, [b"[" + b",".join(_FORMAT.write(event) for event in events) + b"]"]


class _PassThrough(JSONFormat):
    """The SDK's JSON format, except that event data stays bytes or buffers, and structured events are read strictly."""

    def read_data(self, body: Any, datacontenttype: str | None) -> Any:
        return body

    def write_data(self, data: Any, datacontenttype: str | None) -> Any:
        return data

    def read(self, event_factory: EventFactory | None, data: Any) -> BaseCloudEvent:
        members = _json_object(data)
        if members.get("specversion") != "1.0":
            raise MalformedEvent(f"the attribute specversion is {_shown(members.get('specversion'))}, served is 1.0")
        content = _structured_data(members)
        for name in REQUIRED:
            if not members.get(name):
                raise MalformedEvent(f"the attribute {name} is missing or empty")
        attributes: dict[str, Any] = {name: _attribute(name, value) for name, value in members.items() if value is not None}
        return checked_event(attributes, content)

    def write(self, event: BaseCloudEvent) -> bytes:
        members = dict(event.get_attributes())
        content_type = members.get("datacontenttype", JSON_CONTENT_TYPE)
        if not is_json(content_type):
            raise UnsupportedMediaType(f"{event.get_type()} with data of {content_type} travels in binary mode only")
        buffers = data_buffers(cast("CloudEvent", event))
        if buffers:
            members["data"] = _parsed(b"".join(buffers), "the data")
        return msgspec.json.encode(members)


_FORMAT: Final = _PassThrough()


def _json_object(body: bytes | memoryview) -> dict[str, Any]:
    members = _parsed(body, "the event")
    if not isinstance(members, dict):
        raise MalformedEvent(f"the event is a JSON {type(members).__name__}, not an object")
    return members


def _parsed(body: bytes | memoryview, what: str) -> Any:
    """Decodes strict JSON: UTF-8, no member twice, no NaN. Raises MalformedEvent; `what` names the document in its message."""
    try:
        return json.loads(str(body, "utf-8"), object_pairs_hook=_without_repetition, parse_constant=_refuse_constant)
    except RecursionError as error:
        raise MalformedEvent(f"{what} is JSON that is nested too deeply") from error
    except ValueError as error:
        raise MalformedEvent(f"{what} is not JSON in UTF-8: {error}") from error


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members: dict[str, Any] = {}
    for name, value in pairs:
        if name in members:
            raise ValueError(f"{name[:40]!r} is there twice")
        members[name] = value
    return members


def _shown(value: object) -> str:
    """Describes a value in an error message: a string by its first 40 characters, any other value by its JSON type."""
    if isinstance(value, str):
        return repr(value[:40])
    return f"a JSON {type(value).__name__}" + (f", {value}" if isinstance(value, float) else "")


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _structured_data(members: dict[str, Any]) -> bytes | None:
    """Removes the data from the members of a structured event and returns it as bytes; None if there is no data.

    Sets datacontenttype to application/json if there is data and no type is named (JSON format, section 3.1). Raises
    MalformedEvent and UnsupportedMediaType.
    """
    content_type = members.get("datacontenttype") or JSON_CONTENT_TYPE
    if content_type == BATCH_CONTENT_TYPE:
        raise UnsupportedMediaType(f"{BATCH_CONTENT_TYPE} travels in binary mode only")
    data, encoded = members.pop("data", None), members.pop("data_base64", None)
    if data is not None and encoded is not None:
        raise MalformedEvent("data and data_base64 exclude each other")
    if data is None and encoded is None:
        return None
    members["datacontenttype"] = content_type
    if encoded is not None:
        try:
            return base64.b64decode(cast("str", encoded), validate=True)
        except (ValueError, TypeError) as error:
            raise MalformedEvent(f"data_base64 is not base64: {error}") from error
    if isinstance(content_type, str) and not is_json(content_type):
        if not isinstance(data, str):
            raise MalformedEvent(f"data of {content_type} must be a JSON string, or travel as data_base64")
        return data.encode("utf-8", "surrogatepass")
    try:
        return json.dumps(data).encode()
    except RecursionError as error:  # Writing takes a little more of the stack than reading did.
        raise MalformedEvent("the data is JSON that is nested too deeply") from error


def _attribute(name: str, value: object) -> str | datetime:
    """Converts a member of a structured event to the attribute's value in binary mode: a string, or a datetime for `time`.

    Raises MalformedEvent.
    """
    if not isinstance(value, str if name in _STRINGS else str | int):
        raise MalformedEvent(f"the attribute {name[:40]!r} is {_shown(value)}")
    return zoned_time(name, value) if name == "time" else cast("str", attribute_text(cast("str | int", value)))
