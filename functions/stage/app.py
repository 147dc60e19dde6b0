"""A stage over HTTP: who may speak, how large an event may be, and what the reply's headers say."""

import hmac
from typing import Final

from cloudevents.core.v1.event import CloudEvent
from flask import Flask, Response, g, request

from eventing.events import SAFE_EVENT_BYTES, Attribute
from eventing.http_binding import from_http, to_binary_http
from eventing.problems import EventTooLarge, MalformedEvent, Unauthorized
from eventing.signature import verify
from functions.stage.event_handlers import Durations, EventHandlers
from functions.telemetry import StageMetrics
from functions.web import add_problem_handlers

MAX_EVENT_BYTES: Final = 2**28
"""A chunk of 512 tokens of the widest published models takes 32 MiB in fp32."""
_SIGNATURE_HEADER: Final = f"ce-{Attribute.SIGNATURE}"


def create_app(handlers: EventHandlers, pipeline_token: str, metrics: StageMetrics) -> Flask:
    """The application; probes are added by whoever knows how the stage is."""
    app = Flask("stage", static_folder=None)
    app.config["MAX_CONTENT_LENGTH"] = MAX_EVENT_BYTES
    add_problem_handlers(app)

    @app.post("/")
    def receive() -> Response:
        g.event_type = "unread"
        return _answer(_trusted_event(pipeline_token), handlers, metrics)

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


def _trusted_event(pipeline_token: str) -> CloudEvent:
    """By bearer token, or by its own signature where a Sequence brings it. Raises Unauthorized, EventExpired."""
    if "Authorization" not in request.headers and _SIGNATURE_HEADER in request.headers:
        # What the channel passes on is no larger, so nobody is listened to for longer before the signature is seen.
        event = from_http(request.headers.items(), _body(SAFE_EVENT_BYTES))
        verify(event, pipeline_token)
        return event
    _check_token(pipeline_token)
    return from_http(request.headers.items(), _body(MAX_EVENT_BYTES))


def _check_token(pipeline_token: str) -> None:
    given = request.headers.get("Authorization", "").encode()
    if not hmac.compare_digest(given, f"Bearer {pipeline_token}".encode()):
        seen = "no Authorization header" if not given else "another token"
        raise Unauthorized(f"{seen}; send Authorization: Bearer with the pipeline token")


def _body(max_bytes: int) -> bytes:
    """All of it in one read where its length is known: a large body comes in pieces of 64 KiB otherwise."""
    length = request.content_length
    if length is None:
        request.max_content_length = max_bytes
        return request.get_data(cache=False)
    if length > max_bytes:
        raise EventTooLarge(f"the event has {length} bytes, the most is {max_bytes}; send fewer tokens at once")
    body: bytes = request.environ["wsgi.input"].read(length)
    if len(body) < length:
        raise MalformedEvent(f"the body ended after {len(body)} of {length} bytes")
    return body
