"""Answers as server-sent events over WSGI, whichever door they leave by."""

import logging
import time
from collections.abc import Callable, Iterator
from itertools import chain, dropwhile
from typing import Final, Protocol

from flask import Response, request

from eventing.http.sse import EVENT_STREAM_CONTENT_TYPE
from eventing.problems import Problem
from eventing.wire.generation import TokenEvent
from functions.gateway.answers.generation import ClientLeft
from functions.hosting.environ import ARRIVED, CLIENT_GONE

_log: Final = logging.getLogger(__name__)
STREAM_HEADERS: Final = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
"""So that no proxy keeps tokens back."""
CLIENT_CLOSED_REQUEST: Final = 499
"""nginx's; nobody reads it."""


class Spoken(Protocol):
    """A Generation, or what one delivery hears of it."""

    request_id: str

    def tokens(self) -> Iterator[TokenEvent | None]: ...

    def close(self) -> None: ...


def stream_response(answer: Spoken, events: Iterator[bytes], failure: Callable[[Problem], bytes]) -> Response:
    """Sends `events`, once there is a first. Until then nothing goes out, so that what fails has a status of its own: raises
    the Problem that ended the answer. Where they break off later, `failure` becomes the last event.

    Nothing, also because a proxy may take a reply that begins before it has sent the request's last byte for an error: Go's
    ReverseProxy closes the connection. The answer is given up as soon as the client is gone.
    """
    try:
        first = next(events)
    except ClientLeft:
        return Response(status=CLIENT_CLOSED_REQUEST)
    rest = _guarded(answer, chain((first,), events), failure)
    response = Response(rest, content_type=EVENT_STREAM_CONTENT_TYPE, headers=STREAM_HEADERS)
    response.call_on_close(answer.close)
    return response


def spoken(tokens: Iterator[TokenEvent | None]) -> Iterator[TokenEvent | None]:
    """`tokens` without what comes before the first of them: None, which says only that time has passed."""
    return dropwhile(lambda token: token is None, tokens)


def whole_response(answer: Spoken, finished: Callable[[], Response]) -> Response:
    """`finished`, once the answer is. Raises the Problem that ended it. Where the client leaves, the answer is given up."""
    try:
        for _ in answer.tokens():
            pass
    except ClientLeft:
        return Response(status=CLIENT_CLOSED_REQUEST)
    return finished()


def arrived() -> float:
    """When this request came in, in time.monotonic(): as the server saw it, else now."""
    moment: float = request.environ.get(ARRIVED) or time.monotonic()
    return moment


def client_gone() -> Callable[[], bool]:
    """Whether the client of this request has left, as the server that took it knows; one that does not know says no."""
    gone: Callable[[], bool] = request.environ.get(CLIENT_GONE, lambda: False)
    return gone


def _guarded(answer: Spoken, events: Iterator[bytes], failure: Callable[[Problem], bytes]) -> Iterator[bytes]:
    try:
        yield from events
    except Problem as problem:
        yield failure(problem)
    except ClientLeft:
        return
    except Exception:  # noqa: BLE001 - logged, and the client is told
        _log.exception("the answer to %s broke off", answer.request_id)
        yield failure(Problem("the gateway failed; its log has the traceback"))
