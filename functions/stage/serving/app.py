"""Serves a stage over HTTP: authentication, limits on sizes, headers of replies, and the stage's metrics."""

import hmac
import logging
import threading
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Final

import msgspec
from prometheus_client import Counter, Gauge, Histogram

from eventing.http.binding import from_http
from eventing.problems import (
    PROBLEM_CONTENT_TYPE,
    PROBLEMS,
    EventTooLarge,
    MalformedEvent,
    Problem,
    Unauthorized,
)
from eventing.wire.cloud_event import one_piece
from eventing.wire.events import SAFE_EVENT_BYTES, Attribute, EventType, Status
from eventing.wire.framing import Buffer, read_attributes
from eventing.wire.kv_query import HELD_HEADER, KV_PATH
from eventing.wire.signature import verify
from functions.hosting.requests import ADMITTED_BYTES, REFUSED
from functions.observing.telemetry import STEP_SECONDS, FunctionMetrics
from functions.stage.serving.handlers import EventHandlers

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIEnvironment

    from functions.stage.engine.adapters import LoadedAdapter
    from functions.stage.engine.engine import Engine, PassStatistics
    from functions.stage.engine.kv_tiers import Reuse
    from functions.stage.models.layer_group import ColdExperts

_log: Final = logging.getLogger(__name__)

MAX_EVENT_BYTES: Final = 2**28  # a chunk of 512 tokens of the widest published models takes 32 MiB in fp32
_SIGNATURE: Final = f"HTTP_CE_{Attribute.SIGNATURE.upper()}"

EVENT_TYPES: Final = (EventType.FORWARD, EventType.WARMUP, EventType.RESERVE, EventType.RELEASE, KV_PATH, "unknown", "unread")
TIERS: Final = ("peer", "store")
STATUSES: Final = ("200", *sorted({str(problem.status) for problem in PROBLEMS.values()}))


class StageApp:
    """A WSGI application that answers events at `POST /`, and `GET /kv`.

    It does not use Flask, which took as long for a request as the layers of a small stage (docs/log.md).
    """

    def __init__(self, handlers: EventHandlers, metrics: "StageMetrics", *pipeline_tokens: str) -> None:
        """Accepts requests with any of the bearer tokens `pipeline_tokens`. `handlers` answers their events."""
        self._handlers = handlers
        self._pipeline_tokens = pipeline_tokens
        self._admit = stage_admission(*pipeline_tokens)
        self._metrics = metrics
        self._answered = {type_: metrics.events.labels(type_, "200") for type_ in handlers.table}
        self._lock = threading.Lock()
        self._in_flight = 0
        metrics.in_flight.set_function(lambda: self._in_flight)

    def __call__(self, environ: "WSGIEnvironment", start_response: "StartResponse") -> Iterable[bytes]:
        path, method = environ["PATH_INFO"], environ["REQUEST_METHOD"]
        if path == KV_PATH and method == "GET":
            return self._hand_over(environ, start_response)
        if path != "/" or method != "POST":
            return _refuse_route(start_response, path)
        type_ = "unread"
        with self._lock:
            self._in_flight += 1
        try:
            attributes, data = self._read_event(environ)
            type_ = attributes["type"] if attributes["type"] in self._handlers.table else "unknown"
            reply = self._handlers.answer(attributes, data)
        except Exception as error:  # noqa: BLE001 - the sender is told, and unexpected ones are logged
            return self._refuse(start_response, error, type_)
        finally:
            with self._lock:
                self._in_flight -= 1
        body = b"".join(reply.body)
        headers = [*reply.headers, ("Content-Length", str(len(body)))]
        if reply.engine_seconds:
            self._metrics.codec.observe(reply.codec_seconds)
            timing = (
                f"engine;dur={reply.engine_seconds * 1000:.3f}, codec;dur={reply.codec_seconds * 1000:.3f}, "
                f"pass;dur={reply.pass_seconds * 1000:.3f};desc={reply.pass_tokens}"
            )
            headers.append(("Server-Timing", timing))
        self._answered[type_].inc()
        start_response("200 OK", headers)
        return (body,)

    def _hand_over(self, environ: "WSGIEnvironment", start_response: "StartResponse") -> Iterable[bytes]:
        """Answers `GET /kv`, with which another instance of this stage asks for KV."""
        try:
            _check_token(environ.get("HTTP_AUTHORIZATION", ""), self._pipeline_tokens)
            found = self._handlers.hand_over(environ.get("QUERY_STRING", ""))
        except Exception as error:  # noqa: BLE001 - the sender is told, and unexpected ones are logged
            return self._refuse(start_response, error, KV_PATH)
        if found is None:
            start_response("204 No Content", [])
            return ()
        data, held = found
        self._metrics.handed_over_bytes.inc(len(data))
        length = ("Content-Length", str(len(data)))
        start_response("200 OK", [("Content-Type", "application/octet-stream"), length, (HELD_HEADER, str(held))])
        return (bytes(data),)

    def _refuse(self, start_response: "StartResponse", error: Exception, type_: str) -> Iterable[bytes]:
        """Replies with a problem document for `error`, and counts it. type_: type of the event, for the metrics."""
        if isinstance(error, Problem):
            problem = error
        else:
            _log.error("unexpected error", exc_info=error)
            problem = Problem(f"{type(error).__name__}; the log of this instance has the traceback")
        self._metrics.events.labels(type_, str(problem.status)).inc()
        more = list(problem.headers().items())
        return _reply_problem(start_response, HTTPStatus(problem.status), problem.document(), more)

    def _read_event(self, environ: "WSGIEnvironment") -> tuple[Mapping[str, Any], Buffer]:
        """Reads an event, authenticates its sender, and returns the attributes and data of the event.

        A bearer token or the signature of the event authenticates the sender. Raises Unauthorized, EventExpired if a signature
        is no longer valid, or another Problem that says what is wrong with the event.
        """
        if REFUSED in environ:
            raise environ.pop(REFUSED)  # popped, because the frames of the raised exception's traceback hold the environ
        most: int = environ[ADMITTED_BYTES] if ADMITTED_BYTES in environ else self._admit(environ) or 0
        length = int(environ.get("CONTENT_LENGTH") or 0)
        if length > most:
            raise EventTooLarge(f"the event has {length} bytes, the most is {most}; send fewer tokens at once")
        # All of it in one read, which functions/hosting answers with the memory that it was received into.
        body: bytes = environ["wsgi.input"].read(length)
        if len(body) < length:
            raise MalformedEvent(f"the body ended after {len(body)} of {length} bytes")
        headers = [(name[5:].replace("_", "-"), value) for name, value in environ.items() if name.startswith("HTTP_CE_")]
        content_type = environ.get("CONTENT_TYPE", "")
        if content_type:
            headers.append(("content-type", content_type))
        if _SIGNATURE not in environ and not content_type.lower().startswith("application/cloudevents"):
            return read_attributes(headers), body
        event = from_http(headers, body)
        if _is_signed(environ):
            verify(event, *self._pipeline_tokens)
        return event.get_attributes(), one_piece(event)


def _refuse_route(start_response: "StartResponse", path: str) -> Iterable[bytes]:
    """Replies to a request whose path is unknown (404), or whose method is not that of the path (405)."""
    method = {"/": "POST", KV_PATH: "GET"}.get(path)
    status = HTTPStatus.NOT_FOUND if method is None else HTTPStatus.METHOD_NOT_ALLOWED
    detail = f"a stage answers POST / and GET {KV_PATH}"
    document = {"type": "about:blank", "title": status.phrase, "status": status, "detail": detail}
    return _reply_problem(start_response, status, msgspec.json.encode(document), [] if method is None else [("Allow", method)])


def _reply_problem(
    start_response: "StartResponse", status: HTTPStatus, document: bytes, headers: list[tuple[str, str]]
) -> Iterable[bytes]:
    start_response(f"{status.value} {status.phrase}", [("Content-Type", PROBLEM_CONTENT_TYPE), *headers])
    return [document]


def stage_admission(*pipeline_tokens: str) -> "Callable[[WSGIEnvironment], int | None]":
    """Returns a function that decides from the head of a request how many bytes of body the request may have.

    The function returns None for a request whose body is not to be read. It raises Unauthorized for an unknown sender, so that
    the body of a stranger is not read.
    """

    def admit(environ: "WSGIEnvironment") -> int | None:
        if environ["PATH_INFO"] != "/" or environ["REQUEST_METHOD"] != "POST":
            return None
        if _SIGNATURE in environ and _is_signed(environ):
            # A channel passes on no more than this. The signature is seen only after the body was read.
            return SAFE_EVENT_BYTES
        _check_token(environ.get("HTTP_AUTHORIZATION", ""), pipeline_tokens)
        return MAX_EVENT_BYTES

    return admit


def _is_signed(environ: "WSGIEnvironment") -> bool:
    """Whether an event carries a signature instead of a token.

    Only events in binary mode count, which is how gateway and stages send signed events. JSON of a stranger is never parsed to
    look for a signature.
    """
    structured = environ.get("CONTENT_TYPE", "").lower().startswith("application/cloudevents")
    return _SIGNATURE in environ and "HTTP_AUTHORIZATION" not in environ and not structured


def _check_token(given: str, pipeline_tokens: tuple[str, ...]) -> None:
    known = False
    for token in pipeline_tokens:  # all of them, so that the time does not tell which one is right
        known |= hmac.compare_digest(given.encode(), f"Bearer {token}".encode())
    if not known:
        seen = "no Authorization header" if not given else "another token"
        raise Unauthorized(f"{seen}; send Authorization: Bearer with the pipeline token")


class StageMetrics(FunctionMetrics):
    """The metrics of a stage."""

    def __init__(self) -> None:
        super().__init__()
        counter, gauge = partial(Counter, registry=self.registry), partial(Gauge, registry=self.registry)
        histogram = partial(Histogram, buckets=STEP_SECONDS, registry=self.registry)
        self.events = counter("lamina_stage_events", "Events answered", ["type", "status"])
        self.in_flight = gauge("lamina_stage_events_in_flight", "Events that are being answered")
        self.rows = counter("lamina_stage_rows", "Rows answered", ["status"])
        self.tokens = counter("lamina_stage_tokens", "Tokens that went through the layers")
        self.queue = histogram("lamina_stage_queue_seconds", "An event waited in the stage")
        self.compute = histogram("lamina_stage_compute_seconds", "One pass through the layers")
        self.codec = histogram("lamina_stage_codec_seconds", "Decoding and encoding of an event")

        kv = partial(counter, labelnames=["tier"])
        self.restored_bytes = kv("lamina_stage_kv_restored_bytes", "Bytes of keys and values restored from a tier")
        self.restore_seconds = kv("lamina_stage_kv_restore_seconds", "Seconds of waiting for a tier, found or not")
        self.restores_failed = kv("lamina_stage_kv_restores_failed", "A tier was unavailable, slow, or had unusable data")
        self.kv_hits = kv("lamina_stage_kv_hits", "Reservations that found a cached prefix")
        self.kv_tokens = kv("lamina_stage_kv_tokens", "Tokens of cached prefixes, which were not computed")
        self.kv_saved = kv("lamina_stage_kv_saved_seconds", "Seconds that computing them would have taken")
        self.kept_bytes = counter("lamina_stage_kv_kept_bytes", "Bytes of idle conversations written to the store")
        self.handed_over_bytes = counter("lamina_stage_kv_handed_over_bytes", "Bytes handed over to other instances")

        self.adapter_loads = counter("lamina_stage_adapter_loads", "Adapters loaded from the store, or not", ["outcome"])
        self.adapter_seconds = histogram("lamina_stage_adapter_load_seconds", "An adapter was loaded")

        self.weights_bytes = gauge("lamina_stage_weights_bytes", "Bytes of this stage's objects in the store")
        self.loaded_bytes = gauge("lamina_stage_loaded_bytes", "Bytes of them that were loaded and verified")

        self._experts = {  # by field of ColdExperts
            "found": gauge("lamina_stage_experts_found", "Experts that a layer used and found in memory"),
            "read": gauge("lamina_stage_experts_read", "Experts that a layer used and read from the weight cache"),
            "resident_bytes": gauge("lamina_stage_expert_bytes", "Bytes of experts in memory that may be dropped"),
        }

        # Every series starts at 0, or a rate would miss its first increment.
        for type_ in EVENT_TYPES:
            for status in STATUSES:
                self.events.labels(type_, status)
        for outcome in ("loaded", "failed"):
            self.adapter_loads.labels(outcome)
        self._rows = {status: self.rows.labels(str(status)) for status in Status}
        for tier in TIERS:
            for metric in (self.restored_bytes, self.restore_seconds, self.restores_failed):
                metric.labels(tier)
        for tier in ("memory", *TIERS):
            for metric in (self.kv_hits, self.kv_tokens, self.kv_saved):
                metric.labels(tier)

    def observe_pass(self, statistics: "PassStatistics") -> None:
        for seconds in statistics.queue_seconds:
            self.queue.observe(seconds)
        self.compute.observe(statistics.compute_seconds)
        self.tokens.inc(statistics.tokens)
        for status in set(statistics.rows):
            self._rows[status].inc(statistics.rows.count(status))

    def observe_restore(self, tier: str, num_bytes: int, seconds: float, failed: bool) -> None:
        self.restored_bytes.labels(tier).inc(num_bytes)
        self.restore_seconds.labels(tier).inc(seconds)
        self.restores_failed.labels(tier).inc(failed)

    def observe_adapter(self, loaded: "LoadedAdapter") -> None:
        self.adapter_loads.labels("failed" if loaded.failed else "loaded").inc()
        self.adapter_seconds.observe(loaded.seconds)

    def observe_reuse(self, reuse: "Reuse") -> None:
        self.kv_hits.labels(reuse.tier).inc()
        self.kv_tokens.labels(reuse.tier).inc(reuse.tokens)
        self.kv_saved.labels(reuse.tier).inc(reuse.saved_seconds)

    def watch_experts(self, cold_experts: "Callable[[], ColdExperts]") -> None:
        """Calls `cold_experts` for the metrics of experts whenever the metrics are scraped.

        Call this for a stage with a weights budget. Without the call these metrics stay 0.
        """
        for field, metric in self._experts.items():
            metric.set_function(partial(lambda field: float(getattr(cold_experts(), field)), field))

    def watch(self, engine: "Engine") -> None:
        """Registers gauges that read numbers from the engine whenever the metrics are scraped."""
        for name, help_text, read in (
            ("free_tokens", "KV tokens that can still be reserved", lambda: engine.cache.free_tokens),
            ("sequences", "Sequences that hold KV", lambda: len(engine.sequences.by_id)),
            ("kv_remembered_tokens", "KV tokens of ended sequences, which count as free", lambda: engine.cache.cached_tokens),
            (
                "kv_resident_bytes",
                "Bytes of LAMINA_KV_CACHE_BYTES that have been used once",
                lambda: engine.kv.resident_bytes,
            ),
            (
                "checkpoint_bytes",
                "Bytes of recurrent states that sequences can go back to",
                lambda: 0 if (kv := engine.cache.blocks) is None else len(kv.checkpoints) * kv.layout.state_bytes,
            ),
            ("adapters", "Adapters in memory", lambda: engine.adapters.loaded),
            ("adapter_bytes", "Bytes of memory that they take", lambda: engine.adapters.loaded_bytes),
        ):
            Gauge(f"lamina_stage_{name}", help_text, registry=self.registry).set_function(read)
