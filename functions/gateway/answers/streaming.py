"""Makes replies over WSGI: a stream of server-sent events, or one document after the last token."""

import logging
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from itertools import chain
from typing import Any, Final, TypeVar

from flask import Response, request

from eventing.http.sse import COMMENT, EVENT_STREAM_CONTENT_TYPE
from eventing.problems import Problem
from eventing.wire.generation import ProgressEvent, TokenEvent
from functions.gateway.answers.deduplication import Listener
from functions.gateway.answers.generation import ClientLeft, Generation
from functions.gateway.answers.service import RequestContext
from functions.hosting.requests import ARRIVED, CLIENT_GONE
from functions.observing.tracing import read_traceparent

_log: Final = logging.getLogger(__name__)
STREAM_HEADERS: Final = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # keeps proxies from buffering tokens
CLIENT_CLOSED_REQUEST: Final = 499  # nginx's status; no client reads it

T = TypeVar("T")
Answering = Generation | Listener[Any]  # an answer on its way


def stream_response(
    source: Answering, events: Iterator[bytes | None], failure: Callable[[Problem], bytes], keep_alive_seconds: float
) -> Response:
    """Waits for the first event, then returns a reply that streams `events`.

    Raises a Problem that comes before the first event. Nothing is sent until then, so that an answer that fails early gets the
    status of its Problem. Also, Go's ReverseProxy closes the connection if a reply begins before the proxy has sent the whole
    request.

    `source` is closed when the reply ends or the client leaves. A None among `events` says that there is nothing to send yet.
    `failure` encodes a Problem that comes later, as the last event. After `keep_alive_seconds` of silence a comment is sent,
    which may also be the first event. If it is 0, no comment is sent.
    """
    sent = with_comments(events, keep_alive_seconds)
    try:
        first = next(sent)
    except ClientLeft:
        return Response(status=CLIENT_CLOSED_REQUEST)
    guarded = _guarded(source, chain((first,), sent), failure)
    response = Response(guarded, content_type=EVENT_STREAM_CONTENT_TYPE, headers=STREAM_HEADERS)
    response.call_on_close(source.close)
    return response


def with_comments(events: Iterator[bytes | None], keep_alive_seconds: float) -> Iterator[bytes]:
    """Yields the events that are not None, and a comment after `keep_alive_seconds` of silence, or never if that is 0.

    A None among `events` says that there is nothing to send yet.
    """
    sent_at = time.monotonic()
    for event in events:
        if event is not None:
            yield event
        elif keep_alive_seconds and time.monotonic() - sent_at >= keep_alive_seconds:
            yield COMMENT
        else:
            continue
        sent_at = time.monotonic()


def whole_response(items: Iterator[T | None], reply: Callable[[T], Response]) -> Response:
    """Waits for the last of an answer's items and returns `reply` of that item.

    Raises the Problem that ended the answer early.
    """
    try:
        return reply(last_of(items))
    except ClientLeft:
        return Response(status=CLIENT_CLOSED_REQUEST)


def last_of(items: Iterator[T | None]) -> T:
    """Reads all of an answer's items and returns the last."""
    last = deque(items, maxlen=1).pop()
    assert last is not None
    return last


def begun(
    events: Iterator[TokenEvent | ProgressEvent | None],
) -> Generator[None, None, Iterator[TokenEvent | ProgressEvent | None]]:
    """Yields None until the first token or progress has come. Returns an iterator that begins with that item."""
    for event in events:
        if event is not None:
            return chain((event,), events)
        yield None
    return iter(())


def request_context(
    request_id: str, client_id: str, seed: int, deadline_seconds: float, gone: Callable[[], bool] | None = None
) -> RequestContext:
    """Makes the context of the current Flask request.

    `gone` tells whether the client has left. If it is None, the server tells that, if it can know.
    """
    return RequestContext(
        request_id=request_id,
        client_id=client_id,
        seed=seed,
        deadline_seconds=deadline_seconds,
        arrived=arrival_time(),
        gone=gone or client_gone(),
        trace=read_traceparent(request.headers.get("traceparent")),
    )


def arrival_time() -> float:
    """Returns when the server received the current request, in time.monotonic()."""
    arrived: float = request.environ.get(ARRIVED) or time.monotonic()
    return arrived


def client_gone() -> Callable[[], bool]:
    """Returns a function that tells whether the client of the current request has left.

    The function always returns False if the server cannot know.
    """
    gone: Callable[[], bool] = request.environ.get(CLIENT_GONE, lambda: False)
    return gone


def _guarded(source: Answering, events: Iterator[bytes], failure: Callable[[Problem], bytes]) -> Iterator[bytes]:
    try:
        yield from events
    except Problem as problem:
        yield failure(problem)
    except ClientLeft:
        return
    except Exception:  # noqa: BLE001 - logged, and the client is told
        _log.exception("the answer to %s broke off", source.request_id)
        yield failure(Problem("the gateway failed; its log has the traceback"))
