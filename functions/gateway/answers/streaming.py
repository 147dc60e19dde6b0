"""Replies over WSGI: server-sent events, or one document after the last token."""

import logging
import time
from collections.abc import Callable, Generator, Iterator
from itertools import chain
from typing import Any, Final

from flask import Response, request

from eventing.http.sse import EVENT_STREAM_CONTENT_TYPE, HEARTBEAT
from eventing.problems import Problem
from eventing.wire.generation import ProgressEvent, TokenEvent
from functions.gateway.answers.deduplication import Listener
from functions.gateway.answers.generation import ClientLeft, Generation
from functions.hosting.requests import ARRIVED, CLIENT_GONE

_log: Final = logging.getLogger(__name__)
STREAM_HEADERS: Final = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # keeps proxies from buffering tokens
CLIENT_CLOSED_REQUEST: Final = 499  # nginx's status; no client reads it


Answering = Generation | Listener[Any]  # an answer on its way


def stream_response(source: Answering, events: Iterator[bytes], failure: Callable[[Problem], bytes]) -> Response:
    """Waits for the first event, then returns a reply that streams `events`. Raises a Problem that comes before it.

    failure: encodes a Problem that comes later, as the last event. source: closed when the reply ends or the client leaves.
    The first event is a token, or a sign of life after some silence. Nothing is sent before it, so that an answer that fails
    early gets the status of its Problem. Also, a proxy may treat a reply as an error if it begins before the proxy has sent
    the request's last byte: Go's ReverseProxy then closes the connection.
    """
    try:
        first = next(events)
    except ClientLeft:
        return Response(status=CLIENT_CLOSED_REQUEST)
    guarded = _guarded(source, chain((first,), events), failure)
    response = Response(guarded, content_type=EVENT_STREAM_CONTENT_TYPE, headers=STREAM_HEADERS)
    response.call_on_close(source.close)
    return response


def whole_response(tokens: Iterator[object], finished: Callable[[], Response]) -> Response:
    """Iterates `tokens` to the end, then returns `finished()`. Raises the Problem that ended the answer early."""
    try:
        for _ in tokens:
            pass
    except ClientLeft:
        return Response(status=CLIENT_CLOSED_REQUEST)
    return finished()


def after_comments(
    events: Iterator[TokenEvent | ProgressEvent | None],
) -> Generator[bytes, None, Iterator[TokenEvent | ProgressEvent | None]]:
    """Yields comments until the first token or progress has come, and returns an iterator that begins with it."""
    for event in events:
        if event is not None:
            return chain((event,), events)
        yield HEARTBEAT
    return iter(())


def arrival_time() -> float:
    """When the server received the current request, in time.monotonic()."""
    arrived: float = request.environ.get(ARRIVED) or time.monotonic()
    return arrived


def client_gone() -> Callable[[], bool]:
    """A function that tells whether the client of the current request has left; always False if the server cannot know."""
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
