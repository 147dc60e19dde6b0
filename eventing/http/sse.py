"""Encodes and decodes server-sent events (WHATWG HTML, section 9.2), the format of token streams."""

import re
from collections.abc import Iterator
from typing import Final

from msgspec import Struct

from eventing.problems import MalformedEvent

MAX_EVENT_BYTES: Final = 2**24  # longest event that is read, with its comments
EVENT_STREAM_CONTENT_TYPE: Final = "text/event-stream"
COMMENT: Final = b":\n\n"  # a comment: readers ignore it, and proxies see that the stream is alive

_LINE_END: Final = re.compile(rb"\r\n|\n|\r")
_BYTE_ORDER_MARK: Final = b"\xef\xbb\xbf"


class ServerSentEvent(Struct, frozen=True):
    """One event of a stream, as the decoder returns it. Ids are not read, because no stream of Lamina can be resumed."""

    data: str
    event: str = "message"


def encode_sse(data: str | bytes, *, event: str = "") -> bytes:
    """Encodes one event. `data` is UTF-8 text of one or more lines. Raises ValueError if `event` contains a line break."""
    if re.search("[\r\n\0]", event):
        raise ValueError(f"event {event!r} must be one line")
    lines = [b"data: " + line for line in _LINE_END.split(data.encode() if isinstance(data, str) else data)]
    return b"\n".join([*([b"event: " + event.encode()] if event else []), *lines, b"", b""])


class SSEDecoder:
    """Decodes a stream that arrives in chunks of any size. Drops comments, and an incomplete event at the stream's end.

    Raises MalformedEvent for an event of more than MAX_EVENT_BYTES.
    """

    def __init__(self) -> None:
        self._rest: list[bytes] = []  # pieces of a line whose end has not arrived
        self._held_bytes = 0  # size of that line and of the event so far
        self._after_carriage_return = False
        self._at_start = True
        self._event = ""
        self._data: list[str] = []

    def feed(self, chunk: bytes) -> list[ServerSentEvent]:
        """Takes the next bytes of the stream and returns the events that they complete."""
        events = []
        for line in self._lines(chunk):
            event = self._take_line(line)
            if event is not None:
                events.append(event)
        return events

    def _lines(self, chunk: bytes) -> Iterator[bytes]:
        if not chunk:
            return
        ends_in_carriage_return = chunk.endswith(b"\r")
        if self._after_carriage_return:  # the carriage return has ended the line; this is the rest of its end
            chunk = chunk.removeprefix(b"\n")
        self._after_carriage_return = ends_in_carriage_return
        first, *others = _LINE_END.split(chunk)
        self._hold(first)
        for part in others:
            yield b"".join(self._rest)
            self._rest.clear()
            self._hold(part)

    def _hold(self, part: bytes) -> None:
        self._rest.append(part)
        self._held_bytes += len(part)
        if self._held_bytes > MAX_EVENT_BYTES:
            raise MalformedEvent(f"a server-sent event has more than {MAX_EVENT_BYTES} bytes")

    def _take_line(self, line: bytes) -> ServerSentEvent | None:
        if self._at_start:
            line, self._at_start = line.removeprefix(_BYTE_ORDER_MARK), False
        if not line:
            return self._dispatch()
        name, _, raw = line.partition(b":")
        value = raw.removeprefix(b" ").decode("utf-8", "replace")
        if name == b"data":
            self._data.append(value)
        elif name == b"event":
            self._event = value
        return None

    def _dispatch(self) -> ServerSentEvent | None:
        data, event = self._data, self._event
        self._data, self._event, self._held_bytes = [], "", 0
        return ServerSentEvent("\n".join(data), event or "message") if data else None
