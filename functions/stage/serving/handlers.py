"""What a stage answers to each type of event. Knows events and an engine, no HTTP."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

from cloudevents.core.v1.event import CloudEvent
from msgspec import Struct

from eventing.claim_check import ClaimCheck
from eventing.problems import UnknownEventType
from eventing.wire.cloud_event import (
    batch_data,
    batch_event,
    check_not_expired,
    expiry_time,
    integer_attribute,
    json_data,
    json_event,
    reply_id,
)
from eventing.wire.control import (
    ReleaseReply,
    ReleaseRequest,
    ReserveReply,
    ReserveRequest,
    WarmupReply,
    WarmupRequest,
)
from eventing.wire.events import Attribute, Batch, EventType
from eventing.wire.kv_query import KVQuery
from eventing.wire.signature import is_signed
from functions.configuration.config import StageConfig
from functions.observing.tracing import PASSING, Tracer, read_traceparent
from functions.stage.serving.identity import StageIdentity
from functions.stage.serving.scoring import Scorer
from functions.stage.serving.stage_engine import Readiness, StageEngine
from storage.store.payload_store import PayloadStore

WARM_UP_SECONDS: Final = 600.0
"""Longest time that a warm-up event waits for the weights, whatever its expirytime."""


@dataclass(slots=True)
class Durations:
    """Of one event, seconds."""

    engine: float = 0.0
    """Waiting and computing."""
    codec: float = 0.0


Handler = Callable[[CloudEvent, Durations], CloudEvent]


class EventHandlers:
    """Dispatches by event type."""

    def __init__(self, config: StageConfig, instance: str, readiness: Readiness, tracer: Tracer = PASSING) -> None:
        self._tracer = tracer
        self._identity = StageIdentity.of(config, instance)
        self._readiness = readiness
        claims = ClaimCheck(PayloadStore(config.store), config.store.bucket)
        self._scorer = Scorer(self._identity, readiness, claims, config.pipeline_token)
        self._layers = f"{config.layers[0]}:{config.layers[1]}"
        self.table: dict[str, Handler] = {
            EventType.FORWARD: self._forward,
            EventType.WARMUP: self._warm_up,
            EventType.RESERVE: self._reserve,
            EventType.RELEASE: self._release,
        }

    def answer(self, event: CloudEvent, durations: Durations) -> CloudEvent:
        """The reply. Raises a Problem."""
        handler = self.table.get(event.get_type())
        if handler is None:
            served = ", ".join(self.table)
            raise UnknownEventType(f"{event.get_type()!r} is not served by a stage, which serves {served}")
        self._identity.check_pipeline(event)
        check_not_expired(event, datetime.now(UTC))
        asked = read_traceparent(str(event.get_extension(Attribute.TRACEPARENT)))
        with self._tracer.serve(event.get_type().removeprefix("dev.lamina."), asked, {"lamina.layers": self._layers}) as span:
            reply = handler(event, durations)
            span.end(None, {"lamina.engine_seconds": durations.engine, "lamina.codec_seconds": durations.codec})
        return reply

    def _forward(self, event: CloudEvent, durations: Durations) -> CloudEvent:
        if is_signed(event):  # It came through a Sequence, which passes each reply on and never comes back.
            return self._scorer.answer(event)
        self._identity.check_layer(event)
        engine = self._readiness.engine()
        expires_at = _expires_at(event)
        began = time.perf_counter()
        batch = batch_data(event)
        decoded = time.perf_counter()
        reply = engine.handle(batch, source=event.get_source(), expires_at=expires_at)
        computed = time.perf_counter()
        answer = self._batch_reply(event, reply, engine.free_tokens)
        durations.engine = computed - decoded
        durations.codec = decoded - began + time.perf_counter() - computed
        return answer

    def _batch_reply(self, cause: CloudEvent, batch: Batch, free_tokens: int) -> CloudEvent:
        attributes = self._identity.reply_attributes(free_tokens)
        if not self._identity.is_last_stage:
            attributes[Attribute.LAYER] = self._identity.last
        type_ = EventType.RESULT if self._identity.is_last_stage else EventType.FORWARD
        return batch_event(type_, self._identity.source, batch, id=reply_id(cause), **attributes)

    def _warm_up(self, event: CloudEvent, _: Durations) -> CloudEvent:
        json_data(event, WarmupRequest)
        expiry = expiry_time(event)
        left = WARM_UP_SECONDS if expiry is None else (expiry - datetime.now(UTC)).total_seconds()
        engine = self._readiness.engine(wait_seconds=min(left, WARM_UP_SECONDS))
        return self._json_reply(event, WarmupReply(self._identity.instance, self._readiness.phases()), engine)

    def hand_over(self, query: str) -> tuple[bytearray, int] | None:
        """Keys and values for another instance: the bytes, and how many tokens of the sequence are held, 0 for one that was
        found by its digest. None: they are not held. Raises a Problem."""
        asked = KVQuery.read(query)
        self._identity.check_fingerprint(asked.pipeline)
        self._identity.check_first_layer(asked.layer)
        engine = self._readiness.engine()
        from functions.stage.kv.peer_tier import hand_over  # imports numpy, as the engine has by now

        return hand_over(asked, engine)

    def _reserve(self, event: CloudEvent, _: Durations) -> CloudEvent:
        rows = json_data(event, ReserveRequest).rows
        engine = self._readiness.engine()
        reserved = engine.reserve(rows, source=event.get_source(), expires_at=_expires_at(event))
        return self._json_reply(event, ReserveReply(tuple(reserved), engine.has_prefix_cache), engine)

    def _release(self, event: CloudEvent, _: Durations) -> CloudEvent:
        rows = json_data(event, ReleaseRequest).rows
        engine = self._readiness.engine()
        source, awaits_room = event.get_source(), event.get_extension(Attribute.AWAITED_TOKENS) is not None
        released = engine.release(rows, source=source) if rows or not awaits_room else 0
        if awaits_room:
            tokens = integer_attribute(event, Attribute.AWAITED_TOKENS)
            engine.await_memory(tokens, source=source, expires_at=_expires_at(event))
        return self._json_reply(event, ReleaseReply(released), engine)

    def _json_reply(self, cause: CloudEvent, value: Struct, engine: StageEngine) -> CloudEvent:
        attributes = self._identity.reply_attributes(engine.free_tokens)
        return json_event(cause.get_type(), self._identity.source, value, id=reply_id(cause), **attributes)


def _expires_at(event: CloudEvent) -> float | None:
    """Seconds since the epoch."""
    expiry = expiry_time(event)
    return None if expiry is None else expiry.timestamp()
