"""The door for CloudEvents: `dev.lamina.generate.request` in, the response as an event or as a stream of events out.

A `dev.lamina.score.request` comes from a Sequence, whose first step the gateway for events is: the reply is the first stage's
event. Whoever delivers for a Sequence says `Prefer: reply`; clients do not.
"""

import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from functools import partial

from cloudevents.core.v1.event import CloudEvent
from flask import Flask, Response, g, request
from msgspec import Struct

from eventing.claim_check import ClaimCheck
from eventing.http.binding import STRUCTURED_CONTENT_TYPE, from_http, to_binary_http, to_structured_http
from eventing.http.sse import EVENT_STREAM_CONTENT_TYPE, HEARTBEAT, encode_sse
from eventing.problems import Problem, UnknownEventType
from eventing.wire.cloud_event import check_not_expired, expiry_time, json_data, json_event, reply_id, reply_seed
from eventing.wire.events import Attribute, EventType
from eventing.wire.generation import ErrorEvent, GenerateRequest, TokenEvent
from functions.gateway.doors.access_log import entry
from functions.gateway.doors.answers import Answers, Asker
from functions.gateway.doors.clients import Clients
from functions.gateway.doors.reply import Reply
from functions.gateway.doors.scoring import ScoreEntry
from functions.gateway.doors.streaming import arrived, client_gone, spoken, stream_response, whole_response
from functions.observing.tracing import TraceContext, read_traceparent


class EventDoor:
    """source: of all replies. request_timeout_seconds: how long one answer may take."""

    def __init__(
        self,
        answers: Callable[[], Answers],
        clients: Clients,
        claims: ClaimCheck,
        scores: ScoreEntry | None,
        source: str,
        request_timeout_seconds: float,
    ) -> None:
        self._answers = answers
        self._clients = clients
        self._claims = claims
        self._scores = scores
        self._source = source
        self._timeout_seconds = request_timeout_seconds

    def register(self, app: Flask) -> None:
        app.post("/")(self._receive)

    def _receive(self) -> Response:
        began = arrived()
        client_id = entry().client_id = self._clients.identify(request)
        event = from_http(request.headers.items(), request.get_data(cache=False))
        if event.get_type() not in (EventType.GENERATE_REQUEST, EventType.SCORE_REQUEST):
            raise UnknownEventType(
                f"{event.get_type()!r} is not served by a gateway, which serves {EventType.GENERATE_REQUEST} and "
                f"{EventType.SCORE_REQUEST}"
            )
        g.request_id = entry().request_id = reply_id(event)
        check_not_expired(event, datetime.now(UTC))
        event = self._claims.redeem(event)
        if event.get_type() == EventType.SCORE_REQUEST:
            return self._score(event)
        return self._generate(event, client_id, began)

    def _score(self, event: CloudEvent) -> Response:
        """What goes back is signed with the pipeline's token: for the next step of a Sequence, and for nobody else."""
        if self._scores is None:
            raise UnknownEventType(f"{event.get_type()} goes to the Broker, whose gateway is not this one")
        if "reply" not in request.headers.get("Prefer", "").lower().split():
            raise UnknownEventType(f"{event.get_type()} goes to the Broker: this gateway takes it from a Sequence only")
        headers, body = to_binary_http(self._scores.begin(event))
        return Response(b"".join(body), 200, headers)

    def _generate(self, event: CloudEvent, client_id: str, began: float) -> Response:
        data = json_data(event, GenerateRequest)
        asker = Asker(
            reply_id(event),
            client_id,
            reply_seed(event),
            self._seconds_left(event) + time.monotonic() - began,
            began,
            client_gone(),
            _trace(event),
        )
        entry().wanted = data
        entry().answer = answer = self._answers().begin(data, asker)
        g.answering = True
        if _wants_stream():
            return stream_response(answer, self._stream(event, answer), partial(self._failure, event))
        return whole_response(
            answer, lambda: _http(self._event(event, EventType.GENERATE_RESPONSE, answer.response(), reply_id(event)))
        )

    def _seconds_left(self, event: CloudEvent) -> float:
        """From now on."""
        expiry = expiry_time(event)
        if expiry is None:
            return self._timeout_seconds
        return min(self._timeout_seconds, (expiry - datetime.now(UTC)).total_seconds())

    def _stream(self, cause: CloudEvent, answer: Reply) -> Iterator[bytes]:
        """Events in structured mode, each one server-sent event."""
        id_ = reply_id(cause)
        for token in spoken(answer.tokens()):
            yield HEARTBEAT if token is None else self._sent(cause, EventType.TOKEN, token, _token_id(id_, token))
        yield self._sent(cause, EventType.GENERATE_RESPONSE, answer.response(), id_)

    def _failure(self, cause: CloudEvent, problem: Problem) -> bytes:
        error = ErrorEvent(problem.type, problem.title, problem.status, str(problem))
        return self._sent(cause, EventType.ERROR, error, f"{reply_id(cause)}-error")

    def _sent(self, cause: CloudEvent, type_: str, value: Struct, id_: str) -> bytes:
        _, body = to_structured_http(self._event(cause, type_, value, id_))
        return encode_sse(b"".join(body))

    def _event(self, cause: CloudEvent, type_: str, value: Struct, id_: str) -> CloudEvent:
        traceparent = cause.get_extension(Attribute.TRACEPARENT)
        return json_event(type_, self._source, value, id=id_, **{Attribute.TRACEPARENT: traceparent})


def _token_id(id_: str, token: TokenEvent) -> str:
    return f"{id_}-{token.index}" if token.choice == 0 else f"{id_}-{token.choice}-{token.index}"


def _trace(event: CloudEvent) -> TraceContext | None:
    """By the event's own attribute, else by the request that brought it."""
    text = event.get_extension(Attribute.TRACEPARENT)
    return read_traceparent(str(text) if text else request.headers.get("traceparent"))


def _wants_stream() -> bool:
    return any(kind == EVENT_STREAM_CONTENT_TYPE and quality > 0 for kind, quality in request.accept_mimetypes)


def _http(event: CloudEvent) -> Response:
    """In the mode of the request."""
    structured = (request.content_type or "").startswith(STRUCTURED_CONTENT_TYPE)
    headers, body = to_structured_http(event) if structured else to_binary_http(event)
    return Response(b"".join(body), 200, headers)
