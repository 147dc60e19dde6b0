"""The metrics of a stage."""

from collections.abc import Callable
from functools import partial
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

        self.weights_bytes = gauge("lamina_stage_weights_bytes", "Bytes of this stage's objects in the store")
        self.loaded_bytes = gauge("lamina_stage_loaded_bytes", "Bytes of them that were loaded and verified")

        # Every series starts at 0, or a rate would miss its first increment.
        for type_ in EVENT_TYPES:
            for status in STATUSES:
                self.events.labels(type_, status)
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
        """Registers gauges that read the engine when the metrics are scraped."""
        for name, help_text, read in (
            ("free_tokens", "KV tokens that can still be reserved", free_tokens),
            ("sequences", "Sequences that hold KV", sequences),
            ("kv_remembered_tokens", "KV tokens of ended sequences, which count as free", remembered_tokens),
            ("kv_resident_bytes", "Bytes of LAMINA_KV_CACHE_BYTES that have been used once", kv_resident_bytes),
        ):
            Gauge(f"lamina_stage_{name}", help_text, registry=self.registry).set_function(read)
