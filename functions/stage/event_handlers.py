"""What a stage answers to each type of event. Knows events and an engine, no HTTP; imports no torch."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final, Protocol

from cloudevents.core.v1.event import CloudEvent

from eventing.cloud_event import (
    batch_data,
    batch_event,
    check_not_expired,
    expiry_time,
    integer_attribute,
    json_data,
    json_event,
    reply_id,
    required_attribute,
)
from eventing.events import Attribute, Batch, EventType, Status
from eventing.generation import (
    ReleaseReply,
    ReleaseRequest,
    ReservedRow,
    ReserveReply,
    ReserveRequest,
    WarmupReply,
    WarmupRequest,
)
from eventing.problems import UnknownEventType, WrongLayer, WrongPipeline
from functions.config import StageConfig

WARM_UP_SECONDS: Final = 600.0
"""Longest time that a warm-up event without expirytime waits for the weights."""


class StageEngine(Protocol):
    """functions.stage.engine.Engine."""

    @property
    def free_tokens(self) -> int: ...

    def handle(self, batch: Batch, *, source: str, expires_at: float | None = None) -> Batch: ...

    def reserve(self, reservations: Sequence[Any], *, source: str) -> list[Status]: ...

    def release(self, releases: Sequence[Any], *, source: str) -> int: ...


class Readiness(Protocol):
    """Who knows when the engine is there."""

    def engine(self, wait_seconds: float = 0.0) -> StageEngine:
        """Raises NotReady."""

    def phases(self) -> dict[str, float]: ...


@dataclass(slots=True)
class Durations:
    """Of one event, seconds."""

    engine: float = 0.0
    """Waiting and computing."""
    codec: float = 0.0


Handler = Callable[[CloudEvent, Durations], CloudEvent]


class EventHandlers:
    """Dispatches by event type."""

    def __init__(self, config: StageConfig, instance: str, readiness: Readiness) -> None:
        self._pipeline = config.pipeline
        self._first, self._last = config.layers
        self._is_last = config.layers == config.cut[-1]
        self._instance = instance
        self._source = f"/pipelines/{config.pipeline}/stages/{self._first}-{self._last}"
        self._readiness = readiness
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
        self._check_pipeline(event)
        check_not_expired(event, datetime.now(UTC))
        return handler(event, durations)

    def _check_pipeline(self, event: CloudEvent) -> None:
        seen = required_attribute(event, Attribute.PIPELINE)
        if seen != self._pipeline:
            raise WrongPipeline(
                f"the event is of pipeline {seen!r} and this stage of {self._pipeline!r}; send it to its own pipeline's stage"
            )

    def _forward(self, event: CloudEvent, durations: Durations) -> CloudEvent:
        layer = integer_attribute(event, Attribute.LAYER)
        if layer != self._first:
            raise WrongLayer(f"the event wants layer {layer} and this stage runs {self._first} to {self._last - 1}")
        engine = self._readiness.engine()
        expiry = expiry_time(event)
        began = time.perf_counter()
        batch = batch_data(event)
        decoded = time.perf_counter()
        reply = engine.handle(batch, source=event.get_source(), expires_at=None if expiry is None else expiry.timestamp())
        computed = time.perf_counter()
        answer = self._batch_reply(event, reply, engine.free_tokens)
        durations.engine = computed - decoded
        durations.codec = decoded - began + time.perf_counter() - computed
        return answer

    def _batch_reply(self, cause: CloudEvent, batch: Batch, free_tokens: int) -> CloudEvent:
        attributes = self._attributes(free_tokens)
        if not self._is_last:
            attributes[Attribute.LAYER] = self._last
        type_ = EventType.RESULT if self._is_last else EventType.FORWARD
        return batch_event(type_, self._source, batch, id=reply_id(cause), **attributes)

    def _warm_up(self, event: CloudEvent, durations: Durations) -> CloudEvent:
        json_data(event, WarmupRequest)
        expiry = expiry_time(event)
        wait = WARM_UP_SECONDS if expiry is None else (expiry - datetime.now(UTC)).total_seconds()
        engine = self._readiness.engine(wait_seconds=wait)
        return self._json_reply(event, WarmupReply(self._instance, self._readiness.phases()), engine)

    def _reserve(self, event: CloudEvent, durations: Durations) -> CloudEvent:
        rows = json_data(event, ReserveRequest).rows
        engine = self._readiness.engine()
        statuses = engine.reserve(rows, source=event.get_source())
        reserved = (ReservedRow(row.id, row.attempt, status) for row, status in zip(rows, statuses, strict=True))
        return self._json_reply(event, ReserveReply(tuple(reserved)), engine)

    def _release(self, event: CloudEvent, durations: Durations) -> CloudEvent:
        rows = json_data(event, ReleaseRequest).rows
        engine = self._readiness.engine()
        return self._json_reply(event, ReleaseReply(engine.release(rows, source=event.get_source())), engine)

    def _json_reply(self, cause: CloudEvent, value: Any, engine: StageEngine) -> CloudEvent:
        attributes = self._attributes(engine.free_tokens)
        return json_event(cause.get_type(), self._source, value, id=reply_id(cause), **attributes)

    def _attributes(self, free_tokens: int) -> dict[str, str | int | bool | datetime | None]:
        return {
            Attribute.PIPELINE: self._pipeline,
            Attribute.INSTANCE: self._instance,
            Attribute.FREE_TOKENS: free_tokens,
        }
