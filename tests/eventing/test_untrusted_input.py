"""Untrusted input: parsers raise only declared errors, and read each byte a bounded number of times."""

import contextlib
import re
import socket
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eventing.http import binding, sse
from eventing.http.binding import STRUCTURED_CONTENT_TYPE, from_http, to_binary_http
from eventing.http.delivery import BadReply, exchange
from eventing.http.sse import MAX_EVENT_BYTES, SSEDecoder
from eventing.problems import MalformedEvent, Problem, problem_from_document
from eventing.wire.batch_codec import decode_batch
from eventing.wire.cloud_event import batch_data, data_buffers, json_data, reply_id, reply_seed
from eventing.wire.control import ReleaseRequest, ReserveRequest
from eventing.wire.events import BATCH_CONTENT_TYPE, Attribute
from eventing.wire.framing import check_not_expired, expiry_time, integer_attribute
from eventing.wire.generation import GenerateRequest
from eventing.wire.score import ScoreRequest
from eventing.wire.signature import verify
from tests.support.functions.batches import batches, encoded, make_batch
from tests.support.steps import lines

MEMBERS = ["id", "source", "type", "specversion", "time", "subject", "data", "data_base64", "datacontenttype", "x"]
NAMES = st.sampled_from([*MEMBERS, *(each.value for each in Attribute)])
TIMES = ["0001-01-01T00:00:00+23:59", "9999-12-31T23:59:59-23:59", "2026-02-30T00:00:00Z"]
EDGES = st.sampled_from([*TIMES, "1.0", "", "1e10", "9" * 400, '"', "%", "%ff"])
TEXTS = EDGES | st.text(max_size=30)
TYPES = TEXTS | st.sampled_from(
    ["application/json", STRUCTURED_CONTENT_TYPE, BATCH_CONTENT_TYPE, "application/cloudevents-batch+json", "text/plain"]
)
HEADERS = st.dictionaries(NAMES.map("ce-{}".format) | st.sampled_from(["CE-Type", "x"]), TEXTS, max_size=8)
COMPLETE = {"ce-specversion": "1.0", "ce-id": "7", "ce-source": "/me", "ce-type": "t"}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=12,
)


def read_everything(headers: dict[str, str], body: bytes) -> None:
    """Runs every reader of gateways and stages by itself, so that all run even if one fails."""
    try:
        event = from_http(headers, body)
    except Problem:
        return
    data_types = (GenerateRequest, ScoreRequest, ReserveRequest, ReleaseRequest)
    readers: list[Callable[[], object]] = [
        *(partial(json_data, event, type_) for type_ in data_types),
        lambda: batch_data(event),
        lambda: integer_attribute(event.get_attributes(), Attribute.LAYER),
        lambda: expiry_time(event.get_attributes()),
        lambda: check_not_expired(event.get_attributes(), datetime.now(UTC)),
        lambda: verify(event, "token"),
        lambda: reply_id(event),
        lambda: reply_seed(event),
        lambda: data_buffers(event),
        lambda: to_binary_http(event),
    ]
    for read in readers:
        with contextlib.suppress(Problem):
            read()


@given(HEADERS, TYPES, st.binary(max_size=100))
def test_any_headers_and_body(headers: dict[str, str], content_type: str, body: bytes) -> None:
    read_everything(headers | {"content-type": content_type}, body)
    read_everything(COMPLETE | headers | {"content-type": content_type}, body)


@given(st.dictionaries(NAMES, JSON, max_size=6), JSON)
def test_any_structured_event(members: dict[str, Any], data: Any) -> None:
    event = {"specversion": "1.0", "id": "7", "source": "/me", "type": "t", "data": data} | members
    with contextlib.suppress(UnicodeEncodeError):
        read_everything({"content-type": STRUCTURED_CONTENT_TYPE}, msgspec.json.encode(event))


@pytest.mark.slow
@given(batches(), HEADERS, st.integers(0, 300), st.binary(max_size=8))
def test_any_damaged_batch(batch: Any, headers: dict[str, str], position: int, damage: bytes) -> None:
    body = encoded(batch)
    damaged = body[:position] + damage + body[position + len(damage) :]
    read_everything(COMPLETE | headers | {"content-type": BATCH_CONTENT_TYPE}, damaged)
    with contextlib.suppress(Problem):
        decode_batch(damaged)


@pytest.mark.parametrize("moment", TIMES)
def test_times_outside_of_the_calendar_are_refused(moment: str) -> None:
    with pytest.raises(MalformedEvent, match="expirytime"):
        expiry_time(from_http(COMPLETE | {"ce-expirytime": moment}, b"").get_attributes())


@pytest.mark.parametrize("name", ["data", "specversion", "id", "time", "layer", "data_base64", "datacontenttype"])
@pytest.mark.parametrize("depth", [*range(900, 1000, 7), 10_000])
def test_nesting_of_any_depth_in_any_member(name: str, depth: int) -> None:
    """Depths around the one at which the first reader gives up."""
    members = {"specversion": '"1.0"', "id": '"7"', "source": '"/me"', "type": '"t"'} | {name: "[" * depth + "]" * depth}
    body = "{" + ",".join(f'"{key}":{value}' for key, value in members.items()) + "}"
    read_everything({"content-type": STRUCTURED_CONTENT_TYPE}, body.encode())


@given(st.binary(max_size=200))
def test_any_problem_document(body: bytes) -> None:
    problem_from_document(body)


@given(st.lists(st.binary(max_size=20), max_size=8), st.booleans())
def test_any_reply(pieces: list[bytes], begins_well: bool) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall((b"HTTP/1.1 200 OK\r\n" if begins_well else b"") + b"".join(pieces))
        theirs.shutdown(socket.SHUT_WR)
        with contextlib.suppress(BadReply, OSError):
            exchange(ours, b"GET / HTTP/1.1\r\n\r\n", (), time.monotonic() + 60)


@given(st.lists(st.binary(max_size=20) | st.sampled_from([b"data", b":", b"\n\n", b"\r", b"id: \0", b"\xef\xbb\xbf"])))
def test_any_stream_of_events(chunks: list[bytes]) -> None:
    whole, cut = SSEDecoder(), SSEDecoder()
    assert whole.feed(b"".join(chunks)) == [event for chunk in chunks for event in cut.feed(chunk)]


def test_the_work_for_a_batch_grows_with_its_rows() -> None:
    counted = []
    for count in (200, 400):
        body = encoded(make_batch([1] * count))
        counted.append(lines(lambda body=body: decode_batch(body)))  # type: ignore[misc]
    assert counted[1] < 2.2 * counted[0]
    assert lines(lambda: decode_batch(encoded(make_batch([1])) + bytes(2**20)), expect=Problem) < counted[1]


@pytest.mark.parametrize("structured", [False, True])
def test_the_work_for_an_event_grows_with_its_attributes(structured: bool) -> None:
    """The SDK's part of it, too."""
    counted = []
    for count in (100, 200):
        extensions = {f"x{number}": "1" for number in range(count)}
        headers, body = {f"ce-{name}": value for name, value in extensions.items()} | COMPLETE, b"{}"
        if structured:
            attributes = {name.removeprefix("ce-"): value for name, value in COMPLETE.items()}
            headers, body = {"content-type": STRUCTURED_CONTENT_TYPE}, msgspec.json.encode(attributes | extensions)
        counted.append(lines(lambda headers=headers, body=body: from_http(headers, body)))  # type: ignore[misc]
    assert counted[0] > 100
    assert counted[1] < 2.2 * counted[0]


class CountingName(str):
    """Counts how often it is compared."""

    compared = 0
    __hash__ = str.__hash__

    def __eq__(self, other: object) -> bool:
        CountingName.compared += 1
        return str.__eq__(self, other)


def test_a_repeated_member_is_found_in_linear_time() -> None:
    names = [CountingName(number) for number in range(4000)]
    CountingName.compared = 0
    with pytest.raises(ValueError, match="'3999' is there twice"):
        binding._without_repetition([(name, 1) for name in [*names, CountingName(3999)]])
    assert CountingName.compared < 4 * len(names)


class CountingLineEnd:
    """Counts the bytes that are searched for the ends of lines."""

    def __init__(self) -> None:
        self.searched = 0
        self._pattern = re.compile(rb"\r\n|\n|\r")

    def split(self, data: bytes) -> list[bytes]:
        self.searched += len(data)
        return self._pattern.split(data)


def test_a_line_that_never_ends_is_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    counting = CountingLineEnd()
    monkeypatch.setattr(sse, "_LINE_END", counting)
    decoder = SSEDecoder()
    for _ in range(5000):
        assert decoder.feed(b"data: 1") == []
    assert counting.searched == 5000 * len(b"data: 1")


def test_an_event_of_any_length_is_bounded() -> None:
    decoder = SSEDecoder()
    for _ in range(MAX_EVENT_BYTES // 2**20 - 1):
        assert decoder.feed(b"data: " + bytes(2**20) + b"\n") == []
    with pytest.raises(MalformedEvent, match="more than"):
        decoder.feed(bytes(2**20))
