"""A stage over HTTP: who may speak, how large an event may be, and what the reply's headers say."""

import hmac
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from typing import TYPE_CHECKING, Final

from cloudevents.core.v1.event import CloudEvent

from eventing.http.binding import from_http, to_binary_http
from eventing.problems import EventTooLarge, MalformedEvent, Unauthorized
from eventing.wire.events import SAFE_EVENT_BYTES, Attribute
from eventing.wire.kv_query import HELD_HEADER, KV_PATH
from eventing.wire.signature import verify
from functions.hosting.environ import REFUSED
from functions.stage.serving.handlers import Durations, EventHandlers
from functions.stage.serving.metrics import StageMetrics

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

    from functions.stage.serving.refusals import Refusals

MAX_EVENT_BYTES: Final = 2**28
"""A chunk of 512 tokens of the widest published models takes 32 MiB in fp32."""
_SIGNATURE: Final = f"HTTP_CE_{Attribute.SIGNATURE.upper()}"


def create_app(handlers: EventHandlers, metrics: StageMetrics, *pipeline_tokens: str) -> "WSGIApplication":
    """Answers events; probes are not its business. pipeline_tokens: any of them is good."""
    return _EventDoor(handlers, metrics, pipeline_tokens)


class _EventDoor:
    """Answers `POST /` as WSGI has it, and leaves all other requests to Flask, and all refusals.

    A request costs Flask as much as a small stage's layers do where these have emptied the caches, which is how every step of
    a stream finds them; docs/log.md has the numbers.
    """

    def __init__(self, handlers: EventHandlers, metrics: StageMetrics, pipeline_tokens: tuple[str, ...]) -> None:
        self._handlers = handlers
        self._pipeline_tokens = pipeline_tokens
        self._admit = stage_admission(*pipeline_tokens)
        self._metrics = metrics

    def __call__(self, environ: "WSGIEnvironment", start_response: "StartResponse") -> Iterable[bytes]:
        if environ["PATH_INFO"] == KV_PATH and environ["REQUEST_METHOD"] == "GET":
            return self._hand_over(environ, start_response)
        if environ["PATH_INFO"] != "/" or environ["REQUEST_METHOD"] != "POST":
            return self._refusals(environ, start_response)
        type_ = "unread"
        try:
            event = self._trusted_event(environ)
            type_ = event.get_type() if event.get_type() in self._handlers.table else "unknown"
            headers, body = self._answer(event)
        except Exception as error:  # noqa: BLE001 - Flask's error handlers know what to say
            return self._refusals.refuse(environ, start_response, error, type_)
        self._metrics.events.labels(type_, "200").inc()
        start_response("200 OK", [*headers.items(), ("Content-Length", str(len(body)))])
        return (body,)

    def _hand_over(self, environ: "WSGIEnvironment", start_response: "StartResponse") -> Iterable[bytes]:
        """Keys and values, to another instance of this stage."""
        try:
            _check_token(environ.get("HTTP_AUTHORIZATION", ""), self._pipeline_tokens)
            found = self._handlers.hand_over(environ.get("QUERY_STRING", ""))
        except Exception as error:  # noqa: BLE001 - Flask's error handlers know what to say
            return self._refusals.refuse(environ, start_response, error, KV_PATH)
        if found is None:
            start_response("204 No Content", [])
            return ()
        data, held = found
        self._metrics.handed_over_bytes.inc(len(data))
        length = ("Content-Length", str(len(data)))
        start_response("200 OK", [("Content-Type", "application/octet-stream"), length, (HELD_HEADER, str(held))])
        return (bytes(data),)

    @cached_property
    def _refusals(self) -> "Refusals":
        """Made when it is needed: Flask is a third of a native stage's imports, and a start needs none of it."""
        from functions.stage.serving.refusals import Refusals

        return Refusals(self._metrics, MAX_EVENT_BYTES)

    def _trusted_event(self, environ: "WSGIEnvironment") -> CloudEvent:
        """By bearer token, or by its own signature where a Sequence brings it. Raises Unauthorized, EventExpired."""
        if REFUSED in environ:
            raise environ[REFUSED]
        event = from_http(_event_headers(environ), _body(environ, self._admit(environ)))
        if _is_signed(environ):
            verify(event, *self._pipeline_tokens)
        return event

    def _answer(self, event: CloudEvent) -> tuple[dict[str, str], bytes]:
        durations = Durations()
        with self._metrics.in_flight.track_inprogress():
            headers, buffers = to_binary_http(self._handlers.answer(event, durations))
        if durations.engine:
            self._metrics.codec.observe(durations.codec)
            headers["Server-Timing"] = f"engine;dur={durations.engine * 1000:.3f}, codec;dur={durations.codec * 1000:.3f}"
        return headers, b"".join(buffers)


def stage_admission(*pipeline_tokens: str) -> "Callable[[WSGIEnvironment], int]":
    """How large a body may be, by its head alone. Raises Unauthorized, so that no stranger's body is read."""

    def admit(environ: "WSGIEnvironment") -> int:
        if environ["PATH_INFO"] != "/" or environ["REQUEST_METHOD"] != "POST":
            return 0
        if _is_signed(environ):
            # What the channel passes on is no larger, so nobody is listened to for longer before the signature is seen.
            return SAFE_EVENT_BYTES
        _check_token(environ.get("HTTP_AUTHORIZATION", ""), pipeline_tokens)
        return MAX_EVENT_BYTES

    return admit


def _is_signed(environ: "WSGIEnvironment") -> bool:
    """In binary mode, as gateway and stages send it: JSON of who knows whom is not parsed to find a signature in it."""
    structured = environ.get("CONTENT_TYPE", "").lower().startswith("application/cloudevents")
    return _SIGNATURE in environ and "HTTP_AUTHORIZATION" not in environ and not structured


def _check_token(given: str, pipeline_tokens: tuple[str, ...]) -> None:
    known = [hmac.compare_digest(given.encode(), f"Bearer {token}".encode()) for token in pipeline_tokens]
    if not any(known):
        seen = "no Authorization header" if not given else "another token"
        raise Unauthorized(f"{seen}; send Authorization: Bearer with the pipeline token")


def _event_headers(environ: "WSGIEnvironment") -> Iterator[tuple[str, str]]:
    """Those that an event's attributes are in."""
    for key, value in environ.items():
        if key.startswith("HTTP_CE_"):
            yield key[5:].replace("_", "-"), value
        elif key == "CONTENT_TYPE" and value:
            yield "content-type", value


def _body(environ: "WSGIEnvironment", max_bytes: int) -> bytes:
    """All of it in one read, which functions/hosting/environ answers with the memory that it came into."""
    length = int(environ.get("CONTENT_LENGTH") or 0)
    if length > max_bytes:
        raise EventTooLarge(f"the event has {length} bytes, the most is {max_bytes}; send fewer tokens at once")
    body: bytes = environ["wsgi.input"].read(length)
    if len(body) < length:
        raise MalformedEvent(f"the body ended after {len(body)} of {length} bytes")
    return body
