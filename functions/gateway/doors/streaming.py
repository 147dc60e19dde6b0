"""Answers as server-sent events over WSGI, whichever door they leave by."""

import logging
from collections.abc import Callable, Iterator
from typing import Final

from flask import Response

from eventing.http.sse import EVENT_STREAM_CONTENT_TYPE
from eventing.problems import Problem
from functions.gateway.doors.answers import Answer

_log: Final = logging.getLogger(__name__)
_HEADERS: Final = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
"""So that no proxy keeps tokens back."""


def stream_response(answer: Answer, events: Iterator[bytes], failure: Callable[[Problem], bytes]) -> Response:
    """Sends `events`. Where they break off the status is out already, so that `failure` becomes the last event.

    The first event should come at once: the status goes out with it, and proxies limit the time until it does.
    The answer is given up as soon as the client is gone.
    """
    response = Response(_guarded(events, failure), content_type=EVENT_STREAM_CONTENT_TYPE, headers=_HEADERS)
    response.call_on_close(answer.close)
    return response


def _guarded(events: Iterator[bytes], failure: Callable[[Problem], bytes]) -> Iterator[bytes]:
    try:
        yield from events
    except Problem as problem:
        yield failure(problem)
    except Exception:  # noqa: BLE001 - logged, and the client is told
        _log.exception("an answer broke off")
        yield failure(Problem("the gateway failed; its log has the traceback"))
