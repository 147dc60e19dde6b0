"""Writes and reads events in HTTP's binary mode as headers and bytes (CloudEvents 1.0.2, HTTP protocol binding).

It makes no event objects, which would slow down each hop; `eventing.http.binding` does. A sender keeps a template of the
headers that stay the same, and adds those that differ from event to event. A receiver reads all attributes into a dictionary.
"""

import hashlib
import os
import re
import threading
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Any, Final, TypeVar
from urllib.parse import unquote

import msgspec

from eventing.problems import EventExpired, MalformedEvent, UnsupportedMediaType
from eventing.wire.batch_codec import decode_batch
from eventing.wire.events import BATCH_CONTENT_TYPE, Attribute, Batch

JSON_CONTENT_TYPE: Final = "application/json"
JSONL_CONTENT_TYPE: Final = "application/jsonl"
REQUIRED: Final = ("specversion", "id", "source", "type")
_KNOWN: Final = {*REQUIRED, "time", "datacontenttype", *Attribute}  # names that need no check
MAX_NAME_LENGTH: Final = 20
MAX_VALUE_LENGTH: Final = 4096

Buffer = bytes | memoryview
T = TypeVar("T")

_making: Final = threading.Lock()
_decoders: Final[dict[type, msgspec.json.Decoder[Any]]] = {}

NAME: Final = re.compile(rf"[a-z0-9]{{1,{MAX_NAME_LENGTH}}}")
# What no attribute may contain (CloudEvents 1.0.2, section 3.1), and U+FFFD, which stands for bytes that were not UTF-8.
FORBIDDEN: Final = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff\ufffd]")
_QUOTED_PAIR: Final = re.compile(r"\\(.)")


def event_lines(extensions: Iterable[tuple[str, str]]) -> bytes:
    """Encodes the headers of one event: a fresh id, the present time, and `extensions` as (name, value).

    The values are written as they are, so they must not need percent-encoding.
    """
    lines = f"ce-id: {os.urandom(16).hex()}\r\nce-time: {datetime.now(UTC).isoformat()[:-6]}Z\r\n"
    for name, value in extensions:
        lines += f"ce-{name}: {value}\r\n"
    return lines.encode("ascii")


class ReplyTemplate:
    """The constant headers of all replies of one event type from one function."""

    def __init__(self, headers: Mapping[str, str]) -> None:
        """Takes the constant headers from one such reply, made by `binding.to_binary_http`.

        The reply's id and time are not used.
        """
        self._constant = [(name, value) for name, value in headers.items() if name not in ("ce-id", "ce-time")]

    def headers(self, id: str, extensions: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
        """Returns all headers of one reply, with the present time.

        `extensions` are attributes of this reply as (name, value). Their values must not need percent-encoding.
        """
        headers = [*self._constant, ("ce-id", id), ("ce-time", datetime.now(UTC).isoformat()[:-6] + "Z")]
        for name, value in extensions:
            headers.append((f"ce-{name}", value))
        return headers


def read_attributes(headers: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Returns the attributes of an event in binary mode. The content type becomes `datacontenttype`.

    Raises MalformedEvent, which names the attribute.
    """
    attributes: dict[str, str] = {}
    for header, value in headers:
        name = header.lower()
        if name.startswith("ce-"):
            name = name[3:]
            if name == "datacontenttype":
                raise MalformedEvent("the attribute datacontenttype travels as Content-Type, not as ce-datacontenttype")
            text = unquoted(value) if "%" in value or value[:1] == '"' else value
        elif name == "content-type":
            name, text = "datacontenttype", value
        else:
            continue
        if name in attributes:
            raise MalformedEvent(f"the header {header.lower()} is there twice: {attributes[name][:40]!r} and {text[:40]!r}")
        attributes[name] = text
    found = attributes.get
    if found("specversion") != "1.0" or not (found("id") and found("source") and found("type")):
        raise _not_an_event(attributes)
    unknown = attributes.keys() - _KNOWN
    values = attributes.values()
    if unknown or FORBIDDEN.search("".join(values)) or max(map(len, values)) > MAX_VALUE_LENGTH:
        for name, text in attributes.items():
            check_attribute(name, text)
    if "time" in attributes:
        zoned_time("time", attributes["time"])
    return attributes


def unquoted(value: str) -> str:
    """Decodes an attribute's value in a header: double quotes and percent-encoding (HTTP binding, section 3.1.3.2)."""
    if len(value) > 1 and value[0] == value[-1] == '"':
        value = _QUOTED_PAIR.sub(r"\1", value[1:-1])
    return unquote(value)


def check_attribute(name: str, value: str) -> None:
    """Raises MalformedEvent if CloudEvents does not allow the name or the value of an attribute."""
    if name == "data":
        raise MalformedEvent("attribute 'data': an event's data is its body, and no attribute has this name")
    if not value and name in ("subject", "dataschema"):
        raise MalformedEvent(f"attribute {name} is empty; leave it out")
    if not NAME.fullmatch(name):
        raise MalformedEvent(f"attribute {name[:40]!r}: names are 1 to {MAX_NAME_LENGTH} characters of a-z and 0-9")
    if len(value) > MAX_VALUE_LENGTH:
        raise MalformedEvent(f"attribute {name} has {len(value)} characters, the most is {MAX_VALUE_LENGTH}")
    if FORBIDDEN.search(value):
        raise MalformedEvent(f"attribute {name} contains a control character or is not UTF-8: {value[:40]!r}")


def required_attribute(attributes: Mapping[str, Any], name: str) -> str:
    """Returns the value of an attribute. Raises MalformedEvent if the attribute is missing."""
    value = attributes.get(name)
    if value is None:
        raise MalformedEvent(f"{attributes['type']}: the attribute {name} is missing")
    return str(value)


def integer_attribute(attributes: Mapping[str, Any], name: str) -> int:
    """Returns the number in a required attribute. Raises MalformedEvent if the attribute is missing or not 1 to 10 digits."""
    value = required_attribute(attributes, name)
    if not (value.isascii() and value.isdigit() and len(value) <= 10):
        raise MalformedEvent(f"{attributes['type']}: the attribute {name} is {value!r}, not a number")
    return int(value)


def zoned_time(name: str, text: str) -> datetime:
    """Parses a time attribute: RFC 3339, and other forms of ISO 8601 that the SDK reads.

    Raises MalformedEvent for an invalid time and for one without a time zone.
    """
    try:
        moment = datetime.fromisoformat(text.replace("z", "Z"))
    except ValueError as error:
        raise MalformedEvent(f"the attribute {name} is {text!r}: {error}") from error
    if moment.tzinfo is None:
        raise MalformedEvent(f"the attribute {name} is {text!r}, a time without a timezone")
    return moment


def expiry_time(attributes: Mapping[str, Any]) -> datetime | None:
    """Returns the event's `expirytime` in UTC, after which nobody awaits the answer.

    Returns None if the event never expires. Raises MalformedEvent.
    """
    value = attributes.get(Attribute.EXPIRY_TIME)
    if value is None:
        return None
    try:
        return zoned_time(Attribute.EXPIRY_TIME, value).astimezone(UTC)
    except OverflowError as error:  # before the year 1 or after 9999 in UTC
        raise MalformedEvent(f"the attribute {Attribute.EXPIRY_TIME} is {value!r}: {error}") from error


def check_not_expired(attributes: Mapping[str, Any], now: datetime) -> datetime | None:
    """Returns the event's expiry time (see `expiry_time`). Raises EventExpired if it has passed. `now` has a time zone."""
    expiry = expiry_time(attributes)
    if expiry is not None and expiry <= now:
        raise EventExpired(f"{attributes['type']} {attributes['id']} expired at {expiry.isoformat()[:-6]}Z")
    return expiry


def read_json(attributes: Mapping[str, Any], data: Buffer, type: type[T]) -> T:
    """Decodes the JSON data of an event that has these attributes.

    Raises UnsupportedMediaType for another content type, and MalformedEvent, which names the path of the fault.
    """
    content_type = attributes.get("datacontenttype") or JSON_CONTENT_TYPE
    if not is_json(content_type):
        raise UnsupportedMediaType(f"{attributes['type']} wants {JSON_CONTENT_TYPE}, its data is {content_type}")
    try:
        return decode_json(data, type)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise MalformedEvent(f"the data of {attributes['type']}: {error}") from error


def decode_json(data: bytes | memoryview, type_: type[T]) -> T:
    """Decodes JSON into structs. Raises msgspec.DecodeError, UnicodeDecodeError and RecursionError.

    Decoders are made one at a time because of a bug in msgspec 0.22. It prepares a struct's fields when the struct is first
    decoded, and may run Python code meanwhile. Another thread that decodes the same struct would then read a half-filled table,
    and the process would end with SIGSEGV.
    """
    decoder = _decoders.get(type_)
    if decoder is None:
        with _making:
            decoder = _decoders.setdefault(type_, msgspec.json.Decoder(type_))
    decoded: T = decoder.decode(data)
    return decoded


def read_batch(attributes: Mapping[str, Any], data: Buffer) -> Batch:
    """Decodes the Batch of an event that has these attributes. The Batch holds views of `data`.

    Raises UnsupportedMediaType, MalformedEvent and EventTooLarge.
    """
    content_type = attributes.get("datacontenttype")
    if content_type != BATCH_CONTENT_TYPE:
        raise UnsupportedMediaType(f"{attributes['type']} wants {BATCH_CONTENT_TYPE}, its data is {content_type}")
    return decode_batch(data)


def reply_id_of(source: str, id: str) -> str:
    """Returns the id of the reply to the event with this source and id. It is the same at every delivery of the event."""
    return hashlib.sha256(cause_key(source, id)).hexdigest()[:32]


def media_type(content_type: str) -> str:
    """Returns the type and subtype of a Content-Type header, in lower case, without parameters (RFC 9110, section 8.3.1)."""
    return content_type.partition(";")[0].strip().lower()


def is_json(content_type: str) -> bool:
    return media_type(content_type).endswith(("/json", "+json"))


def cause_key(source: str, id: str) -> bytes:
    """Joins the source and the id of an event into one key, unique to the event (CloudEvents 1.0.2, section 3.1.1).

    The length of the source comes first, so that two different pairs never give the same bytes.
    """
    return f"{len(source)} {source} {id}".encode()


def _not_an_event(attributes: Mapping[str, str]) -> MalformedEvent:
    missing = [f"ce-{name}" for name in REQUIRED if not attributes.get(name)]
    if len(missing) == len(REQUIRED):
        return MalformedEvent("not a CloudEvent: neither ce- headers nor the content type application/cloudevents+json")
    if missing:
        return MalformedEvent(f"the header {', '.join(missing)} is missing or empty")
    return MalformedEvent(f"the attribute specversion is {attributes['specversion'][:40]!r}, served is 1.0")
