"""Building CloudEvents and reading them: attributes by name, data as a typed value.

The data of an event is bytes in memory too (one buffer, or several that belong together), never a parsed object, so that
an event can be passed on byte for byte; attributes are strings, but for `time`. Nothing here knows HTTP.
"""

import hashlib
import re
import uuid
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Annotated, Any, Final, TypeVar, cast

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
ZonedTime = Annotated[datetime, msgspec.Meta(tz=True)]
T = TypeVar("T")

_NAME: Final = re.compile(rf"[a-z0-9]{{1,{MAX_NAME_LENGTH}}}")
_FORBIDDEN: Final = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff\ufffd]")
"""What no attribute may contain (CloudEvents 1.0.2, section 3.1), and U+FFFD, which stands for bytes that were not UTF-8."""


def make_event(
    type: str,
    source: str,
    data: Data = None,
    content_type: str = JSON_CONTENT_TYPE,
    *,
    id: str | None = None,
    **extensions: AttributeValue,
) -> CloudEvent:
    """An event of this moment, with a fresh id unless one is given. Extensions that are None are left out."""
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
    """An event with `batch` as its data, in pieces that are views of the batch's own memory."""
    return make_event(type, source, encode_batch(batch), BATCH_CONTENT_TYPE, id=id, **extensions)


def checked_event(attributes: dict[str, Any], data: Any) -> CloudEvent:
    """An event that owns `attributes`; `data` is Data. Raises MalformedEvent, which names the attribute."""
    for name, value in attributes.items():
        if not _NAME.fullmatch(name):
            raise MalformedEvent(f"attribute {name[:40]!r}: names are 1 to {MAX_NAME_LENGTH} characters of a-z and 0-9")
        if isinstance(value, str) and (len(value) > MAX_VALUE_LENGTH or _FORBIDDEN.search(value)):
            raise MalformedEvent(_bad_value(name, value))
    has_time = "time" in attributes
    try:
        event = CloudEvent(attributes, data)
    except BaseCloudEventException as error:
        raise MalformedEvent(str(error)) from error
    if not has_time:  # The SDK has written the present into it, which the sender did not say.
        del attributes["time"]
    return event


def attribute_text(value: AttributeValue) -> str | None:
    """The canonical string of a value (CloudEvents 1.0.2, section 3.1); None stays None: the attribute is not set."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, datetime):
        return value.astimezone(UTC).isoformat().replace("+00:00", "Z")
    return None if value is None else str(value)


def json_data(event: CloudEvent, type: type[T]) -> T:
    """The event's JSON data. Raises UnsupportedMediaType where it is not JSON, MalformedEvent with the path of the error."""
    content_type = event.get_datacontenttype() or JSON_CONTENT_TYPE
    if not is_json(content_type):
        raise UnsupportedMediaType(f"{event.get_type()} wants {JSON_CONTENT_TYPE}, its data is {content_type}")
    try:
        return decode_json(_one_piece(event), type)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise MalformedEvent(f"the data of {event.get_type()}: {error}") from error


def batch_data(event: CloudEvent) -> Batch:
    """The Batch, a view of the event's data. Raises UnsupportedMediaType, MalformedEvent and EventTooLarge."""
    content_type = event.get_datacontenttype()
    if content_type != BATCH_CONTENT_TYPE:
        raise UnsupportedMediaType(f"{event.get_type()} wants {BATCH_CONTENT_TYPE}, its data is {content_type}")
    return decode_batch(_one_piece(event))


def data_buffers(event: CloudEvent) -> list[Buffer]:
    """The event's data as the buffers it is made of; none where there is no data."""
    data = cast("Data", event.get_data())
    if data is None:
        return []
    return [data] if isinstance(data, bytes | bytearray | memoryview) else list(data)


def required_attribute(event: CloudEvent, name: str) -> str:
    """Raises MalformedEvent where the attribute is not there."""
    value = event.get_extension(name)
    if value is None:
        raise MalformedEvent(f"{event.get_type()}: the attribute {name} is missing")
    return str(value)


def integer_attribute(event: CloudEvent, name: str) -> int:
    """A required attribute of digits. Raises MalformedEvent."""
    value = required_attribute(event, name)
    if not (value.isascii() and value.isdigit() and len(value) <= 10):
        raise MalformedEvent(f"{event.get_type()}: the attribute {name} is {value!r}, not a number")
    return int(value)


def expiry_time(event: CloudEvent) -> datetime | None:
    """When nobody awaits the answer any more; None: never. Raises MalformedEvent."""
    value = event.get_extension(Attribute.EXPIRY_TIME)
    if value is None:
        return None
    try:
        return msgspec.convert(value, ZonedTime).astimezone(UTC)
    except (msgspec.ValidationError, OverflowError) as error:  # OverflowError: before the year 1 or behind 9999 in UTC.
        raise MalformedEvent(f"the attribute {Attribute.EXPIRY_TIME} is {value!r}: {error}") from error


def check_not_expired(event: CloudEvent, now: datetime) -> None:
    """Raises EventExpired; `now` knows its time zone."""
    expiry = expiry_time(event)
    if expiry is not None and expiry <= now:
        raise EventExpired(f"{event.get_type()} {event.get_id()} expired at {attribute_text(expiry)}")


def reply_id(cause: CloudEvent) -> str:
    """The id of the one reply to `cause`: the same for every delivery of it, so that a sink can drop repetitions."""
    return _cause_digest(cause).hexdigest()[:32]


def reply_seed(cause: CloudEvent) -> int:
    """A seed for a request that names none: the same for every delivery, so that every delivery has the same answer."""
    return int.from_bytes(_cause_digest(cause).digest()[:8]) >> 1


def is_json(content_type: str) -> bool:
    media_type = content_type.partition(";")[0].strip().lower()
    return media_type.endswith(("/json", "+json"))


def _cause_digest(cause: CloudEvent) -> "hashlib._Hash":
    """Of source and id, which together are unique (CloudEvents 1.0.2, section 3.1.1); the length keeps them apart."""
    source, id_ = cause.get_source(), cause.get_id()
    return hashlib.sha256(f"{len(source)} {source} {id_}".encode())


def _one_piece(event: CloudEvent) -> Buffer:
    buffers = data_buffers(event)
    return buffers[0] if len(buffers) == 1 else b"".join(buffers)


def _bad_value(name: str, value: str) -> str:
    if len(value) > MAX_VALUE_LENGTH:
        return f"attribute {name} has {len(value)} characters, the most is {MAX_VALUE_LENGTH}"
    return f"attribute {name} contains a control character or is not UTF-8: {value[:40]!r}"
