"""Traces a request from the client to every stage, with W3C Trace Context.

Every event carries a `traceparent`, which continues the client's trace or begins a new one. Without an exporter, trace contexts
are still passed on, but nothing is recorded and OpenTelemetry is not imported.
"""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Self

from msgspec import Struct

# W3C Trace Context, section 3.2.2; a later version may have more after the flags.
_TRACEPARENT: Final = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})(?:-.*)?")

Attributes = Mapping[str, str | int | float | Sequence[str]]


class TraceContext(Struct, frozen=True):
    """Identifies one span of a trace. It travels as `traceparent`."""

    trace_id: str  # 32 hexadecimal digits
    span_id: str  # 16 hexadecimal digits
    sampled: bool

    @property
    def traceparent(self) -> str:
        return f"00-{self.trace_id}-{self.span_id}-{int(self.sampled):02x}"


@dataclass(eq=False)
class Span:
    """A traced operation. As a context manager it ends with its block, and records an exception of the block as its error.

    This base class records nothing.
    """

    context: TraceContext

    def end(self, error: str | None = None, attributes: Attributes | None = None) -> None:
        """Ends the operation. Only the first call has an effect.

        `error` is None if the operation succeeded. `attributes` are added to those from the span's beginning.
        """

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.end(None if error is None else f"{type(error).__name__}: {error}")


class Tracer:
    """Makes trace contexts and records nothing; the subclass `tracing_export.ExportingTracer` exports spans. Thread-safe."""

    def serve(self, name: str, parent: TraceContext | None, attributes: Attributes) -> Span:
        """Begins the span of a received request. `parent` is the sender's span; if it is None, a new trace begins."""
        return Span(_child_of(parent))

    def send(self, name: str, causes: Sequence[TraceContext], attributes: Attributes) -> Span:
        """Begins the span of an event that is sent on behalf of several requests (`causes`), with links to all of them.

        The span's parent is the first sampled request, or the first one if none is sampled. If `causes` is empty, a new trace
        begins.
        """
        return Span(_child_of(main_cause(causes)))

    def close(self) -> None:
        """Exports the spans that have not been exported yet."""


PASSING: Final = Tracer()


def read_traceparent(text: str | None) -> TraceContext | None:
    """Parses a `traceparent`. Returns None if it is missing or invalid; then a new trace begins (section 4.3)."""
    found = _TRACEPARENT.fullmatch((text or "").strip())
    return None if found is None else TraceContext(found[1], found[2], bool(int(found[3], 16) & 1))


def main_cause(causes: Sequence[TraceContext]) -> TraceContext | None:
    """Returns the request whose trace the span of a shared event joins: the first sampled one, else the first.

    Returns None if `causes` is empty.
    """
    for cause in causes:
        if cause.sampled:
            return cause
    return causes[0] if causes else None


def _child_of(parent: TraceContext | None) -> TraceContext:
    trace_id = os.urandom(16).hex() if parent is None else parent.trace_id
    return TraceContext(trace_id, os.urandom(8).hex(), parent is not None and parent.sampled)
