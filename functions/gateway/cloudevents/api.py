"""The CloudEvents API: takes `dev.lamina.generate.request` and replies with one event, or with a stream of events.

The reply to `dev.lamina.embed.request` is one event with the vectors of its texts. A gateway with LAMINA_SCORES=on is also the
first step of a Knative Sequence: it takes `dev.lamina.score.request` and replies with the event for the first stage. A Sequence
sends the header `Prefer: reply` with its requests; clients do not.
"""

import hashlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import count
from typing import Any, Final

from cloudevents.core.v1.event import CloudEvent
from flask import Response, g, request
from msgspec import Struct
from msgspec.structs import replace

from eventing.claim_check import ClaimCheck
from eventing.http.binding import (
    BATCHED_CONTENT_TYPE,
    STRUCTURED_CONTENT_TYPE,
    from_batched_http,
    from_http,
    to_batched_http,
    to_binary_http,
    to_structured_http,
)
from eventing.http.sse import EVENT_STREAM_CONTENT_TYPE, encode_sse
from eventing.problems import MalformedEvent, ModelNotFound, NotReady, Problem, UnknownEventType, UnsupportedMediaType
from eventing.wire.cloud_event import data_buffers, json_data, json_event, reply_id, reply_seed
from eventing.wire.events import Attribute, EventType
from eventing.wire.framing import Buffer, check_not_expired, expiry_time, media_type
from eventing.wire.generation import MAX_CHOICES, ErrorEvent, GenerateRequest, GenerateResponse, ProgressEvent, TokenEvent
from functions.configuration.config import GatewayConfig
from functions.gateway.answers.access_log import log_entry
from functions.gateway.answers.adapters import is_not_served
from functions.gateway.answers.authentication import Clients
from functions.gateway.answers.deduplication import Deduplicator, Listener
from functions.gateway.answers.generation import ClientLeft, Generation
from functions.gateway.answers.service import MAX_LOGPROBS, AnswerService, RequestContext
from functions.gateway.answers.streaming import (
    CLIENT_CLOSED_REQUEST,
    arrival_time,
    client_gone,
    last_of,
    stream_response,
    whole_response,
)
from functions.gateway.answers.vectors import VectorService
from functions.gateway.cloudevents.scoring import ScoreEntry
from functions.gateway.jobs.events import BatchEvents
from functions.gateway.jobs.files import EVERYBODY
from functions.gateway.openai.embeddings import EmbeddingRequest, embeddings_document
from functions.gateway.openai.validation import read_request
from functions.observing.tracing import read_traceparent
from storage.errors import StorageError

_SERVED: Final = (EventType.GENERATE_REQUEST, EventType.EMBED_REQUEST, EventType.SCORE_REQUEST, EventType.BATCH_REQUEST)
Item = TokenEvent | ProgressEvent | GenerateResponse  # of an answer: its tokens, then the response


@dataclass(frozen=True)
class CloudEventsAPI:
    """Answers the CloudEvents that clients post to `/`: a generate request, a batch of them, or one request of another type."""

    _service: Callable[[], AnswerService]
    _clients: Clients
    _claims: ClaimCheck
    _scores: ScoreEntry | None  # None: score requests are not served
    _source: str  # attribute `source` of all reply events
    _config: GatewayConfig
    _batches: BatchEvents | None = None  # None: batches are not served
    _batches_changed: Callable[[], object] = lambda: None  # called when one begins
    _deduplicator: Deduplicator[Item] = field(default_factory=Deduplicator)

    def receive(self) -> Response:
        client_id = log_entry().client_id = self._clients.identify(request)
        content_type = request.content_type or ""
        if media_type(content_type) == BATCHED_CONTENT_TYPE:
            return self._receive_batch(client_id)
        event = from_http(request.headers.items(), request.get_data(cache=False))
        if event.get_type() not in _SERVED:
            raise UnknownEventType(f"{event.get_type()!r} is not served by a gateway, which serves {', '.join(_SERVED)}")
        g.request_id = log_entry().request_id = reply_id(event)
        check_not_expired(event.get_attributes(), datetime.now(UTC))
        if event.get_type() == EventType.BATCH_REQUEST:
            return self._begin_batch(event, client_id)
        event = self._claims.redeem(event)
        if event.get_type() == EventType.SCORE_REQUEST:
            return self._score(event, client_id)
        to_http = to_structured_http if content_type.startswith(STRUCTURED_CONTENT_TYPE) else to_binary_http
        if event.get_type() == EventType.EMBED_REQUEST:
            return _http_response(to_http(self._embed(event, client_id)))
        listener = self._listen(event, client_id)
        event = CloudEvent(event.get_attributes())  # its data would stay in memory, and in the budget of bodies, for the answer
        g.answering = True
        if _wants_stream():
            return stream_response(
                listener,
                self._stream(event, listener),
                lambda problem: _structured_sse(self._problem(event, problem)),
                self._config.keep_alive_seconds,
            )
        return whole_response(
            listener.items(),
            lambda response: _http_response(to_http(self._event(event, EventType.GENERATE_RESPONSE, response))),
        )

    def _begin_batch(self, event: CloudEvent, client_id: str) -> Response:
        """Begins a batch. The reply is empty: the batch's results are sent later, as an event."""
        if self._batches is None:
            raise UnknownEventType(f"{event.get_type()} takes a place for batches; set gateway.jobs (LAMINA_JOBS_STORE)")
        owner = client_id if self._clients.are_known else EVERYBODY
        try:
            self._batches.begin(event, owner, client_id)
        except StorageError as error:
            raise NotReady(f"the store of files and batches failed: {error}") from error
        self._batches_changed()
        return Response(status=202)

    def _score(self, event: CloudEvent, client_id: str) -> Response:
        """Begins to score a prompt: the reply is the event that a Knative Sequence then delivers to the first stage.

        That event is signed with the pipeline's token, so only a Sequence may get it. Raises UnknownEventType if the request
        does not come from a Sequence, or if this gateway does not score.
        """
        if self._scores is None:
            raise UnknownEventType(
                f"{event.get_type()} goes to the Broker of a pipeline with a Sequence, whose gateway is not this one; "
                "/v1/completions with echo, logprobs and max_tokens 0 has the same numbers"
            )
        if "reply" not in request.headers.get("Prefer", "").lower().split():
            raise UnknownEventType(f"{event.get_type()} goes to the Broker: this gateway takes it from a Sequence only")
        return _http_response(to_binary_http(self._scores.begin(event, client_id)))

    def _embed(self, event: CloudEvent, client_id: str) -> CloudEvent:
        """Returns the reply event with the vectors of a request's texts. Large vectors go to the store (claim check).

        A repeated delivery is computed again, with the same vectors.
        """
        body = read_request(b"".join(data_buffers(event)), EmbeddingRequest)
        if body.model != self._config.model:
            raise ModelNotFound(is_not_served(body.model, self._config.model))
        context = self._context(event, client_id, client_gone())
        g.answering = True  # VectorService counts it
        document = embeddings_document(VectorService(self._service), body, context, int(time.time()))
        log_entry().prompt_tokens = document["usage"]["prompt_tokens"]
        return self._claims.check_in(self._event(event, EventType.EMBED_RESPONSE, document), datetime.now(UTC))

    def _context(self, event: CloudEvent, client_id: str, gone: Callable[[], bool], events: int = 1) -> RequestContext:
        """Returns the context of the request that `event` makes. `events` is the number of events in the HTTP request."""
        arrived = arrival_time()
        seconds, expiry = self._config.request_timeout_seconds, expiry_time(event.get_attributes())
        if expiry is not None:
            seconds = min(seconds, (expiry - datetime.now(UTC)).total_seconds())
        traceparent = event.get_extension(Attribute.TRACEPARENT)
        return RequestContext(
            request_id=reply_id(event),
            client_id=client_id,
            seed=reply_seed(event),
            deadline_seconds=seconds + time.monotonic() - arrived,
            arrived=arrived,
            max_logprobs=MAX_LOGPROBS // events,
            gone=gone,
            trace=read_traceparent(str(traceparent) if traceparent else request.headers.get("traceparent")),
        )

    def _listen(self, event: CloudEvent, client_id: str, events: int = 1) -> Listener[Item]:
        """Begins the answer to a generate request. If the same event is being answered, or was recently, joins that answer.

        `events` is the number of events in the HTTP request. Raises the Problem because of which the answer cannot begin.
        """

        def begin(abandoned: Callable[[], bool]) -> Iterator[Item | None]:
            data = json_data(event, GenerateRequest)
            if data.model is None and (named := event.get_extension(Attribute.MODEL)) is not None:
                data = replace(data, model=str(named))
            context = self._context(event, client_id, abandoned, events)
            entry = log_entry()
            entry.request = data
            entry.generation = generation = self._service().begin(data, context)
            return _items(generation)

        # The key has the data, so that different requests with one id get different answers.
        key = hashlib.sha256(f"{len(client_id)} {client_id} {reply_id(event)} ".encode())
        for buffer in data_buffers(event):
            key.update(buffer)
        return self._deduplicator.listen(key.digest(), reply_id(event), begin, client_gone())

    def _receive_batch(self, client_id: str) -> Response:
        """Answers a batch of events with a batch of reply events in the same order.

        All answers begin before the first is awaited. An event that fails gets an error event as its reply.
        """
        events = from_batched_http(request.get_data(cache=False))
        _check_batch(events)
        begun: list[Listener[Item] | Problem] = []
        try:
            for number, event in enumerate(events):
                try:
                    check_not_expired(event.get_attributes(), datetime.now(UTC))
                    begun.append(self._listen(self._claims.redeem(event), client_id, len(events)))
                except Problem as problem:
                    begun.append(problem)
                events[number] = CloudEvent(event.get_attributes())  # without data, as in `receive`
            del event
            g.answering = True
            replies = [self._wait(event, listener) for event, listener in zip(events, begun, strict=True)]
        except ClientLeft:
            return Response(status=CLIENT_CLOSED_REQUEST)
        finally:
            for listener in begun:
                if isinstance(listener, Listener):
                    listener.close()
        return _http_response(to_batched_http(replies))

    def _wait(self, event: CloudEvent, listener: Listener[Item] | Problem) -> CloudEvent:
        """Waits for the answer to `event` and returns the reply event.

        If `listener` is a Problem, the answer could not begin.
        """
        if isinstance(listener, Problem):
            return self._problem(event, listener)
        try:
            return self._event(event, EventType.GENERATE_RESPONSE, last_of(listener.items()))
        except Problem as problem:
            return self._problem(event, problem)

    def _stream(self, cause: CloudEvent, listener: Listener[Item]) -> Iterator[bytes | None]:
        progress = count()
        for item in listener.items():
            if item is None:
                yield None
            elif isinstance(item, ProgressEvent):
                yield _structured_sse(self._event(cause, EventType.PROGRESS, item, f"-progress-{next(progress)}"))
            elif isinstance(item, TokenEvent):
                number = f"-{item.index}" if item.choice == 0 else f"-{item.choice}-{item.index}"
                yield _structured_sse(self._event(cause, EventType.TOKEN, item, number))
            else:
                yield _structured_sse(self._event(cause, EventType.GENERATE_RESPONSE, item))

    def _problem(self, cause: CloudEvent, problem: Problem) -> CloudEvent:
        error = ErrorEvent(problem.type, problem.title, problem.status, str(problem))
        return self._event(cause, EventType.ERROR, error, "-error")

    def _event(self, cause: CloudEvent, type_: str, value: Struct | dict[str, Any], suffix: str = "") -> CloudEvent:
        """Makes a reply event. Its id is the id of the reply to `cause`, followed by `suffix`."""
        attributes = {
            Attribute.TRACEPARENT: cause.get_extension(Attribute.TRACEPARENT),
            Attribute.CAUSATION_ID: cause.get_id(),
            Attribute.CAUSATION_SOURCE: cause.get_source(),
        }
        return json_event(type_, self._source, value, id=reply_id(cause) + suffix, **attributes)


def _items(generation: Generation) -> Iterator[Item | None]:
    yield from generation.tokens()
    yield generation.response()


def _check_batch(events: list[CloudEvent]) -> None:
    if _wants_stream():
        raise UnsupportedMediaType("a batch is answered by a batch, not by a stream; send its events one by one")
    if not 1 <= len(events) <= MAX_CHOICES:
        raise MalformedEvent(f"the batch has {len(events)} events, it must have 1 to {MAX_CHOICES}")
    for number, event in enumerate(events):
        if event.get_type() != EventType.GENERATE_REQUEST:
            raise UnknownEventType(
                f"event {number} of the batch is {event.get_type()!r}; served is {EventType.GENERATE_REQUEST}"
            )


def _wants_stream() -> bool:
    return any(kind == EVENT_STREAM_CONTENT_TYPE and quality > 0 for kind, quality in request.accept_mimetypes)


def _structured_sse(event: CloudEvent) -> bytes:
    _, body = to_structured_http(event)
    return encode_sse(b"".join(body))


def _http_response(message: tuple[dict[str, str], list[Buffer]]) -> Response:
    headers, body = message
    return Response(b"".join(body), 200, headers)
