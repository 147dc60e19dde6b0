"""Metrics of batches. No label names a client, a file or a batch."""

from typing import Final, get_args

from prometheus_client import CollectorRegistry, Counter, Gauge

from functions.gateway.jobs.batches import EndStatus
from functions.gateway.jobs.lines import LineResult

_OUTCOMES: Final = ("answered", "failed", "given_up")


class BatchMetrics:
    def __init__(self, registry: CollectorRegistry) -> None:
        self.open = Gauge("lamina_gateway_open_batches", "Batches that have not ended", registry=registry)
        self.oldest_seconds = Gauge(
            "lamina_gateway_oldest_batch_seconds", "Age of the oldest batch that has not ended", registry=registry
        )
        self.ended = Counter("lamina_gateway_batches", "Batches that this gateway ended", ["status"], registry=registry)
        self._lines = Counter("lamina_gateway_batch_lines", "Lines of batches, by outcome", ["outcome"], registry=registry)
        self._tokens = Counter("lamina_gateway_batch_tokens", "Tokens of lines of batches", ["kind"], registry=registry)
        for status in get_args(EndStatus):  # exported as 0 from the start, or a rate would miss the first event of its kind
            self.ended.labels(status)
        for outcome in _OUTCOMES:
            self._lines.labels(outcome)
        for kind in ("input", "output"):
            self._tokens.labels(kind)

    def line(self, outcome: str, result: LineResult | None) -> None:
        """Counts a line that this gateway answered or gave up."""
        self._lines.labels(outcome).inc()
        if result is not None:
            self._tokens.labels("input").inc(result.input_tokens)
            self._tokens.labels("output").inc(result.output_tokens)
