"""What a gateway measures of its answers; the scheduler's own metrics are in `scheduling`."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Final, get_args

from prometheus_client import Counter, Gauge, Histogram

from eventing.problems import PROBLEMS
from eventing.wire.generation import FinishReason
from functions.gateway.answers.gen_ai import ServerMetrics
from functions.observing.telemetry import ANSWER_SECONDS, STEP_SECONDS, FunctionMetrics

OUTCOMES: Final = (*get_args(FinishReason), *(problem.name for problem in PROBLEMS.values()))


class GatewayMetrics(FunctionMetrics):
    def __init__(self) -> None:
        super().__init__()
        registry = self.registry
        self.answers = Counter("lamina_gateway_answers", "Answers by how they ended", ["outcome"], registry=registry)
        for outcome in OUTCOMES:  # from 0 on, or a rate would not see the first of a kind
            self.answers.labels(outcome)
        self.queue_limit = Gauge("lamina_gateway_queue_limit", "Requests that may wait", registry=registry)
        self._refused = Gauge(
            "lamina_gateway_refused_addresses",
            "Addresses of instances that are not followed, being outside of the network of pods",
            ["stage"],
            registry=registry,
        )
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
        self.gen_ai = ServerMetrics(registry)
        self.answer = Histogram(
            "lamina_gateway_answer_seconds", "From the request to its last token", buckets=ANSWER_SECONDS, registry=registry
        )

    def watch(self, stages: Sequence[str], refused: Callable[[int], int]) -> None:
        """stages: their layers, as the label `stage`. refused: of the stage with that number, whenever somebody asks."""
        for number, stage in enumerate(stages):
            self._refused.labels(stage).set_function(partial(refused, number))
