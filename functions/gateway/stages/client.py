"""Events that the gateway sends to instances of stages.

What goes wrong with an event as a whole is raised as `StageFailed` (`failures`); what goes wrong with a row is in the row.
"""

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Final, TypeVar

import msgspec
from msgspec import Struct

from eventing.http.binding import to_binary_http
from eventing.http.delivery import DeliveryError, HttpReply, RequestTarget, Sender
from eventing.http.framing import EventTemplate, read_attributes
from eventing.problems import MalformedEvent, Problem
from eventing.wire.batch_codec import decode_batch
from eventing.wire.cloud_event import JSON_CONTENT_TYPE, Buffer, make_event, read_json
from eventing.wire.control import (
    RENEWAL_SECONDS,
    ReleaseReply,
    ReleaseRequest,
    ReleaseRow,
    ReserveReply,
    ReserveRequest,
    ReserveRow,
    WarmupReply,
    WarmupRequest,
)
from eventing.wire.events import BATCH_CONTENT_TYPE, Attribute, Batch, EventType
from functions.gateway.stages.failures import StageFailed, stage_failed
from functions.gateway.stages.instances import Instance
from functions.observing.tracing import PASSING, Attributes, Span, TraceContext, Tracer

RESERVATION_SECONDS: Final = 10.0  # reply timeout of a reservation, for an instance that has not failed lately

_ENGINE: Final = re.compile(r"engine;dur=([0-9]{1,9}\.[0-9]{1,9})")
Traces = Sequence[TraceContext]  # of the sequences that an event is sent for
S = TypeVar("S", bound=Struct)


@dataclass(frozen=True, slots=True)
class ReplyOrigin:
    """The instance that replied, and what it said of itself."""

    instance: Instance
    boot: str  # the `instance` attribute: a name with a nonce of its boot
    free_tokens: int | None


@dataclass(frozen=True, slots=True)
class ForwardReply:
    """A stage's reply to one step. `batch` holds views into `body`."""

    origin: ReplyOrigin
    batch: Batch
    body: memoryview
    exchange_seconds: float = 0.0  # from the request's first byte to the reply's last
    engine_seconds: float | None = None  # part of exchange_seconds: queueing and compute at the stage; None: not reported


@dataclass(frozen=True, slots=True)
class PipelineIdentity:
    """What every event carries."""

    fingerprint: str
    token: str
    source: str  # the gateway with a nonce of its boot; a stage keeps each source's sequences apart
    first_layers: tuple[int, ...]  # per stage


class StageClient:
    """Sends events to the stages, one method per event type. Thread-safe."""

    def __init__(
        self, sender: Sender, identity: PipelineIdentity, step_timeout_seconds: float, tracer: Tracer = PASSING
    ) -> None:
        self._sender = sender
        self._identity = identity
        self._step_timeout_seconds = step_timeout_seconds
        self._tracer = tracer

    def forward(
        self, instance: Instance, body: Sequence[Buffer], ids: Sequence[str], deadline: float, traces: Traces = ()
    ) -> ForwardReply:
        """One step at one stage. Raises StageFailed.

        ids: of the rows, in their order. deadline: in time.monotonic(). traces: of the rows' sequences.
        """
        timeout, client_deadline = _time_left(self._step_timeout_seconds, deadline)
        template = self._template(instance, EventType.FORWARD, BATCH_CONTENT_TYPE)
        with instance.in_flight, self._span(EventType.FORWARD, instance.stage, instance.url, traces) as span:
            sent = time.perf_counter()
            reply = self._send(instance.stage, template, body, timeout, span.context, (), client_deadline)
            exchange_seconds = time.perf_counter() - sent
        try:
            origin = _origin(instance, read_attributes(reply.headers.items()))
            batch = decode_batch(reply.body)
            if (seen := [row.id for row in batch.rows]) != list(ids):
                raise MalformedEvent(f"the reply has rows {seen}, sent were {list(ids)}")
        except Problem as error:
            raise StageFailed(instance.stage, "malformed", f"its reply: {error}", blames=True) from error
        engine = _ENGINE.search(reply.headers.get("server-timing", ""))
        return ForwardReply(origin, batch, reply.body, exchange_seconds, None if engine is None else float(engine[1]) / 1000)

    def reserve(
        self, instance: Instance, rows: Sequence[ReserveRow], deadline: float, traces: Traces = ()
    ) -> tuple[ReplyOrigin, ReserveReply]:
        """Reserves memory; each row of the reply has its own status. May take as long as a forward pass. Raises StageFailed.

        A stage replies between two passes. An instance that accepts the connection and says nothing is given less time than a
        step, so that another instance is asked soon, and more with every failure, because some stages have long passes.
        """
        seconds = min(self._step_timeout_seconds, RESERVATION_SECONDS * 2 ** min(instance.failures, 8))
        timeout, client_deadline = _time_left(seconds, deadline)
        template = self._template(instance, EventType.RESERVE, JSON_CONTENT_TYPE)
        request = ReserveRequest(tuple(rows))
        attributes, reply = self._call(
            instance.stage, template, request, ReserveReply, timeout, traces, client_deadline=client_deadline
        )
        if [(row.id, row.attempt) for row in reply.rows] != [(row.id, row.attempt) for row in rows]:
            raise StageFailed(instance.stage, "malformed", "its reply to a reservation has other rows than the request")
        return _origin(instance, attributes), reply

    def release(self, instance: Instance, rows: Sequence[ReleaseRow], awaited_tokens: int = 0) -> ReplyOrigin:
        """Frees the rows' memory. Without rows it renews this gateway's lease. Raises StageFailed.

        awaited_tokens: unless 0, the stage holds its reply until it could reserve so many, or for HOLD_SECONDS.
        """
        timeout = self._step_timeout_seconds if rows else min(RENEWAL_SECONDS, self._step_timeout_seconds)
        template = self._template(instance, EventType.RELEASE, JSON_CONTENT_TYPE)
        extensions = [(Attribute.AWAITED_TOKENS.value, str(awaited_tokens))] if awaited_tokens else []
        request = ReleaseRequest(tuple(rows))
        attributes, _ = self._call(instance.stage, template, request, ReleaseReply, timeout, extensions=extensions)
        return _origin(instance, attributes)

    def warm_up(self, stage: int, url: str, timeout_seconds: float) -> WarmupReply:
        """Wakes a stage and returns once its weights are loaded. Raises StageFailed."""
        template = self._new_template(stage, url, EventType.WARMUP, JSON_CONTENT_TYPE)
        return self._call(stage, template, WarmupRequest(), WarmupReply, timeout_seconds)[1]

    def _call(
        self,
        stage: int,
        template: EventTemplate,
        request: Struct,
        reply_type: type[S],
        timeout_seconds: float,
        traces: Traces = (),
        *,
        extensions: Sequence[tuple[str, str]] = (),
        client_deadline: float | None = None,
    ) -> tuple[dict[str, str], S]:
        """Sends one JSON event; returns its reply's attributes and data. Raises StageFailed."""
        body = [msgspec.json.encode(request)]
        with self._span(template.event_type, stage, template.target.url, traces) as span:
            reply = self._send(stage, template, body, timeout_seconds, span.context, extensions, client_deadline)
            try:
                attributes = read_attributes(reply.headers.items())
                return attributes, read_json(attributes, reply.body, reply_type)
            except Problem as error:
                raise StageFailed(stage, "malformed", f"its reply: {error}") from error

    def _send(
        self,
        stage: int,
        template: EventTemplate,
        body: Sequence[Buffer],
        timeout_seconds: float,
        trace: TraceContext,
        extensions: Sequence[tuple[str, str]],
        client_deadline: float | None,
    ) -> HttpReply:
        expiry = (datetime.now(UTC) + timedelta(seconds=timeout_seconds)).isoformat()[:-6] + "Z"
        varying = (("expirytime", expiry), ("traceparent", trace.traceparent), *extensions)
        head = template.head(sum(map(len, body)), varying)
        try:
            return self._sender.deliver(template.target, head, body, time.monotonic() + max(0.001, timeout_seconds))
        except (DeliveryError, Problem) as error:
            raise stage_failed(stage, error, client_deadline) from error

    def _template(self, instance: Instance, event_type: EventType, content_type: str) -> EventTemplate:
        """Made at the first event of its type; an instance keeps its templates."""
        template = instance.templates.get(event_type)
        if template is None:
            template = self._new_template(instance.stage, instance.url, event_type, content_type)
            instance.templates[event_type] = template
        return template

    def _new_template(self, stage: int, url: str, event_type: EventType, content_type: str) -> EventTemplate:
        identity = self._identity
        layer = identity.first_layers[stage]
        event = make_event(event_type, identity.source, b"", content_type, pipeline=identity.fingerprint, layer=layer)
        headers, _ = to_binary_http(event)
        return EventTemplate(event_type, RequestTarget.of(url), headers | {"authorization": f"Bearer {identity.token}"})

    def _span(self, event_type: str, stage: int, url: str, traces: Traces) -> Span:
        attributes: Attributes = {"lamina.stage": stage, "lamina.sequences": len(traces), "url.full": url}
        return self._tracer.send(f"send {event_type.removeprefix('dev.lamina.')}", traces, attributes)


def _time_left(own_seconds: float, deadline: float) -> tuple[float, float | None]:
    """Reply timeout in seconds; and the client's deadline, if that is what ends the wait."""
    left = deadline - time.monotonic()
    return (left, deadline) if left < own_seconds else (own_seconds, None)


def _origin(instance: Instance, attributes: dict[str, str]) -> ReplyOrigin:
    free = attributes.get(Attribute.FREE_TOKENS, "")
    return ReplyOrigin(instance, attributes.get(Attribute.INSTANCE, ""), int(free) if free.isdecimal() else None)
