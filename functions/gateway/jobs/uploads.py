"""Reads a file out of a multipart/form-data body (RFC 7578) while it arrives."""

from collections.abc import Callable, Iterator
from typing import IO, Final, TypeVar

from werkzeug.exceptions import RequestEntityTooLarge
from werkzeug.http import parse_options_header
from werkzeug.sansio.multipart import Data, Epilogue, Event, Field, File, MultipartDecoder, NeedData

from eventing.problems import MalformedEvent

T = TypeVar("T")

_READ_BYTES: Final = 2**16
_MAX_FIELD_BYTES: Final = 2**12
_MAX_NAME_CHARACTERS: Final = 256
_MAX_PARTS: Final = 16


def read_upload(body: IO[bytes], content_type: str, take: Callable[[str, Iterator[bytes]], T]) -> tuple[dict[str, str], T]:
    """Returns the form's fields, and what `take` returned for its field `file`.

    take: called once, with the file's name and its content, piece by piece; what it does not read is skipped. Raises
    MalformedEvent for a body that is no such form, and what reading the body raises.
    """
    kind, options = parse_options_header(content_type)
    if kind != "multipart/form-data" or not options.get("boundary"):
        raise MalformedEvent(f"the content type is {kind[:80]!r}; send the file as multipart/form-data")
    events = _events(body, options["boundary"])
    fields: dict[str, str] = {}
    taken: list[T] = []
    for event in events:
        if isinstance(event, File) and event.name == "file" and not taken:
            content = _content(events)
            taken.append(take(event.filename[:_MAX_NAME_CHARACTERS], content))
            for _ in content:
                pass
        elif isinstance(event, Field):
            value = b""
            for piece in _content(events):
                value += piece
                if len(value) > _MAX_FIELD_BYTES:
                    raise MalformedEvent(f"the form's field {event.name[:80]!r} has more than {_MAX_FIELD_BYTES} bytes")
            fields[event.name] = value.decode("utf-8", "replace")
    if not taken:
        raise MalformedEvent("the form has no file; send one as the field `file`")
    return fields, taken[0]


def _content(events: Iterator[Event]) -> Iterator[bytes]:
    """The data of the field or file whose head was the last event."""
    for event in events:
        if not isinstance(event, Data):
            raise MalformedEvent("the form's parts do not follow each other")
        yield event.data
        if not event.more_data:
            return


def _events(body: IO[bytes], boundary: str) -> Iterator[Event]:
    decoder = MultipartDecoder(boundary.encode("latin-1", "replace"), max_parts=_MAX_PARTS)
    try:
        while True:
            event = decoder.next_event()
            if isinstance(event, NeedData):
                decoder.receive_data(body.read(_READ_BYTES) or None)
            elif isinstance(event, Epilogue):
                return
            else:
                yield event
    except (ValueError, RequestEntityTooLarge) as error:
        raise MalformedEvent(f"the body is no form of at most {_MAX_PARTS} parts ({error}); send it again") from error
