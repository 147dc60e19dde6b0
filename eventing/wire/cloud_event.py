"""Makes CloudEvents and reads their attributes and data. Nothing here knows HTTP.

An event's data stays bytes (one buffer, or several in their order), so that an event can be passed on byte for byte. Attributes
are strings, except for `time`.
"""

import hashlib
import uuid
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, TypeVar, cast

import msgspec
from cloudevents.core.exceptions import BaseCloudEventException
from cloudevents.core.v1.event import CloudEvent

from eventing.problems import MalformedEvent
from eventing.wire.batch_codec import encode_batch
from eventing.wire.events import BATCH_CONTENT_TYPE, Batch
from eventing.wire.framing import (
    JSON_CONTENT_TYPE,
    Buffer,
    cause_key,
    check_attribute,
    read_batch,
    read_json,
    reply_id_of,
    zoned_time,
)

Data = Buffer | Sequence[Buffer] | None
AttributeValue = str | int | bool | datetime | None
T = TypeVar("T")


def make_event(
    type: str,
    source: str,
    data: Data = None,
    content_type: str = JSON_CONTENT_TYPE,
    *,
    id: str | None = None,
    **extensions: AttributeValue,
) -> CloudEvent:
    """Makes an event with the present time. If `id` is None, the event gets a fresh id.

    Extensions that are None are left out.
    """
    attributes: dict[str, Any] = {
        name: text for name, value in extensions.items() if (text := attribute_text(value)) is not None
    }
    attributes |= {"specversion": "1.0", "id": id or str(uuid.uuid4()), "source": str(source), "type": str(type)}
    attributes["time"] = datetime.now(UTC)
    if data is not None:
        attributes["datacontenttype"] = content_type
    return checked_event(attributes, data)


def json_event(
    type: str, source: str, value: msgspec.Struct | dict[str, Any], *, id: str | None = None, **extensions: AttributeValue
) -> CloudEvent:
    """Makes an event whose data is `value` as JSON. If `id` is None, the event gets a fresh id."""
    return make_event(type, source, msgspec.json.encode(value), JSON_CONTENT_TYPE, id=id, **extensions)


def batch_event(type: str, source: str, batch: Batch, *, id: str | None = None, **extensions: AttributeValue) -> CloudEvent:
    """Makes an event with a Batch as its data. Token ids and tensor are views of the batch's own memory."""
    return make_event(type, source, encode_batch(batch), BATCH_CONTENT_TYPE, id=id, **extensions)


def checked_event(attributes: dict[str, Any], data: Any) -> CloudEvent:
    """Checks the attributes and makes an event with them.

    The event keeps the dict `attributes`, so the caller must not change it. `data` is of type Data. Raises MalformedEvent,
    which names the attribute.
    """
    for name, value in attributes.items():
        check_attribute(name, value if isinstance(value, str) else "")
    has_time = "time" in attributes
    try:
        event = CloudEvent(attributes, data)
    except BaseCloudEventException as error:
        raise MalformedEvent(str(error)) from error
    if not has_time:  # the SDK has written the present into it, which the sender did not say
        del attributes["time"]
    return event


def event_of(attributes: Mapping[str, Any], data: Data) -> CloudEvent:
    """Makes an event from attributes that are all text, as `framing.read_attributes` returns them.

    Raises MalformedEvent, which names the attribute.
    """
    given = dict(attributes)
    if isinstance(given.get("time"), str):
        given["time"] = zoned_time("time", given["time"])
    return checked_event(given, data)


def attribute_text(value: AttributeValue) -> str | None:
    """Returns the string that an attribute's value has on the wire (CloudEvents 1.0.2, section 3.1).

    If the value is None, returns None: the attribute is not sent.
    """
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, datetime):
        return value.astimezone(UTC).isoformat().replace("+00:00", "Z")
    return None if value is None else str(value)


def json_data(event: CloudEvent, type: type[T]) -> T:
    """Decodes the event's JSON data. Raises the errors of `read_json`."""
    return read_json(event.get_attributes(), one_piece(event), type)


def batch_data(event: CloudEvent) -> Batch:
    """Decodes the event's Batch, which is a view of the event's data. Raises the errors of `read_batch`."""
    return read_batch(event.get_attributes(), one_piece(event))


def data_buffers(event: CloudEvent) -> list[Buffer]:
    """Returns the buffers of the event's data; an empty list if there is no data."""
    data = cast("Data", event.get_data())
    if data is None:
        return []
    return [data] if isinstance(data, bytes | bytearray | memoryview) else list(data)


def reply_id(cause: CloudEvent) -> str:
    """Returns the id of the reply to `cause`. It is the same for every delivery, so that a sink can drop repetitions."""
    return reply_id_of(cause.get_source(), cause.get_id())


def reply_seed(cause: CloudEvent) -> int:
    """Returns the seed for a request that names none. It is the same for every delivery, and so is the answer."""
    return int.from_bytes(hashlib.sha256(cause_key(cause.get_source(), cause.get_id())).digest()[:8]) >> 1


def one_piece(event: CloudEvent) -> Buffer:
    """Returns the event's data as one buffer, which is empty if there is no data."""
    buffers = data_buffers(event)
    return buffers[0] if len(buffers) == 1 else b"".join(buffers)
