"""Metrics and traces that stages and gateways have in common.

Each application has its own metrics registry; nothing is global.
"""

import logging
from typing import Final

from prometheus_client import CollectorRegistry, Gauge

from functions.observing.tracing import PASSING, Attributes, Tracer

_log: Final = logging.getLogger(__name__)

# Buckets of histograms: for parts of a step, and for answers. An alert's threshold is one of the latter, because a quantile
# within a bucket is a guess.
STEP_SECONDS: Final = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
ANSWER_SECONDS: Final = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0, 600.0)


def make_tracer(endpoint: str | None, service: str, attributes: Attributes) -> Tracer:
    """Returns a tracer that exports to an OTLP collector, or one that records nothing if `endpoint` is None.

    OpenTelemetry itself reads the endpoint and the other OTEL_* keys from the environment. `service` is the name of the
    service, unless OTEL_SERVICE_NAME overrides it. `attributes` are set on all spans of this process.
    """
    if endpoint is None:
        return PASSING
    try:
        from functions.observing.tracing_export import ExportingTracer
    except ImportError as error:
        _log.warning("no traces are exported: %s; pip install -r requirements-tracing.txt, or unset the endpoint", error)
        return PASSING
    return ExportingTracer(service, attributes)


class FunctionMetrics:
    """The metrics that stages and gateways share, in their own registry."""

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
