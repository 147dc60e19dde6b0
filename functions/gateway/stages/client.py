"""Sends events to instances of stages, and walks a step's trip through all stages.

If an event as a whole fails, `StageFailed` is raised (`failures`). If one row fails, the reply's row says so.

On a trip, while every row is ok, the body of a stage's reply becomes the body of the next request, byte for byte. Only its
table is read. Rows that are not ok are left out of the next request, without harm to the others.
"""

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Final, Protocol, TypeVar

import msgspec
from msgspec import Struct

from eventing.http.binding import to_binary_http
from eventing.http.delivery import DeliveryError, HttpReply, RequestTarget, RequestTemplate, Sender
from eventing.problems import MalformedEvent, Problem
from eventing.wire.batch_codec import decode_batch, encode_batch, select_rows
from eventing.wire.cloud_event import make_event
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
from eventing.wire.events import BATCH_CONTENT_TYPE, Attribute, Batch, EventType, Status
from eventing.wire.framing import JSON_CONTENT_TYPE, Buffer, event_lines, read_attributes, read_json
from eventing.wire.prefix_chain import LINEAGE
from functions.gateway.stages.failures import StageFailed, stage_failed
from functions.gateway.stages.routes import FifoLock, Instance
from functions.observing.tracing import PASSING, Attributes, Span, TraceContext, Tracer

START_SECONDS: Final = 2.0  # reply timeout of a question how far a start is
RESERVATION_SECONDS: Final = 10.0  # reply timeout of a reservation, for an instance that has not failed lately

_MS: Final = r"([0-9]{1,9}\.[0-9]{1,9})"
_TIMING: Final = re.compile(rf"engine;dur={_MS}(?:.*?, pass;dur={_MS};desc=([0-9]{{1,9}}))?")
Traces = Sequence[TraceContext]  # of the sequences that an event is sent for
S = TypeVar("S", bound=Struct)


@dataclass(frozen=True, slots=True)
class ReplyOrigin:
    """Where a reply came from: the instance, and the boot, free memory and lineage that the reply states."""

    instance: Instance
    boot: str  # the `instance` attribute: a name with a nonce of its boot
    free_tokens: int | None  # KV tokens that can still be reserved there; None: not said
    before: str = ""  # the lineage that the event carried
    lineage: str = ""  # that the reply states; empty: none


@dataclass(frozen=True, slots=True)
class ForwardReply:
    """A stage's decoded reply to a forward event. Token ids and tensor of `batch` share the memory of `body`."""

    origin: ReplyOrigin
    batch: Batch
    body: memoryview
    exchange_seconds: float = 0.0  # from the request's first byte to the reply's last
    engine_seconds: float | None = None  # part of exchange_seconds: queueing and compute at the stage; None: not reported
    pass_seconds: float = 0.0  # part of engine_seconds: the forward pass that computed the event; 0: not reported
    pass_tokens: int = 0  # of all events in that pass


@dataclass(frozen=True, slots=True)
class PipelineIdentity:
    """Identifies the pipeline and this gateway in every event to a stage."""

    fingerprint: str
    token: str
    source: str  # the gateway with a nonce of its boot; a stage keeps each source's sequences apart
    first_layers: tuple[int, ...]  # per stage


class StageClient:
    """Sends events to the stages, one method per event type. Thread-safe."""

    def __init__(
        self,
        sender: Sender,
        identity: PipelineIdentity,
        step_timeout_seconds: float,
        tracer: Tracer = PASSING,
        *,
        pods_only: bool = False,
    ) -> None:
        """If `pods_only`, sends nothing confidential to a Service URL, because the way there is not encrypted."""
        self._pods_only = pods_only
        self._sender = sender
        self._identity = identity
        self._step_timeout_seconds = step_timeout_seconds
        self._tracer = tracer

    def forward(
        self,
        instance: Instance,
        body: Sequence[Buffer],
        ids: Sequence[str],
        deadline: float,
        traces: Traces = (),
        lineage: str = "",
    ) -> ForwardReply:
        """Sends one step to one stage and returns the reply. Raises StageFailed.

        `body` is an encoded Batch, and `ids` are the ids of its rows, in their order. `deadline` is that of the clients, in
        time.monotonic(). `traces` belong to the rows' sequences. `lineage` is that of the hidden states, from the reply of the
        stage before. It is empty if it is unknown or there is none.
        """
        timeout, client_deadline = _time_left(self._step_timeout_seconds, deadline)
        with instance.in_flight, self._span(instance, EventType.FORWARD, traces) as span:
            sent = time.perf_counter()
            extensions = ((Attribute.LINEAGE.value, lineage),) if lineage else ()
            reply = self._send(instance, EventType.FORWARD, body, timeout, span.context, client_deadline, extensions)
            exchange_seconds = time.perf_counter() - sent
        try:
            origin = _origin(instance, read_attributes(reply.headers.items()), lineage)
            batch = decode_batch(reply.body)
            if (seen := [row.id for row in batch.rows]) != list(ids):
                raise MalformedEvent(f"the reply has rows {seen}, sent were {list(ids)}")
        except Problem as error:
            raise StageFailed(instance.stage, "malformed", f"its reply: {error}", blames=True) from error
        timing = _TIMING.search(reply.headers.get("server-timing", ""))
        if timing is None:
            return ForwardReply(origin, batch, reply.body, exchange_seconds)
        engine, in_pass, tokens = timing.groups("0")
        return ForwardReply(
            origin, batch, reply.body, exchange_seconds, float(engine) / 1000, float(in_pass) / 1000, int(tokens)
        )

    def reserve(
        self, instance: Instance, rows: Sequence[ReserveRow], deadline: float, traces: Traces = (), lineage: str = ""
    ) -> tuple[ReplyOrigin, ReserveReply]:
        """Reserves memory for sequences at one instance. Each row of the reply has its own status. Raises StageFailed.

        `lineage` is that of the hidden states that the stage will get, as for `forward`.

        A stage replies between two forward passes, so this may take as long as one. The timeout is shorter than that of a step:
        if an instance accepts the connection and does not reply, another one is asked soon. The timeout doubles with every
        failure, because some stages have long passes.
        """
        seconds = min(self._step_timeout_seconds, RESERVATION_SECONDS * 2 ** min(instance.failures, 8))
        timeout, client_deadline = _time_left(seconds, deadline)
        extensions = ((Attribute.LINEAGE.value, lineage),) if lineage else ()
        request = ReserveRequest(tuple(rows))
        attributes, reply = self._call(
            instance, EventType.RESERVE, request, ReserveReply, timeout, traces, extensions, client_deadline
        )
        if [(row.id, row.attempt) for row in reply.rows] != [(row.id, row.attempt) for row in rows]:
            raise StageFailed(instance.stage, "malformed", "its reply to a reservation has other rows than the request")
        return _origin(instance, attributes, lineage), reply

    def release(self, instance: Instance, rows: Sequence[ReleaseRow], awaited_tokens: int = 0) -> ReplyOrigin:
        """Frees the memory of sequences at one instance and renews this gateway's lease there. Raises StageFailed.

        Without rows it only renews the lease. If `awaited_tokens` is not 0, the stage holds its reply until it could reserve
        that many KV tokens, at most HOLD_SECONDS.
        """
        timeout = self._step_timeout_seconds if rows else min(RENEWAL_SECONDS, self._step_timeout_seconds)
        extensions = [(Attribute.AWAITED_TOKENS.value, str(awaited_tokens))] if awaited_tokens else []
        request = ReleaseRequest(tuple(rows))
        attributes, _ = self._call(instance, EventType.RELEASE, request, ReleaseReply, timeout, extensions=extensions)
        return _origin(instance, attributes)

    def warm_up(self, stage: int, url: str, timeout_seconds: float) -> WarmupReply:
        """Wakes a stage by its Service URL and returns once its weights are loaded. Raises StageFailed."""
        if self._pods_only:  # a question without the token wakes it as well
            try:
                self._sender.get(f"{url}/readyz", {}, timeout_seconds)
            except (DeliveryError, Problem) as error:
                raise stage_failed(stage, error) from error
            return WarmupReply("")
        return self._call(Instance(stage, url), EventType.WARMUP, WarmupRequest(), WarmupReply, timeout_seconds)[1]

    def start_so_far(self, instance: Instance) -> WarmupReply:
        """Asks an instance that is not ready how far it has started. Raises StageFailed."""
        return self._call(instance, EventType.WARMUP, WarmupRequest(wait=False), WarmupReply, START_SECONDS)[1]

    def _call(
        self,
        instance: Instance,
        event_type: EventType,
        request: Struct,
        reply_type: type[S],
        timeout_seconds: float,
        traces: Traces = (),
        extensions: Sequence[tuple[str, str]] = (),
        client_deadline: float | None = None,
    ) -> tuple[dict[str, str], S]:
        """Sends one JSON event and returns the attributes and the data of its reply. Raises StageFailed.

        `client_deadline` is the clients' deadline, in time.monotonic(), if it limits `timeout_seconds`. Otherwise it is None.
        """
        body = [msgspec.json.encode(request)]
        with self._span(instance, event_type, traces) as span:
            reply = self._send(instance, event_type, body, timeout_seconds, span.context, client_deadline, extensions)
            try:
                attributes = read_attributes(reply.headers.items())
                return attributes, read_json(attributes, reply.body, reply_type)
            except Problem as error:
                raise StageFailed(instance.stage, "malformed", f"its reply: {error}") from error

    def _send(
        self,
        instance: Instance,
        event_type: EventType,
        body: Sequence[Buffer],
        timeout_seconds: float,
        trace: TraceContext,
        client_deadline: float | None,
        extensions: Sequence[tuple[str, str]] = (),
    ) -> HttpReply:
        template = instance.templates.get(event_type) or self._make_template(instance, event_type)
        expiry = (datetime.now(UTC) + timedelta(seconds=timeout_seconds)).isoformat()[:-6] + "Z"
        lines = event_lines((("expirytime", expiry), ("traceparent", trace.traceparent), *extensions))
        head = template.head(sum(map(len, body)), lines)
        try:
            return self._sender.deliver(template.target, head, body, time.monotonic() + max(0.001, timeout_seconds))
        except (DeliveryError, Problem) as error:
            raise stage_failed(instance.stage, error, client_deadline) from error

    def _make_template(self, instance: Instance, event_type: EventType) -> RequestTemplate:
        """Makes the part of the request head that all events of one type to `instance` share, and stores it in `instance`."""
        content_type = BATCH_CONTENT_TYPE if event_type is EventType.FORWARD else JSON_CONTENT_TYPE
        own = self._identity
        layer = own.first_layers[instance.stage]
        headers, _ = to_binary_http(
            make_event(event_type, own.source, b"", content_type, pipeline=own.fingerprint, layer=layer)
        )
        del headers["ce-id"], headers["ce-time"]
        headers["authorization"] = f"Bearer {own.token}"
        template = instance.templates[event_type] = RequestTemplate(RequestTarget.of(instance.url), headers)
        return template

    def _span(self, instance: Instance, event_type: EventType, traces: Traces) -> Span:
        attributes: Attributes = {
            "lamina.stage": instance.stage,
            "lamina.sequences": len(traces),
            "url.full": instance.url,
        }
        return self._tracer.send(f"send {event_type.removeprefix('dev.lamina.')}", traces, attributes)


def _time_left(own_seconds: float, deadline: float) -> tuple[float, float | None]:
    """Returns the timeout of a reply in seconds: `own_seconds`, or the time until `deadline` if that is shorter.

    Also returns `deadline` if it limits the timeout, otherwise None.
    """
    left = deadline - time.monotonic()
    return (left, deadline) if left < own_seconds else (own_seconds, None)


def _origin(instance: Instance, attributes: dict[str, str], before: str = "") -> ReplyOrigin:
    free, lineage = attributes.get(Attribute.FREE_TOKENS, ""), attributes.get(Attribute.LINEAGE, "")
    free_tokens = int(free) if free.isdecimal() else None
    return ReplyOrigin(
        instance, attributes.get(Attribute.INSTANCE, ""), free_tokens, before, lineage if LINEAGE.fullmatch(lineage) else ""
    )


@dataclass(frozen=True, eq=False, slots=True)
class Trip:
    """A step under way: its Batch and the instances that it visits.

    Immutable: only the thread that runs `walk` knows which rows are still under way.
    """

    instances: tuple[Instance, ...]
    batch: Batch  # for the first stage: token ids and no tensor
    traces: Mapping[str, TraceContext]  # by row id
    depth: int  # index of the last stage of the trip
    chunks: bool  # it carries prompt chunks, and has queued at the first stage's lock for prompts
    deadline: float  # of the clients, in time.monotonic()


class TripLog(Protocol):
    """Receives what happens on a trip. The thread that runs `walk` calls it."""

    def replied(self, trip: Trip, stage: int, reply: ForwardReply, seconds: float) -> None:
        """Called when `stage` has replied, after `seconds`. Rows that are ok go on to the next stage.

        May raise StageFailed to end the trip.
        """

    def failed(self, trip: Trip, ids: Sequence[str], failure: StageFailed) -> None:
        """Called when the trip has ended at `failure.stage`. `ids` are those of the rows that were on their way there."""

    def first_stage_free(self) -> None:
        """Called when a trip with prompt chunks has left its first stage, so that another may enter it."""


def walk(trip: Trip, client: StageClient, log: TripLog) -> None:
    """Sends a trip to its stages one after the other and returns when it is over.

    Reports replies and failures of stages to `log`. Unexpected errors are raised and not reported.
    """
    turn = trip.instances[0].prompts if trip.chunks else None
    ids = [row.id for row in trip.batch.rows]
    lineage = ""
    try:
        body: Sequence[Buffer] = encode_batch(trip.batch)
        for stage, instance in enumerate(trip.instances[: trip.depth + 1]):
            if turn is not None and stage > 0:
                turn = _next_turn(turn, instance.prompts)
                if stage == 1:
                    log.first_stage_free()
            traces = [trip.traces[id_] for id_ in ids if id_ in trip.traces]
            sent = time.monotonic()
            reply = client.forward(instance, body, ids, trip.deadline, traces, lineage)
            lineage = reply.origin.lineage
            log.replied(trip, stage, reply, time.monotonic() - sent)
            rows = reply.batch.rows
            going = [index for index, row in enumerate(rows) if row.status is Status.OK]
            if len(going) == len(rows):
                body = [reply.body]
                continue
            ids = [rows[index].id for index in going]
            if not ids or stage == trip.depth:
                break
            body = encode_batch(select_rows(reply.batch, going))
    except StageFailed as failure:
        log.failed(trip, ids, failure)
    finally:
        if turn is not None:
            turn.leave()


def _next_turn(left: FifoLock, entered: FifoLock) -> FifoLock:
    """Leaves the last stage's lock `left`, waits for the next stage's lock `entered`, and returns `entered`.

    Queues at the next stage before it leaves the last, so that chunks of one prompt stay in order.
    """
    turn = entered.queue()
    left.leave()
    turn.wait()
    return entered
