"""Traces from a client to every stage, by W3C Trace Context.

Every event carries a `traceparent`, taken from the client or made here. Without an exporter that is all: contexts are passed
on, nothing is recorded, and nothing of OpenTelemetry is imported.
"""

import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Protocol, Self

_TRACEPARENT: Final = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})(?:-.*)?")
"""W3C Trace Context, section 3.2.2; a later version may have more behind the flags."""

Attributes = Mapping[str, str | int | float | Sequence[str]]


@dataclass(frozen=True, slots=True)
class TraceContext:
    """Names a span: hexadecimal, 32 and 16 digits."""

    trace_id: str
    span_id: str
    sampled: bool

    @property
    def traceparent(self) -> str:
        return f"00-{self.trace_id}-{self.span_id}-{int(self.sampled):02x}"


class Span(Protocol):
    """Something that takes time. A context manager: at its end it ends, with the exception that ended it."""

    @property
    def context(self) -> TraceContext: ...

    def end(self, error: str | None = None, attributes: Attributes | None = None) -> None:
        """Once; later calls do nothing."""

    def __enter__(self) -> Self: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None: ...


class Tracer(Protocol):
    """Thread-safe."""

    def serve(self, name: str, parent: TraceContext | None, attributes: Attributes) -> Span:
        """Begins what somebody asked for: a child of the asker's span, or the first of a new trace."""

    def send(self, name: str, causes: Sequence[TraceContext], attributes: Attributes) -> Span:
        """Begins what is sent on for `causes`: a child of one of them (one that is sampled, if any is), with links to all."""

    def close(self) -> None:
        """Gives out what has not been exported yet."""


def read_traceparent(text: str | None) -> TraceContext | None:
    """None where there is none, or one that cannot be read: then a new trace begins (section 4.3)."""
    found = _TRACEPARENT.fullmatch((text or "").strip())
    return None if found is None else TraceContext(found[1], found[2], bool(int(found[3], 16) & 1))


def main_cause(causes: Sequence[TraceContext]) -> TraceContext | None:
    return next((cause for cause in causes if cause.sampled), causes[0] if causes else None)


class _PassingSpan:
    def __init__(self, parent: TraceContext | None) -> None:
        trace_id = secrets.token_hex(16) if parent is None else parent.trace_id
        self._context = TraceContext(trace_id, secrets.token_hex(8), parent is not None and parent.sampled)

    @property
    def context(self) -> TraceContext:
        return self._context

    def end(self, error: str | None = None, attributes: Attributes | None = None) -> None:
        """Nothing is recorded."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing is recorded."""


class PassingTracer:
    """Makes contexts and records nothing."""

    def serve(self, name: str, parent: TraceContext | None, attributes: Attributes) -> Span:
        return _PassingSpan(parent)

    def send(self, name: str, causes: Sequence[TraceContext], attributes: Attributes) -> Span:
        return _PassingSpan(main_cause(causes))

    def close(self) -> None:
        """Nothing was recorded."""


PASSING: Final = PassingTracer()
