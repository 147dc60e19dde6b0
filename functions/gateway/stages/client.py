"""What the gateway says to the instances of stages.

One method per event type. Everything that can go wrong with an event as a whole ends in `StageFailed` (`failures`); what goes
wrong with one row stands in the row.
"""

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Final, TypeVar

from cloudevents.core.v1.event import CloudEvent
from msgspec import Struct

from eventing.http.binding import from_http, to_binary_http
from eventing.http.delivery import DeliveryError, Reply, Sender
from eventing.problems import MalformedEvent, Problem
from eventing.wire.batch_codec import decode_batch
from eventing.wire.cloud_event import AttributeValue, Buffer, Data, json_data, json_event, make_event
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

RESERVATION_SECONDS: Final = 10.0
"""How long a stage that has not failed of late may take for a reservation."""

_ENGINE: Final = re.compile(r"engine;dur=([0-9]{1,9}\.[0-9]{1,9})")
Traces = Sequence[TraceContext]
"""Of the sequences that an event is sent for."""
Extensions = dict[str, AttributeValue]
"""Attributes beside those that every event carries."""
S = TypeVar("S", bound=Struct)


@dataclass(frozen=True, slots=True)
class Origin:
    """Who replied, and what it said of itself."""

    instance: Instance
    boot: str
    """The `instance` attribute: a name with a nonce of its boot."""
    free_tokens: int | None


@dataclass(frozen=True, slots=True)
class ForwardReply:
    origin: Origin
    batch: Batch
    """Views into `body`."""
    body: memoryview
    exchange_seconds: float = 0.0
    """From the request's first byte to the reply's last; the rest of a hop is events that are made and read."""
    engine_seconds: float | None = None
    """Of those, waiting and computing at the stage, as its Server-Timing says; None where it says nothing."""


@dataclass(frozen=True, slots=True)
class PipelineIdentity:
    """What every event carries."""

    fingerprint: str
    token: str
    source: str
    """The gateway with a nonce of its boot; a stage lets nobody else touch this source's sequences."""
    first_layers: tuple[int, ...]
    """Per stage."""


class StageClient:
    """Sends events to the stages. Thread-safe."""

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
        timeout, awaited_until = _time_left(self._step_timeout_seconds, deadline)
        with instance.in_flight, self._span(EventType.FORWARD, instance.stage, instance.url, traces) as span:
            event = self._batch_event(instance.stage, body, timeout, span.context)
            sent = time.perf_counter()
            reply = self._send(instance.stage, instance.url, event, timeout, awaited_until)
            exchange_seconds = time.perf_counter() - sent
        try:
            origin = _origin(instance, from_http(reply.headers, reply.body))
            batch = decode_batch(reply.body)
            if [row.id for row in batch.rows] != list(ids):
                raise MalformedEvent(f"the reply has rows {[row.id for row in batch.rows]}, sent were {list(ids)}")
        except Problem as error:
            raise StageFailed(instance.stage, "malformed", f"its reply: {error}", blames=True) from error
        return ForwardReply(origin, batch, reply.body, exchange_seconds, _engine_seconds(reply))

    def reserve(
        self, instance: Instance, rows: Sequence[ReserveRow], deadline: float, traces: Traces = ()
    ) -> tuple[Origin, ReserveReply]:
        """Room for the rows, each with its own status, in their order; it may wait for a pass. Raises StageFailed.

        A stage replies between two passes. One that takes a connection and says nothing costs less than a step may, so that
        another instance is asked soon; each time in a row it has longer, for there are stages with long passes.
        """
        own = min(self._step_timeout_seconds, RESERVATION_SECONDS * 2 ** min(instance.failures, 8))
        timeout, awaited_until = _time_left(own, deadline)
        request = ReserveRequest(tuple(rows))
        origin, reply = self._ask(instance, EventType.RESERVE, request, ReserveReply, timeout, traces, awaited_until)
        if [(row.id, row.attempt) for row in reply.rows] != [(row.id, row.attempt) for row in rows]:
            raise StageFailed(instance.stage, "malformed", "its reply to a reservation has other rows than the request")
        return origin, reply

    def release(self, instance: Instance, rows: Sequence[ReleaseRow], awaited_tokens: int = 0) -> Origin:
        """Frees the rows' memory; without rows, says that this gateway lives. Raises StageFailed.

        awaited_tokens: unless it is 0, the reply comes when so many can be reserved, or after ROOM_SECONDS.
        """
        timeout = self._step_timeout_seconds if rows else min(RENEWAL_SECONDS, self._step_timeout_seconds)
        request = ReleaseRequest(tuple(rows))
        more: Extensions | None = {Attribute.AWAITED_TOKENS: awaited_tokens} if awaited_tokens else None
        return self._ask(instance, EventType.RELEASE, request, ReleaseReply, timeout, more=more)[0]

    def warm_up(self, stage: int, url: str, timeout_seconds: float) -> WarmupReply:
        """Wakes a stage and returns once its weights are in. Raises StageFailed."""
        return self._exchange(stage, url, EventType.WARMUP, WarmupRequest(), WarmupReply, timeout_seconds)[1]

    def _ask(
        self,
        instance: Instance,
        type: EventType,
        request: Struct,
        reply: type[S],
        timeout_seconds: float,
        traces: Traces = (),
        awaited_until: float | None = None,
        more: Extensions | None = None,
    ) -> tuple[Origin, S]:
        told = (type, request, reply, timeout_seconds, traces, awaited_until)
        event, value = self._exchange(instance.stage, instance.url, *told, more)
        return _origin(instance, event), value

    def _exchange(
        self,
        stage: int,
        url: str,
        type: EventType,
        request: Struct,
        reply: type[S],
        timeout_seconds: float,
        traces: Traces = (),
        awaited_until: float | None = None,
        more: Extensions | None = None,
    ) -> tuple[CloudEvent, S]:
        """One event with JSON data and its reply. Raises StageFailed."""
        with self._span(type, stage, url, traces) as span:
            event = self._json_event(stage, type, request, timeout_seconds, span.context, more)
            return _read(stage, self._send(stage, url, event, timeout_seconds, awaited_until), reply)

    def _span(self, type: EventType, stage: int, url: str, traces: Traces) -> Span:
        told: Attributes = {"lamina.stage": stage, "lamina.sequences": len(traces), "url.full": url}
        return self._tracer.send(f"send {type.removeprefix('dev.lamina.')}", traces, told)

    def _batch_event(self, stage: int, body: Data, timeout_seconds: float, trace: TraceContext) -> CloudEvent:
        attributes = self._attributes(stage, timeout_seconds, trace)
        return make_event(EventType.FORWARD, self._identity.source, body, BATCH_CONTENT_TYPE, id=None, **attributes)

    def _json_event(
        self, stage: int, type: EventType, value: Struct, timeout_seconds: float, trace: TraceContext, more: Extensions | None
    ) -> CloudEvent:
        attributes = self._attributes(stage, timeout_seconds, trace) | (more or {})
        return json_event(type, self._identity.source, value, id=None, **attributes)

    def _attributes(self, stage: int, timeout_seconds: float, trace: TraceContext) -> dict[str, AttributeValue]:
        return {
            Attribute.PIPELINE: self._identity.fingerprint,
            Attribute.LAYER: self._identity.first_layers[stage],
            Attribute.EXPIRY_TIME: datetime.now(UTC) + timedelta(seconds=timeout_seconds),
            Attribute.TRACEPARENT: trace.traceparent,
        }

    def _send(
        self, stage: int, url: str, event: CloudEvent, timeout_seconds: float, awaited_until: float | None = None
    ) -> Reply:
        headers, buffers = to_binary_http(event)
        headers["authorization"] = f"Bearer {self._identity.token}"
        try:
            return self._sender.send(url, headers, buffers, max(0.001, timeout_seconds))
        except (DeliveryError, Problem) as error:
            raise stage_failed(stage, error, awaited_until) from error


def _time_left(own_seconds: float, deadline: float) -> tuple[float, float | None]:
    """How long is waited for a reply; and until when, if it is the client that waits no longer."""
    left = deadline - time.monotonic()
    return (left, deadline) if left < own_seconds else (own_seconds, None)


def _origin(instance: Instance, reply: CloudEvent) -> Origin:
    free = str(reply.get_extension(Attribute.FREE_TOKENS))
    boot = reply.get_extension(Attribute.INSTANCE)
    return Origin(instance, str(boot or ""), int(free) if free.isdecimal() else None)


def _engine_seconds(reply: Reply) -> float | None:
    found = _ENGINE.search(reply.headers.get("server-timing", ""))
    return None if found is None else float(found[1]) / 1000


def _read(stage: int, reply: Reply, type: type[S]) -> tuple[CloudEvent, S]:
    try:
        event = from_http(reply.headers, reply.body)
        return event, json_data(event, type)
    except Problem as error:
        raise StageFailed(stage, "malformed", f"its reply: {error}") from error
