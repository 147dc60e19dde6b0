"""Answers each type of event that a stage gets. Knows events and an engine, but not the HTTP server."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final, Self

import msgspec
from cloudevents.core.v1.event import CloudEvent
from msgspec import Struct

from eventing.http.binding import to_binary_http
from eventing.problems import MalformedEvent, UnknownEventType, WrongLayer, WrongPipeline
from eventing.wire.batch_codec import encode_batch
from eventing.wire.cloud_event import event_of, make_event
from eventing.wire.control import (
    ReleaseReply,
    ReleaseRequest,
    ReserveReply,
    ReserveRequest,
    WarmupReply,
    WarmupRequest,
)
from eventing.wire.events import BATCH_CONTENT_TYPE, Attribute, EventType
from eventing.wire.framing import (
    JSON_CONTENT_TYPE,
    Buffer,
    ReplyTemplate,
    check_not_expired,
    integer_attribute,
    read_batch,
    read_json,
    reply_id_of,
    required_attribute,
)
from eventing.wire.kv_query import KVQuery
from eventing.wire.prefix_chain import LINEAGE
from functions.configuration.config import StageConfig
from functions.hosting.startup import StartUp
from functions.observing.tracing import PASSING, Tracer, read_traceparent

if TYPE_CHECKING:
    from functions.stage.engine.engine import Engine  # imports numpy, which a start must not wait for

WARM_UP_SECONDS: Final = 600.0  # a warm-up event waits at most this long for the weights, whatever its expirytime

Attributes = Mapping[str, Any]
EngineSource = Callable[[float], "Engine"]  # waits at most so many seconds for the engine's start, then raises NotReady


@dataclass(frozen=True, slots=True)
class StageIdentity:
    """Which layers [first, last) of which pipeline this stage runs, and the name of this instance."""

    pipeline: str
    first: int
    last: int
    is_last_stage: bool
    instance: str

    @classmethod
    def of(cls, config: StageConfig, instance: str) -> Self:
        first, last = config.layers
        return cls(config.pipeline, first, last, config.layers == config.cut[-1], instance)

    @property
    def source(self) -> str:
        """The CloudEvents source of all replies.

        All instances of the stage share it, so that a repeated delivery gets the same reply from any instance.
        """
        return f"/pipelines/{self.pipeline}/stages/{self.first}-{self.last}"

    def check_pipeline(self, seen: str) -> None:
        """Raises WrongPipeline if `seen`, the fingerprint of a pipeline in an event, is not that of this pipeline."""
        if seen != self.pipeline:
            raise WrongPipeline(
                f"the event is of pipeline {seen!r} and this stage of {self.pipeline!r}; send it to its own pipeline's stage"
            )

    def check_layer(self, layer: int) -> None:
        """Raises WrongLayer if `layer`, the next layer for an event, is not the first layer of this stage."""
        if layer != self.first:
            raise WrongLayer(f"the event wants layer {layer} and this stage runs {self.first} to {self.last - 1}")


@dataclass(slots=True)
class EventReply:
    """Headers and body of a reply. The reply to a forward event also has the times that it took."""

    headers: Sequence[tuple[str, str]]
    body: Sequence[Buffer]
    engine_seconds: float = 0.0  # queueing and compute
    codec_seconds: float = 0.0
    pass_seconds: float = 0.0  # of the pass that computed the event
    pass_tokens: int = 0  # of all events in that pass


Handler = Callable[[Attributes, Buffer, float | None], EventReply]  # the float: when the event expires, in time.time()


class EventHandlers:
    """Answers events, with one handler per event type."""

    def __init__(
        self,
        identity: StageIdentity,
        engine: EngineSource,
        score: Callable[[CloudEvent], CloudEvent],
        start_up: StartUp,
        tracer: Tracer = PASSING,
    ) -> None:
        """Prepares the headers of replies.

        score: answers a signed forward event, which a Sequence of Knative Eventing delivers (see `scoring`).
        """
        self._identity = identity
        self._engine = engine
        self._start_up = start_up
        self._score = score
        self._tracer = tracer
        self._layers = f"{identity.first}:{identity.last}"
        onward_type, next_layer = (EventType.RESULT, None) if identity.is_last_stage else (EventType.FORWARD, identity.last)
        self._batch_reply = self._template(onward_type, BATCH_CONTENT_TYPE, next_layer)
        self._json_replies = {
            type_: self._template(type_, JSON_CONTENT_TYPE)
            for type_ in (EventType.WARMUP, EventType.RESERVE, EventType.RELEASE)
        }
        self.table: dict[str, Handler] = {
            EventType.FORWARD: self._forward,
            EventType.WARMUP: self._warm_up,
            EventType.RESERVE: self._reserve,
            EventType.RELEASE: self._release,
        }

    def answer(self, attributes: Attributes, data: Buffer) -> EventReply:
        """Checks an event's pipeline and expiry, and returns the reply of the handler for its type.

        Raises a Problem if the event is refused.
        """
        type_ = attributes["type"]
        handler = self.table.get(type_)
        if handler is None:
            raise UnknownEventType(f"{type_!r} is not served by a stage, which serves {', '.join(self.table)}")
        self._identity.check_pipeline(required_attribute(attributes, Attribute.PIPELINE))
        expiry = check_not_expired(attributes, datetime.now(UTC))
        asked = read_traceparent(attributes.get(Attribute.TRACEPARENT))
        with self._tracer.serve(type_.removeprefix("dev.lamina."), asked, {"lamina.layers": self._layers}) as span:
            reply = handler(attributes, data, None if expiry is None else expiry.timestamp())
            span.end(None, {"lamina.engine_seconds": reply.engine_seconds, "lamina.codec_seconds": reply.codec_seconds})
        return reply

    def hand_over(self, query: str) -> tuple[bytearray, int] | None:
        """Returns KV for another instance, and how many tokens of the named sequence are held. None if the KV is not held.

        The number is 0 if the KV was found by its digest. query: the query string of a KVQuery. Raises a Problem.
        """
        asked = KVQuery.read(query)
        self._identity.check_pipeline(asked.pipeline)
        self._identity.check_layer(asked.layer)
        engine = self._engine(0.0)
        from functions.stage.kv.peer_tier import hand_over  # imports numpy, as the engine has by now

        return hand_over(asked, engine)

    def _forward(self, attributes: Attributes, data: Buffer, expires_at: float | None) -> EventReply:
        if Attribute.SIGNATURE in attributes:  # from a Sequence, which passes each reply on
            headers, body = to_binary_http(self._score(event_of(attributes, data)))
            return EventReply(list(headers.items()), body)
        self._identity.check_layer(integer_attribute(attributes, Attribute.LAYER))
        engine = self._engine(0.0)
        began = time.perf_counter()
        batch = read_batch(attributes, data)
        decoded = time.perf_counter()
        before = self._lineage(attributes)
        event = engine.compute(batch, source=attributes["source"], expires_at=expires_at, lineage=before)
        result = event.result()
        computed = time.perf_counter()
        reply = EventReply(self._headers(self._batch_reply, attributes, engine, engine.lineage(before)), encode_batch(result))
        reply.engine_seconds = computed - decoded
        reply.pass_seconds, reply.pass_tokens = event.pass_seconds, event.pass_tokens
        reply.codec_seconds = decoded - began + time.perf_counter() - computed
        return reply

    def _warm_up(self, attributes: Attributes, data: Buffer, expires_at: float | None) -> EventReply:
        engine = None
        if read_json(attributes, data, WarmupRequest).wait:
            left = WARM_UP_SECONDS if expires_at is None else expires_at - time.time()
            engine = self._engine(min(left, WARM_UP_SECONDS))
        own = self._start_up
        reply = WarmupReply(self._identity.instance, own.phases(), own.loaded_bytes, own.total_bytes)
        return self._json_reply(attributes, reply, engine)

    def _reserve(self, attributes: Attributes, data: Buffer, expires_at: float | None) -> EventReply:
        rows = read_json(attributes, data, ReserveRequest).rows
        engine = self._engine(0.0)
        before = self._lineage(attributes)
        reserved = engine.reserve(rows, source=attributes["source"], expires_at=expires_at, lineage=before)
        reply = ReserveReply(tuple(reserved), engine.cache.blocks is not None)
        return self._json_reply(attributes, reply, engine, engine.lineage(before))

    def _release(self, attributes: Attributes, data: Buffer, expires_at: float | None) -> EventReply:
        rows = read_json(attributes, data, ReleaseRequest).rows
        engine = self._engine(0.0)
        source, awaits_memory = attributes["source"], Attribute.AWAITED_TOKENS in attributes
        released = engine.release(rows, source=source) if rows or not awaits_memory else 0
        if awaits_memory:
            tokens = integer_attribute(attributes, Attribute.AWAITED_TOKENS)
            engine.await_memory(tokens, source=source, expires_at=expires_at)
        return self._json_reply(attributes, ReleaseReply(released), engine)

    def _lineage(self, attributes: Attributes) -> str | None:
        """Returns the lineage that an event states for its hidden states. Empty at the first stage; None if it states none.

        Raises MalformedEvent.
        """
        if self._identity.first == 0:
            return ""
        lineage: str | None = attributes.get(Attribute.LINEAGE)
        if lineage is not None and not LINEAGE.fullmatch(lineage):
            raise MalformedEvent(f"the attribute {Attribute.LINEAGE} is {lineage[:40]!r}; send that of the last stage's reply")
        return lineage

    def _json_reply(self, cause: Attributes, value: Struct, engine: "Engine | None", lineage: str | None = None) -> EventReply:
        headers = self._headers(self._json_replies[cause["type"]], cause, engine, lineage)
        return EventReply(headers, [msgspec.json.encode(value)])

    def _headers(
        self, template: ReplyTemplate, cause: Attributes, engine: "Engine | None", lineage: str | None = None
    ) -> list[tuple[str, str]]:
        extensions = [(Attribute.FREE_TOKENS.value, str(0 if engine is None else engine.cache.free_tokens))]
        if lineage is not None:
            extensions.append((Attribute.LINEAGE.value, lineage))
        return template.headers(reply_id_of(cause["source"], cause["id"]), extensions)

    def _template(self, type_: EventType, content_type: str, next_layer: int | None = None) -> ReplyTemplate:
        own = self._identity
        event = make_event(type_, own.source, b"", content_type, pipeline=own.pipeline, instance=own.instance, layer=next_layer)
        return ReplyTemplate(to_binary_http(event)[0])
