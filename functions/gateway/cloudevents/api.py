"""The door for CloudEvents: `dev.lamina.generate.request` in, the response as an event or as a stream of events out.

A `dev.lamina.score.request` comes from a Sequence, whose first step the gateway for events is: the reply is the first stage's
event. Whoever delivers for a Sequence says `Prefer: reply`; clients do not.
"""

import hashlib
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from functools import partial

from cloudevents.core.v1.event import CloudEvent
from flask import Flask, Response, g, request
from msgspec import Struct

from eventing.claim_check import ClaimCheck
from eventing.http.binding import (
    STRUCTURED_CONTENT_TYPE,
    from_batched_http,
    from_http,
    is_batched,
    to_batched_http,
    to_binary_http,
    to_structured_http,
)
from eventing.http.sse import EVENT_STREAM_CONTENT_TYPE, HEARTBEAT, encode_sse
from eventing.problems import MalformedEvent, Problem, UnknownEventType, UnsupportedMediaType
from eventing.wire.cloud_event import check_not_expired, data_buffers, expiry_time, json_data, json_event, reply_id, reply_seed
from eventing.wire.events import Attribute, EventType
from eventing.wire.generation import MAX_CHOICES, ErrorEvent, GenerateRequest, TokenEvent
from functions.gateway.answers.access_log import entry
from functions.gateway.answers.clients import Clients
from functions.gateway.answers.generation import ClientLeft, Generation
from functions.gateway.answers.service import AnswerService, RequestContext
from functions.gateway.answers.streaming import (
    CLIENT_CLOSED_REQUEST,
    arrived,
    client_gone,
    spoken,
    stream_response,
    whole_response,
)
from functions.gateway.cloudevents.deduplication import Deduplicator, Listener
from functions.gateway.cloudevents.scoring import ScoreEntry
from functions.observing.tracing import TraceContext, read_traceparent


class CloudEventsAPI:
    """source: of all replies. request_timeout_seconds: how long one answer may take."""

    def __init__(
        self,
        answers: Callable[[], AnswerService],
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
        self._once = Deduplicator()

    def register(self, app: Flask) -> None:
        app.post("/")(self._receive)

    def _receive(self) -> Response:
        began = arrived()
        client_id = entry().client_id = self._clients.identify(request)
        if is_batched({"content-type": request.content_type or ""}):
            return self._batch(client_id, began)
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
        listener = self._listener(event, client_id, began)
        g.answering = True
        if _wants_stream():
            return stream_response(listener, self._stream(event, listener), partial(self._failure, event))
        return whole_response(listener, lambda: _http(self._response(event, listener)))

    def _listener(self, event: CloudEvent, client_id: str, began: float) -> Listener:
        """To the answer, which is begun unless the same event is being answered, or was a while ago."""

        def begin() -> Generation:
            data = json_data(event, GenerateRequest)
            seconds = self._seconds_left(event) + time.monotonic() - began
            # Nobody in particular asks: the answer is given up by whoever listens last.
            asker = RequestContext(reply_id(event), client_id, reply_seed(event), seconds, began, trace=_trace(event))
            entry().wanted = data
            entry().answer = reply = self._answers().begin(data, asker)
            return reply

        return self._once.listen(_key(event, client_id), begin, client_gone())

    def _batch(self, client_id: str, began: float) -> Response:
        """All of them are begun before the first is awaited."""
        events = from_batched_http(request.get_data(cache=False))
        self._check_batch(events)
        begun: list[Listener | Problem] = []
        try:
            for event in events:
                begun.append(self._begun(event, client_id, began))
            g.answering = True
            answered = [
                self._problem(event, listener) if isinstance(listener, Problem) else self._heard(event, listener)
                for event, listener in zip(events, begun, strict=True)
            ]
        except ClientLeft:
            return Response(status=CLIENT_CLOSED_REQUEST)
        finally:
            for listener in begun:
                if isinstance(listener, Listener):
                    listener.close()
        headers, body = to_batched_http(answered)
        return Response(b"".join(body), 200, headers)

    def _check_batch(self, events: list[CloudEvent]) -> None:
        if _wants_stream():
            raise UnsupportedMediaType("a batch is answered by a batch, not by a stream; send its events one by one")
        if not 1 <= len(events) <= MAX_CHOICES:
            raise MalformedEvent(f"the batch has {len(events)} events, it must have 1 to {MAX_CHOICES}")
        for number, event in enumerate(events):
            if event.get_type() != EventType.GENERATE_REQUEST:
                raise UnknownEventType(
                    f"event {number} of the batch is {event.get_type()!r}; served is {EventType.GENERATE_REQUEST}"
                )

    def _begun(self, event: CloudEvent, client_id: str, began: float) -> Listener | Problem:
        try:
            check_not_expired(event, datetime.now(UTC))
            return self._listener(self._claims.redeem(event), client_id, began)
        except Problem as problem:
            return problem

    def _heard(self, event: CloudEvent, listener: Listener) -> CloudEvent:
        try:
            for _ in listener.tokens():
                pass
        except Problem as problem:
            return self._problem(event, problem)
        return self._response(event, listener)

    def _response(self, cause: CloudEvent, listener: Listener) -> CloudEvent:
        return self._event(cause, EventType.GENERATE_RESPONSE, listener.response(), reply_id(cause))

    def _problem(self, cause: CloudEvent, problem: Problem) -> CloudEvent:
        error = ErrorEvent(problem.type, problem.title, problem.status, str(problem))
        return self._event(cause, EventType.ERROR, error, f"{reply_id(cause)}-error")

    def _seconds_left(self, event: CloudEvent) -> float:
        """From now on."""
        expiry = expiry_time(event)
        if expiry is None:
            return self._timeout_seconds
        return min(self._timeout_seconds, (expiry - datetime.now(UTC)).total_seconds())

    def _stream(self, cause: CloudEvent, listener: Listener) -> Iterator[bytes]:
        """Events in structured mode, each one server-sent event."""
        id_ = reply_id(cause)
        for token in spoken(listener.tokens()):
            yield HEARTBEAT if token is None else _sent(self._event(cause, EventType.TOKEN, token, _token_id(id_, token)))
        yield _sent(self._response(cause, listener))

    def _failure(self, cause: CloudEvent, problem: Problem) -> bytes:
        return _sent(self._problem(cause, problem))

    def _event(self, cause: CloudEvent, type_: str, value: Struct, id_: str) -> CloudEvent:
        attributes = {
            Attribute.TRACEPARENT: cause.get_extension(Attribute.TRACEPARENT),
            Attribute.CAUSATION_ID: cause.get_id(),
            Attribute.CAUSATION_SOURCE: cause.get_source(),
        }
        return json_event(type_, self._source, value, id=id_, **attributes)


def _sent(event: CloudEvent) -> bytes:
    _, body = to_structured_http(event)
    return encode_sse(b"".join(body))


def _key(event: CloudEvent, client_id: str) -> bytes:
    """Of what is the same event. Its data belong to it: who gives two questions one id gets two answers."""
    digest = hashlib.sha256(f"{len(client_id)} {client_id} {reply_id(event)} ".encode())
    for buffer in data_buffers(event):
        digest.update(buffer)
    return digest.digest()


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
