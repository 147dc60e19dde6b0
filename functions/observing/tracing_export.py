"""Records spans and exports them over OTLP/HTTP with OpenTelemetry. Imported only if traces are configured."""

from collections.abc import Sequence

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Link, NonRecordingSpan, SpanContext, SpanKind, StatusCode, TraceFlags, set_span_in_context
from opentelemetry.trace import Span as RecordedSpan

from functions.observing.tracing import Attributes, Span, TraceContext, Tracer, main_cause


class ExportingTracer(Tracer):
    """Records spans and exports them in the background.

    OpenTelemetry's own OTEL_* keys configure endpoint, headers, sampler and the like.
    """

    def __init__(self, service: str, attributes: Attributes) -> None:
        resource = Resource({"service.name": service, **attributes}).merge(OTELResourceDetector().detect())
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        self._tracer = self._provider.get_tracer("lamina")

    def serve(self, name: str, parent: TraceContext | None, attributes: Attributes) -> Span:
        return self._start(name, SpanKind.SERVER, parent, (), attributes)

    def send(self, name: str, causes: Sequence[TraceContext], attributes: Attributes) -> Span:
        return self._start(name, SpanKind.CLIENT, main_cause(causes), causes, attributes)

    def close(self) -> None:
        self._provider.shutdown()

    def _start(
        self, name: str, kind: SpanKind, parent: TraceContext | None, causes: Sequence[TraceContext], attributes: Attributes
    ) -> Span:
        context = None if parent is None else set_span_in_context(NonRecordingSpan(_remote(parent)))
        links = [Link(_remote(cause)) for cause in causes]
        return _ExportedSpan(self._tracer.start_span(name, context, kind, dict(attributes), links))


class _ExportedSpan(Span):
    def __init__(self, span: RecordedSpan) -> None:
        own = span.get_span_context()
        super().__init__(TraceContext(f"{own.trace_id:032x}", f"{own.span_id:016x}", own.trace_flags.sampled))
        self._span = span
        self._ended = False

    def end(self, error: str | None = None, attributes: Attributes | None = None) -> None:
        if self._ended:
            return
        self._ended = True
        self._span.set_attributes(dict(attributes or {}))
        if error is not None:
            self._span.set_status(StatusCode.ERROR, error)
        self._span.end()


def _remote(context: TraceContext) -> SpanContext:
    flags = TraceFlags(TraceFlags.SAMPLED if context.sampled else TraceFlags.DEFAULT)
    return SpanContext(int(context.trace_id, 16), int(context.span_id, 16), is_remote=True, trace_flags=flags)
