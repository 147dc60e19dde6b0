"""Metrics and span attributes of the gateway's answers. The scheduler's own metrics are in `scheduling`.

The gen_ai names are OpenTelemetry's semantic conventions for generative AI, version 1.38 (in development):
https://opentelemetry.io/docs/specs/semconv/gen-ai/. Each answer is one operation, so a request with `n` answers has n. No
attribute holds text of prompts or answers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final, get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from eventing.problems import PROBLEMS, Problem
from eventing.wire.generation import FinishReason, GenerateRequest
from functions.configuration.objective import Objective
from functions.observing.telemetry import ANSWER_SECONDS, STEP_SECONDS, FunctionMetrics
from functions.observing.tracing import Attributes

OUTCOMES: Final = (*get_args(FinishReason), *(problem.name for problem in PROBLEMS.values()))
PROVIDER: Final = "lamina"
_SERVER_ERROR: Final = 500  # from this status on, a problem is not the client's
_LABELS: Final = ("gen_ai_operation_name", "gen_ai_provider_name", "gen_ai_request_model")
# Bucket boundaries from the conventions.
_REQUEST_SECONDS: Final = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92)
_FIRST_TOKEN_SECONDS: Final = (*(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1), *(0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0))
_OUTPUT_TOKEN_SECONDS: Final = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)


class GatewayMetrics(FunctionMetrics):
    def __init__(self) -> None:
        super().__init__()
        counter = partial(Counter, registry=self.registry)
        gauge, histogram = partial(Gauge, registry=self.registry), partial(Histogram, registry=self.registry)
        self.answers = counter("lamina_gateway_answers", "Answers by how they ended", ["outcome"])
        for outcome in OUTCOMES:  # exported as 0 from the start, or a rate would miss the first event of its kind
            self.answers.labels(outcome)
        self.queue_limit = gauge("lamina_gateway_queue_limit", "Requests that may wait")
        self.refused_addresses = gauge(
            "lamina_gateway_refused_addresses",
            "Addresses of instances outside of the pod network, which are not used",
            ["stage"],
        )
        self.prompt_tokens = counter("lamina_gateway_prompt_tokens", "Tokens of prompts taken in")
        self.tokens = counter("lamina_gateway_tokens", "Tokens generated")
        self.adapter_tokens = counter("lamina_gateway_adapter_tokens", "Tokens generated with an adapter", ["adapter"])
        self.first_token = histogram(
            "lamina_gateway_time_to_first_token_seconds", "From the request to its first token", buckets=ANSWER_SECONDS
        )
        self.inter_token = histogram(
            "lamina_gateway_inter_token_latency_seconds", "From one token of an answer to its next", buckets=STEP_SECONDS
        )
        self.answer = histogram("lamina_gateway_answer_seconds", "From the request to its last token", buckets=ANSWER_SECONDS)
        self.objective: Objective | None = None
        self.objective_share = gauge("lamina_gateway_objective_share", "Share of answers that shall be within the objective")
        self._judged = counter("lamina_gateway_judged_answers", "Answers that an objective counts, complete or failed")
        self._within = counter("lamina_gateway_answers_within_objective", "Those that were in time")
        self.gen_ai = GenAIMetrics(self.registry)

    def aim(self, objective: Objective | None) -> None:
        """Sets the objective by which `judge` counts answers. If it is None, `judge` counts none."""
        self.objective = objective
        self.objective_share.set(0 if objective is None else objective.share)

    def judge(self, problem: Problem | None, outcome: str, first_seconds: float, total_seconds: float, tokens: int) -> None:
        """Counts an answer that has ended, and whether it met the objective.

        Answers that clients cancelled and invalid requests are not counted.
        """
        if self.objective is None or outcome == "cancelled" or (problem is not None and problem.status < _SERVER_ERROR):
            return
        self._judged.inc()
        if problem is None and self.objective.met(first_seconds, total_seconds, tokens):
            self._within.inc()


@dataclass(frozen=True, slots=True)
class GenAIOperation:
    name: str  # chat or text_completion
    model: str  # MODEL, or MODEL:ADAPTER
    adapter: str = ""  # as metrics name it; empty: none

    @classmethod
    def of(cls, request: GenerateRequest, served: str, label: str) -> "GenAIOperation":
        """Makes the operation of a request.

        `served` is the model's own name. `label` is what ServedModels.label returns for the requested name.
        """
        adapter = label.removeprefix(f"{served}:") if label != served else ""
        return cls("text_completion" if request.messages is None else "chat", label, adapter)

    def begin_attributes(self, request: GenerateRequest, response_id: str, prompt_tokens: int, max_tokens: int) -> Attributes:
        """Returns the attributes that are known when a span begins. Sampling options that have no effect are left out."""
        attributes: dict[str, str | int | float | Sequence[str] | None] = {
            "gen_ai.operation.name": self.name,
            "gen_ai.provider.name": PROVIDER,
            "gen_ai.request.model": self.model,
            "gen_ai.response.model": self.model,
            "gen_ai.response.id": response_id,
            "gen_ai.request.max_tokens": max_tokens,
            "gen_ai.request.temperature": request.temperature,
            "gen_ai.usage.input_tokens": prompt_tokens,
            "gen_ai.request.top_p": request.top_p if request.top_p < 1 else None,
            "gen_ai.request.top_k": request.top_k or None,
            "gen_ai.request.seed": request.seed,
            "gen_ai.request.presence_penalty": request.presence_penalty or None,
            "gen_ai.request.frequency_penalty": request.frequency_penalty or None,
        }
        return {name: value for name, value in attributes.items() if value is not None}


def end_attributes(outcome: str, error: str | None, completion_tokens: int, cached_tokens: int) -> Attributes:
    """Returns the attributes that are known when a span ends.

    `error` is the name of the problem, or None if the answer succeeded.
    """
    attributes: dict[str, str | int | float | Sequence[str]] = {
        "gen_ai.response.finish_reasons": (outcome,),
        "gen_ai.usage.output_tokens": completion_tokens,
    }
    if cached_tokens:
        attributes["gen_ai.usage.cache_read.input_tokens"] = cached_tokens
    return attributes if error is None else {**attributes, "error.type": error}


class GenAIMetrics:
    def __init__(self, registry: CollectorRegistry) -> None:
        histogram = partial(Histogram, registry=registry)
        self._duration = histogram(
            "gen_ai_server_request_duration_seconds",
            "From the request to the answer's end (gen_ai.server.request.duration)",
            [*_LABELS, "error_type"],
            buckets=_REQUEST_SECONDS,
        )
        self._first_token = histogram(
            "gen_ai_server_time_to_first_token_seconds",
            "From the request to the first token of an answer that succeeded (gen_ai.server.time_to_first_token)",
            _LABELS,
            buckets=_FIRST_TOKEN_SECONDS,
        )
        self._output_token = histogram(
            "gen_ai_server_time_per_output_token_seconds",
            "Of each token after the first, of an answer that succeeded (gen_ai.server.time_per_output_token)",
            _LABELS,
            buckets=_OUTPUT_TOKEN_SECONDS,
        )

    def observe(
        self, operation: GenAIOperation, error: str | None, total_seconds: float, first_seconds: float, completion_tokens: int
    ) -> None:
        """Records an answer that has ended. Both durations begin when the request arrived.

        `error` is the name of the problem, or `cancelled`. It is None if the answer succeeded.
        """
        labels = (operation.name, PROVIDER, operation.model)
        self._duration.labels(*labels, error or "").observe(total_seconds)
        if error is not None or not completion_tokens:
            return
        self._first_token.labels(*labels).observe(first_seconds)
        if completion_tokens > 1:
            self._output_token.labels(*labels).observe((total_seconds - first_seconds) / (completion_tokens - 1))
