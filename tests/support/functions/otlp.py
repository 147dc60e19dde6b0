"""A receiver of traces like OpenTelemetry's collector: OTLP over HTTP, `POST /v1/traces`, protobuf."""

import gzip
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from tests.support.http_server import Exchange, serving


@dataclass(frozen=True)
class SeenSpan:
    """Ids are hexadecimal. `links` are (trace, span)."""

    service: str
    name: str
    kind: int
    trace_id: str
    span_id: str
    parent_id: str
    links: frozenset[tuple[str, str]]
    attributes: dict[str, Any]
    error: str


@dataclass
class Receiver:
    endpoint: str = ""
    headers: dict[str, str] = field(default_factory=dict)  # of the last request, names in lower case
    spans: list[SeenSpan] = field(default_factory=list)


@contextmanager
def otlp_receiver() -> Iterator[Receiver]:
    receiver = Receiver()

    def receive(exchange: Exchange) -> None:
        receiver.headers = {name.lower(): value for name, value in exchange.headers.items()}
        zipped = receiver.headers.get("content-encoding") == "gzip"
        if exchange.path == "/v1/traces":
            body = gzip.decompress(exchange.body) if zipped else exchange.body
            receiver.spans += _spans(ExportTraceServiceRequest.FromString(body))
        exchange.answer(200 if exchange.path == "/v1/traces" else 404)

    with serving(receive) as server:
        receiver.endpoint = server.origin
        yield receiver


def _spans(request: Any) -> Iterator[SeenSpan]:
    for resource in request.resource_spans:
        own = _attributes(resource.resource.attributes)
        for scope in resource.scope_spans:
            for span in scope.spans:
                yield SeenSpan(
                    service=own["service.name"],
                    name=span.name,
                    kind=span.kind,
                    trace_id=span.trace_id.hex(),
                    span_id=span.span_id.hex(),
                    parent_id=span.parent_span_id.hex(),
                    links=frozenset((link.trace_id.hex(), link.span_id.hex()) for link in span.links),
                    attributes={**own, **_attributes(span.attributes)},
                    error=span.status.message,
                )


def _attributes(pairs: Any) -> dict[str, Any]:
    return {pair.key: _value(pair.value) for pair in pairs}


def _value(value: Any) -> Any:
    kind = value.WhichOneof("value")
    return [_value(each) for each in value.array_value.values] if kind == "array_value" else getattr(value, kind)
