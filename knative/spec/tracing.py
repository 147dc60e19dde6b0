"""Where traces go."""

from typing import Annotated

from msgspec import Meta, Struct


class Tracing(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Traces of gateway and stages, by OTLP over HTTP."""

    endpoint: Annotated[str, Meta(pattern="^https?://")]
    """Of a collector; `/v1/traces` is put behind it."""
    sample_ratio: Annotated[float, Meta(ge=0, le=1)] = 0.1
    """Of requests that bring no decision of their own; a span for each stage and step is many."""
