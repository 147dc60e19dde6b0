"""OpenTelemetry's semantic conventions for generative AI: attributes of spans, metrics of a server as Prometheus writes them.

https://opentelemetry.io/docs/specs/semconv/gen-ai/. The conventions are in development; the names are those of version 1.38. An
answer is an operation of its own: a request for several (`n`) is several. No text is in any attribute.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from prometheus_client import CollectorRegistry, Histogram

from eventing.wire.generation import GenerateRequest
from functions.observing.tracing import Attributes

PROVIDER: Final = "lamina"
_LABELS: Final = ("gen_ai_operation_name", "gen_ai_provider_name", "gen_ai_request_model")
# The boundaries are the conventions' own.
_REQUEST_SECONDS: Final = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92)
_FIRST_TOKEN_SECONDS: Final = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1),
    *(0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0),
)
_OUTPUT_TOKEN_SECONDS: Final = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)


@dataclass(frozen=True, slots=True)
class Operation:
    """name: `chat` or `text_completion`."""

    name: str
    model: str

    @classmethod
    def of(cls, request: GenerateRequest, model: str) -> "Operation":
        return cls("text_completion" if request.messages is None else "chat", model)

    @property
    def span(self) -> str:
        return f"{self.name} {self.model}"

    def asked(self, request: GenerateRequest, response_id: str, prompt_tokens: int, max_tokens: int) -> Attributes:
        """What a span begins with; options that are as if nobody had said them are left out."""
        options: dict[str, str | int | float | Sequence[str] | None] = {
            "top_p": request.top_p if request.top_p < 1 else None,
            "top_k": request.top_k or None,
            "seed": request.seed,
            "presence_penalty": request.presence_penalty or None,
            "frequency_penalty": request.frequency_penalty or None,
        }
        return {
            "gen_ai.operation.name": self.name,
            "gen_ai.provider.name": PROVIDER,
            "gen_ai.request.model": self.model,
            "gen_ai.response.model": self.model,
            "gen_ai.response.id": response_id,
            "gen_ai.request.max_tokens": max_tokens,
            "gen_ai.request.temperature": request.temperature,
            "gen_ai.usage.input_tokens": prompt_tokens,
            **{f"gen_ai.request.{name}": value for name, value in options.items() if value is not None},
        }


def answered(outcome: str, error: str | None, completion_tokens: int, cached_tokens: int) -> Attributes:
    """What a span ends with."""
    told: dict[str, str | int | float | Sequence[str]] = {
        "gen_ai.response.finish_reasons": (outcome,),
        "gen_ai.usage.output_tokens": completion_tokens,
    }
    if cached_tokens:
        told["gen_ai.usage.cache_read.input_tokens"] = cached_tokens
    return told if error is None else {**told, "error.type": error}


class ServerMetrics:
    def __init__(self, registry: CollectorRegistry) -> None:
        self._duration = Histogram(
            "gen_ai_server_request_duration_seconds",
            "From the request to the answer's end (gen_ai.server.request.duration)",
            [*_LABELS, "error_type"],
            buckets=_REQUEST_SECONDS,
            registry=registry,
        )
        self._first_token = Histogram(
            "gen_ai_server_time_to_first_token_seconds",
            "From the request to the first token of an answer that succeeded (gen_ai.server.time_to_first_token)",
            _LABELS,
            buckets=_FIRST_TOKEN_SECONDS,
            registry=registry,
        )
        self._output_token = Histogram(
            "gen_ai_server_time_per_output_token_seconds",
            "Of each token behind the first, of an answer that succeeded (gen_ai.server.time_per_output_token)",
            _LABELS,
            buckets=_OUTPUT_TOKEN_SECONDS,
            registry=registry,
        )

    def observe(
        self, operation: Operation, error: str | None, total_seconds: float, first_seconds: float, completion_tokens: int
    ) -> None:
        """An answer has ended. error: None where it succeeded."""
        labels = (operation.name, PROVIDER, operation.model)
        self._duration.labels(*labels, error or "").observe(total_seconds)
        if error is not None or not completion_tokens:
            return
        self._first_token.labels(*labels).observe(first_seconds)
        if completion_tokens > 1:
            self._output_token.labels(*labels).observe((total_seconds - first_seconds) / (completion_tokens - 1))
