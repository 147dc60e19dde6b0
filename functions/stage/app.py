"""A stage over HTTP: who may speak, how large an event may be, and what the reply's headers say."""

import hmac
from typing import Final

from cloudevents.core.v1.event import CloudEvent
from flask import Flask, Response, g, request

from eventing.events import EventType
from eventing.http_binding import from_http, to_binary_http
from eventing.problems import EventTooLarge, MalformedEvent, Unauthorized, UnknownEventType
from functions.stage.event_handlers import Durations, EventHandlers
from functions.telemetry import StageMetrics
from functions.web import add_problem_handlers

MAX_EVENT_BYTES: Final = 2**28
"""A chunk of 512 tokens of the widest published models takes 32 MiB in fp32."""


def create_app(handlers: EventHandlers, pipeline_token: str, metrics: StageMetrics, *, open_scoring: bool = False) -> Flask:
    """The application; probes are added by whoever knows how the stage is.

    open_scoring: `/score` takes score events from anybody, as a Sequence sends no token; everything else is the gateway's.
    """
    app = Flask("stage", static_folder=None)
    app.config["MAX_CONTENT_LENGTH"] = MAX_EVENT_BYTES
    add_problem_handlers(app)
    expected = f"Bearer {pipeline_token}".encode()

    @app.post("/")
    def receive() -> Response:
        g.event_type = "unread"
        _check_token(expected)
        return _answer(from_http(request.headers.items(), _body()), handlers, metrics)

    if open_scoring:

        @app.post("/score")
        def score() -> Response:
            g.event_type = "unread"
            event = from_http(request.headers.items(), _body())
            if event.get_type() != EventType.SCORE_REQUEST:
                raise UnknownEventType(f"{event.get_type()!r} is not served at /score, which serves {EventType.SCORE_REQUEST}")
            return _answer(event, handlers, metrics)

    @app.after_request
    def count(response: Response) -> Response:
        if "event_type" in g:
            metrics.events.labels(g.event_type, str(response.status_code)).inc()
        return response

    return app


def _answer(event: CloudEvent, handlers: EventHandlers, metrics: StageMetrics) -> Response:
    g.event_type = event.get_type() if event.get_type() in handlers.table else "unknown"
    durations = Durations()
    with metrics.in_flight.track_inprogress():
        headers, buffers = to_binary_http(handlers.answer(event, durations))
    if durations.engine:
        metrics.codec.observe(durations.codec)
        headers["Server-Timing"] = f"engine;dur={durations.engine * 1000:.3f}, codec;dur={durations.codec * 1000:.3f}"
    return Response(b"".join(buffers), 200, headers)


def _check_token(expected: bytes) -> None:
    given = request.headers.get("Authorization", "").encode()
    if not hmac.compare_digest(given, expected):
        seen = "no Authorization header" if not given else "another token"
        raise Unauthorized(f"{seen}; send Authorization: Bearer with the pipeline token")


def _body() -> bytes:
    """All of it in one read where its length is known: a large body comes in pieces of 64 KiB otherwise."""
    length = request.content_length
    if length is None:
        return request.get_data(cache=False)
    if length > MAX_EVENT_BYTES:
        raise EventTooLarge(f"the event has {length} bytes, the most is {MAX_EVENT_BYTES}; send fewer tokens at once")
    body: bytes = request.environ["wsgi.input"].read(length)
    if len(body) < length:
        raise MalformedEvent(f"the body ended after {len(body)} of {length} bytes")
    return body
