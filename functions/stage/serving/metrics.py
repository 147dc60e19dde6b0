"""What a stage measures."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from prometheus_client import Counter, Gauge, Histogram

from eventing.problems import PROBLEMS
from eventing.wire.events import EventType, Status
from eventing.wire.kv_query import KV_PATH
from functions.observing.telemetry import STEP_SECONDS, FunctionMetrics

if TYPE_CHECKING:
    from functions.stage.engine.engine import PassStatistics
    from functions.stage.engine.kv_tiers import Reuse

EVENT_TYPES: Final = (EventType.FORWARD, EventType.WARMUP, EventType.RESERVE, EventType.RELEASE, KV_PATH, "unknown", "unread")
TIERS: Final = ("peer", "store")
STATUSES: Final = ("200", *sorted({str(problem.status) for problem in PROBLEMS.values()}))


class StageMetrics(FunctionMetrics):
    def __init__(self) -> None:
        super().__init__()
        registry = self.registry
        self.events = Counter("lamina_stage_events", "Events answered", ["type", "status"], registry=registry)
        self.in_flight = Gauge("lamina_stage_events_in_flight", "Events that are being answered", registry=registry)
        self.rows = Counter("lamina_stage_rows", "Rows answered", ["status"], registry=registry)
        # From 0 on, or a rate would not see the first of a kind.
        for type_ in EVENT_TYPES:
            for status in STATUSES:
                self.events.labels(type_, status)
        self._rows = {status: self.rows.labels(str(status)) for status in Status}
        self.tokens = Counter("lamina_stage_tokens", "Tokens that went through the layers", registry=registry)
        self.queue = Histogram(
            "lamina_stage_queue_seconds", "An event waited in the stage", buckets=STEP_SECONDS, registry=registry
        )
        self.compute = Histogram(
            "lamina_stage_compute_seconds", "One pass through the layers", buckets=STEP_SECONDS, registry=registry
        )
        self.codec = Histogram(
            "lamina_stage_codec_seconds", "Decoding and encoding of an event", buckets=STEP_SECONDS, registry=registry
        )

        self.restored_bytes, self.restore_seconds, self.restores_failed = (
            Counter(f"lamina_stage_kv_{name}", meaning, ["tier"], registry=registry)
            for name, meaning in (
                ("restored_bytes", "Keys and values that came from a tier"),
                ("restore_seconds", "That was waited for a tier, also where it had nothing"),
                ("restores_failed", "A tier was away, slow, or had what is not to be used"),
            )
        )
        self.kept_bytes = Counter("lamina_stage_kv_kept_bytes", "Of conversations, written to the store", registry=registry)
        self.handed_over_bytes = Counter("lamina_stage_kv_handed_over_bytes", "To other instances", registry=registry)
        for tier in TIERS:
            for counter in (self.restored_bytes, self.restore_seconds, self.restores_failed):
                counter.labels(tier)
        self.kv_hits = Counter("lamina_stage_kv_hits", "Reservations that found something held", ["tier"], registry=registry)
        self.kv_tokens = Counter(
            "lamina_stage_kv_tokens", "Tokens that were found and not computed", ["tier"], registry=registry
        )
        self.kv_saved = Counter(
            "lamina_stage_kv_saved_seconds", "What computing them would have taken", ["tier"], registry=registry
        )
        for tier in ("memory", *TIERS):
            for counter in (self.kv_hits, self.kv_tokens, self.kv_saved):
                counter.labels(tier)

        self.weights_bytes = Gauge("lamina_stage_weights_bytes", "Of this stage's objects in the store", registry=registry)
        self.loaded_bytes = Gauge(
            "lamina_stage_loaded_bytes", "How many of them have come in and are verified", registry=registry
        )

    def observe_pass(self, statistics: "PassStatistics") -> None:
        for seconds in statistics.queue_seconds:
            self.queue.observe(seconds)
        self.compute.observe(statistics.compute_seconds)
        self.tokens.inc(statistics.tokens)
        for status in set(statistics.rows):
            self._rows[status].inc(statistics.rows.count(status))

    def observe_restore(self, tier: str, *, num_bytes: int, seconds: float, failed: bool) -> None:
        self.restored_bytes.labels(tier).inc(num_bytes)
        self.restore_seconds.labels(tier).inc(seconds)
        self.restores_failed.labels(tier).inc(failed)

    def observe_reuse(self, reuse: "Reuse") -> None:
        self.kv_hits.labels(reuse.tier).inc()
        self.kv_tokens.labels(reuse.tier).inc(reuse.tokens)
        self.kv_saved.labels(reuse.tier).inc(reuse.saved_seconds)

    def watch(
        self,
        free_tokens: Callable[[], float],
        sequences: Callable[[], float],
        remembered_tokens: Callable[[], float],
        kv_resident_bytes: Callable[[], float],
    ) -> None:
        """Reads the engine whenever the metrics are read."""
        registry = self.registry
        Gauge("lamina_stage_free_tokens", "KV tokens that can still be reserved", registry=registry).set_function(free_tokens)
        Gauge("lamina_stage_sequences", "Sequences that hold KV", registry=registry).set_function(sequences)
        Gauge(
            "lamina_stage_kv_remembered_tokens", "KV tokens of ended sequences, which count as free", registry=registry
        ).set_function(remembered_tokens)
        Gauge(
            "lamina_stage_kv_resident_bytes", "Of LAMINA_KV_CACHE_BYTES, what has been used once", registry=registry
        ).set_function(kv_resident_bytes)
