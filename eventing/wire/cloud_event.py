"""Makes CloudEvents and reads their attributes and data. Nothing here knows HTTP.

An event's data stays bytes (one buffer, or several in their order), so that an event can be passed on byte for byte. Attributes
are strings, except for `time`.
"""

import hashlib
import re
import uuid
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Final, TypeVar, cast

import msgspec
from cloudevents.core.exceptions import BaseCloudEventException
from cloudevents.core.v1.event import CloudEvent

from eventing.problems import EventExpired, MalformedEvent, UnsupportedMediaType
from eventing.wire.batch_codec import decode_batch, encode_batch
from eventing.wire.events import BATCH_CONTENT_TYPE, Attribute, Batch
from eventing.wire.typed_json import decode_json

JSON_CONTENT_TYPE: Final = "application/json"
MAX_NAME_LENGTH: Final = 20
MAX_VALUE_LENGTH: Final = 4096

Buffer = bytes | memoryview
Data = Buffer | Sequence[Buffer] | None
AttributeValue = str | int | bool | datetime | None
T = TypeVar("T")

NAME: Final = re.compile(rf"[a-z0-9]{{1,{MAX_NAME_LENGTH}}}")
# What no attribute may contain (CloudEvents 1.0.2, section 3.1), and U+FFFD, which stands for bytes that were not UTF-8.
FORBIDDEN: Final = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff\ufffd]")


def make_event(
    type: str,
    source: str,
    data: Data = None,
    content_type: str = JSON_CONTENT_TYPE,
    *,
    id: str | None = None,
    **extensions: AttributeValue,
) -> CloudEvent:
    """An event with the present time, and with a fresh id unless one is given. Extensions that are None are left out."""
    attributes: dict[str, Any] = {
        name: text for name, value in extensions.items() if (text := attribute_text(value)) is not None
    }
    attributes |= {"specversion": "1.0", "id": id or str(uuid.uuid4()), "source": str(source), "type": str(type)}
    attributes["time"] = datetime.now(UTC)
    if data is not None:
        attributes["datacontenttype"] = content_type
    return checked_event(attributes, data)


def json_event(
    type: str, source: str, value: msgspec.Struct, *, id: str | None = None, **extensions: AttributeValue
) -> CloudEvent:
    """An event with `value` as JSON."""
    return make_event(type, source, msgspec.json.encode(value), JSON_CONTENT_TYPE, id=id, **extensions)


def batch_event(type: str, source: str, batch: Batch, *, id: str | None = None, **extensions: AttributeValue) -> CloudEvent:
    """An event whose data are views of the batch's own memory."""
    return make_event(type, source, encode_batch(batch), BATCH_CONTENT_TYPE, id=id, **extensions)


def checked_event(attributes: dict[str, Any], data: Any) -> CloudEvent:
    """An event that owns `attributes`; `data` is Data. Raises MalformedEvent, which names the attribute."""
    for name, value in attributes.items():
        if not NAME.fullmatch(name) or (isinstance(value, str) and (len(value) > MAX_VALUE_LENGTH or FORBIDDEN.search(value))):
            raise bad_attribute(name, value)
    has_time = "time" in attributes
    try:
        event = CloudEvent(attributes, data)
    except BaseCloudEventException as error:
        raise MalformedEvent(str(error)) from error
    if not has_time:  # the SDK has written the present into it, which the sender did not say
        del attributes["time"]
    return event


def event_of(attributes: Mapping[str, Any], data: Data) -> CloudEvent:
    """An event whose attributes were read as text. Raises MalformedEvent, which names the attribute."""
    given = dict(attributes)
    if isinstance(given.get("time"), str):
        given["time"] = zoned_time("time", given["time"])
    return checked_event(given, data)


def bad_attribute(name: str, value: str) -> MalformedEvent:
    """What is wrong with an attribute whose name or value is not allowed."""
    if not NAME.fullmatch(name):
        return MalformedEvent(f"attribute {name[:40]!r}: names are 1 to {MAX_NAME_LENGTH} characters of a-z and 0-9")
    if len(value) > MAX_VALUE_LENGTH:
        return MalformedEvent(f"attribute {name} has {len(value)} characters, the most is {MAX_VALUE_LENGTH}")
    return MalformedEvent(f"attribute {name} contains a control character or is not UTF-8: {value[:40]!r}")


def attribute_text(value: AttributeValue) -> str | None:
    """The canonical string of a value (CloudEvents 1.0.2, section 3.1); None for None: the attribute is not set."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, datetime):
        return value.astimezone(UTC).isoformat().replace("+00:00", "Z")
    return None if value is None else str(value)


def json_data(event: CloudEvent, type: type[T]) -> T:
    """The event's JSON data. Raises as `read_json` does."""
    return read_json(event.get_attributes(), one_piece(event), type)


def read_json(attributes: Mapping[str, Any], data: Buffer, type: type[T]) -> T:
    """Data of an event with these attributes. Raises UnsupportedMediaType, or MalformedEvent with the path of the error."""
    content_type = attributes.get("datacontenttype") or JSON_CONTENT_TYPE
    if not is_json(content_type):
        raise UnsupportedMediaType(f"{attributes['type']} wants {JSON_CONTENT_TYPE}, its data is {content_type}")
    try:
        return decode_json(data, type)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise MalformedEvent(f"the data of {attributes['type']}: {error}") from error


def batch_data(event: CloudEvent) -> Batch:
    """The event's Batch, a view of its data. Raises as `read_batch` does."""
    return read_batch(event.get_attributes(), one_piece(event))


def read_batch(attributes: Mapping[str, Any], data: Buffer) -> Batch:
    """Data of an event with these attributes, as a view. Raises UnsupportedMediaType, MalformedEvent and EventTooLarge."""
    content_type = attributes.get("datacontenttype")
    if content_type != BATCH_CONTENT_TYPE:
        raise UnsupportedMediaType(f"{attributes['type']} wants {BATCH_CONTENT_TYPE}, its data is {content_type}")
    return decode_batch(data)


def data_buffers(event: CloudEvent) -> list[Buffer]:
    """The buffers of the event's data; an empty list if it has none."""
    data = cast("Data", event.get_data())
    if data is None:
        return []
    return [data] if isinstance(data, bytes | bytearray | memoryview) else list(data)


def required_attribute(attributes: Mapping[str, Any], name: str) -> str:
    """Raises MalformedEvent if the attribute is missing."""
    value = attributes.get(name)
    if value is None:
        raise MalformedEvent(f"{attributes['type']}: the attribute {name} is missing")
    return str(value)


def integer_attribute(attributes: Mapping[str, Any], name: str) -> int:
    """A required attribute of digits. Raises MalformedEvent."""
    value = required_attribute(attributes, name)
    if not (value.isascii() and value.isdigit() and len(value) <= 10):
        raise MalformedEvent(f"{attributes['type']}: the attribute {name} is {value!r}, not a number")
    return int(value)


def zoned_time(name: str, text: str) -> datetime:
    """The value of a time attribute: RFC 3339, and other forms of ISO 8601 as the SDK reads them. Raises MalformedEvent."""
    try:
        moment = datetime.fromisoformat(text.replace("z", "Z"))
    except ValueError as error:
        raise MalformedEvent(f"the attribute {name} is {text!r}: {error}") from error
    if moment.tzinfo is None:
        raise MalformedEvent(f"the attribute {name} is {text!r}, a time without a timezone")
    return moment


def expiry_time(attributes: Mapping[str, Any]) -> datetime | None:
    """The time after which the answer is no longer awaited, in UTC; None: never. Raises MalformedEvent."""
    value = attributes.get(Attribute.EXPIRY_TIME)
    if value is None:
        return None
    try:
        return zoned_time(Attribute.EXPIRY_TIME, value).astimezone(UTC)
    except OverflowError as error:  # before the year 1 or after 9999 in UTC
        raise MalformedEvent(f"the attribute {Attribute.EXPIRY_TIME} is {value!r}: {error}") from error


def check_not_expired(attributes: Mapping[str, Any], now: datetime) -> datetime | None:
    """Returns `expiry_time`. Raises EventExpired if that is over. now: with a time zone."""
    expiry = expiry_time(attributes)
    if expiry is not None and expiry <= now:
        raise EventExpired(f"{attributes['type']} {attributes['id']} expired at {attribute_text(expiry)}")
    return expiry


def reply_id(cause: CloudEvent) -> str:
    """The id of the reply to `cause`: the same for every delivery of it, so that a sink can drop repetitions."""
    return reply_id_of(cause.get_source(), cause.get_id())


def reply_id_of(source: str, id: str) -> str:
    """The id of the reply to the event with this source and id."""
    return hashlib.sha256(_cause(source, id)).hexdigest()[:32]


def reply_seed(cause: CloudEvent) -> int:
    """The seed of a request that names none: the same for every delivery, so that every delivery has the same answer."""
    return int.from_bytes(hashlib.sha256(_cause(cause.get_source(), cause.get_id())).digest()[:8]) >> 1


def is_json(content_type: str) -> bool:
    media_type = content_type.partition(";")[0].strip().lower()
    return media_type.endswith(("/json", "+json"))


def _cause(source: str, id: str) -> bytes:
    """Source and id, unique together (CloudEvents 1.0.2, section 3.1.1). The length separates them unambiguously."""
    return f"{len(source)} {source} {id}".encode()


def one_piece(event: CloudEvent) -> Buffer:
    """The event's data as one buffer; empty if there is no data."""
    buffers = data_buffers(event)
    return buffers[0] if len(buffers) == 1 else b"".join(buffers)
