"""Requests to a gateway process by CloudEvents, answered whole or by a stream."""

import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException, HTTPResponse

import msgspec

from eventing.http.binding import to_binary_http
from eventing.wire.cloud_event import json_event
from eventing.wire.events import EventType
from eventing.wire.generation import GenerateRequest, GenerateResponse
from tests.support.functions.functions import FunctionProcess


class _Last(msgspec.Struct):
    """The last event of a stream."""

    type: str
    data: msgspec.Raw


class BrokenStream(Exception):
    """The stream ended before the answer."""


def tokens_of(url: str, prompt: str, max_tokens: int) -> list[int]:
    """Tokens of a greedy answer."""
    with urllib.request.urlopen(_asked(url, GenerateRequest(prompt=prompt, max_tokens=max_tokens)), timeout=120) as reply:
        return list(msgspec.json.decode(reply.read(), type=GenerateResponse).token_ids)


def _asked(url: str, request: GenerateRequest) -> urllib.request.Request:
    headers, pieces = to_binary_http(json_event(EventType.GENERATE_REQUEST, "tests", request))
    return urllib.request.Request(url, b"".join(pieces), headers)


@contextmanager
def began(gateway: FunctionProcess, request: GenerateRequest) -> Iterator[HTTPResponse]:
    """A stream whose first token has come."""
    asked = _asked(gateway.url, request)
    asked.add_header("accept", "text/event-stream")
    with urllib.request.urlopen(asked, timeout=120) as stream:
        while not (line := stream.readline()).startswith(b"data:"):
            assert line, "the stream ended before its first token"
        yield stream


def answer_of(stream: HTTPResponse) -> GenerateResponse:
    """The whole answer, from the stream's last event. Raises BrokenStream."""
    try:
        events = [line.removeprefix(b"data:") for line in stream if line.startswith(b"data:")]
    except (HTTPException, OSError) as error:
        raise BrokenStream from error
    last = msgspec.json.decode(events[-1], type=_Last) if events else None
    if last is None or last.type != EventType.GENERATE_RESPONSE:
        raise BrokenStream(events[-1:])
    return msgspec.json.decode(last.data, type=GenerateResponse)
