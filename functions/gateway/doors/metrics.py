"""What a gateway measures of its answers; the scheduler's own metrics are in `scheduling`."""

from prometheus_client import Counter, Histogram

from functions.observing.telemetry import ANSWER_SECONDS, STEP_SECONDS, FunctionMetrics


class GatewayMetrics(FunctionMetrics):
    def __init__(self) -> None:
        super().__init__()
        registry = self.registry
        self.answers = Counter("lamina_gateway_answers", "Answers by how they ended", ["outcome"], registry=registry)
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
        self.answer = Histogram(
            "lamina_gateway_answer_seconds", "From the request to its last token", buckets=ANSWER_SECONDS, registry=registry
        )
