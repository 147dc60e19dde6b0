"""Logs and metrics that every function has. Each application has a registry of its own; nothing is global."""

import logging
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

if TYPE_CHECKING:
    from functions.stage.engine.engine import PassStatistics

STEP_SECONDS: Final = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
"""Buckets for what happens in every step."""

ANSWER_SECONDS: Final = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 60.0, 120.0, 300.0, 600.0)
"""Buckets for what a person waits for."""


def set_up_logging(level: str) -> None:
    """Everything from `level` on goes to stderr, one line each, with time, level and origin."""
    logging.basicConfig(
        level=level.upper(),
        stream=sys.stderr,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        force=True,
    )


class FunctionMetrics:
    """What stage and gateway both measure."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.ready = Gauge("lamina_ready", "1 once the function takes work", registry=self.registry)
        self.startup_phase = Gauge(
            "lamina_startup_phase_seconds",
            "From the start of the process to the end of this phase of its start-up",
            ["phase"],
            registry=self.registry,
        )

    def phase_ended(self, phase: str, seconds: float) -> None:
        self.startup_phase.labels(phase).set(seconds)


class StageMetrics(FunctionMetrics):
    def __init__(self) -> None:
        super().__init__()
        registry = self.registry
        self.events = Counter("lamina_stage_events", "Events answered", ["type", "status"], registry=registry)
        self.in_flight = Gauge("lamina_stage_events_in_flight", "Events that are being answered", registry=registry)
        self.rows = Counter("lamina_stage_rows", "Rows answered", ["status"], registry=registry)
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

        self.weights_bytes = Gauge("lamina_stage_weights_bytes", "Of this stage's objects in the store", registry=registry)
        self.loaded_bytes = Gauge(
            "lamina_stage_loaded_bytes", "How many of them have come in and are verified", registry=registry
        )

    def observe_pass(self, statistics: "PassStatistics") -> None:
        for seconds in statistics.queue_seconds:
            self.queue.observe(seconds)
        self.compute.observe(statistics.compute_seconds)
        self.tokens.inc(statistics.tokens)
        for status in statistics.rows:
            self.rows.labels(str(status)).inc()

    def watch(self, free_tokens: Callable[[], float], sequences: Callable[[], float]) -> None:
        """Reads the engine whenever the metrics are read."""
        registry = self.registry
        Gauge("lamina_stage_free_tokens", "KV tokens that can still be reserved", registry=registry).set_function(free_tokens)
        Gauge("lamina_stage_sequences", "Sequences that hold KV", registry=registry).set_function(sequences)


class GatewayMetrics(FunctionMetrics):
    def __init__(self) -> None:
        super().__init__()
        registry = self.registry
        self.answers = Counter("lamina_gateway_answers", "Answers by how they ended", ["outcome"], registry=registry)
        self.prompt_tokens = Counter("lamina_gateway_prompt_tokens", "Tokens of prompts taken in", registry=registry)
        self.tokens = Counter("lamina_gateway_tokens", "Tokens generated", registry=registry)
        self.first_token = Histogram(
            "lamina_gateway_time_to_first_token_seconds",
            "From the request to its first token",
            buckets=ANSWER_SECONDS,
            registry=registry,
        )
        self.inter_token = Histogram(
            "lamina_gateway_inter_token_latency_seconds",
            "From one token of an answer to its next",
            buckets=STEP_SECONDS,
            registry=registry,
        )
        self.answer = Histogram(
            "lamina_gateway_answer_seconds", "From the request to its last token", buckets=ANSWER_SECONDS, registry=registry
        )
