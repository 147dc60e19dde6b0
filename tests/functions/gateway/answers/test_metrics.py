"""Spans and metrics by OpenTelemetry's conventions for generative AI: their names are those of its own package."""

from typing import Any

from opentelemetry.semconv._incubating.attributes import gen_ai_attributes
from opentelemetry.semconv._incubating.metrics import gen_ai_metrics
from opentelemetry.semconv.attributes import error_attributes

from eventing.problems import DeadlineExceeded
from eventing.wire.generation import GenerateRequest, Message
from functions.gateway.answers.metrics import GenAIOperation, end_attributes
from tests.support.functions.scripted_gateway import Pipeline, ask, chat, client_of

OPERATIONS = {each.value for each in gen_ai_attributes.GenAiOperationNameValues}
NAMES = {value for name, value in vars(gen_ai_attributes).items() if name.startswith("GEN_AI_") and isinstance(value, str)}
LABELS = {"gen_ai_operation_name": "chat", "gen_ai_provider_name": "lamina", "gen_ai_request_model": "tiny"}


def test_attributes_are_the_conventions_own_and_hold_no_text() -> None:
    message = Message("user", "s3cret words")
    request = GenerateRequest(
        messages=(message,),
        temperature=0.5,
        top_p=0.9,
        top_k=40,
        seed=7,
        presence_penalty=1,
        frequency_penalty=-1,
        stop="s3cret",
    )
    operation = GenAIOperation.of(request, "tiny")
    told = {**operation.begin_attributes(request, "chatcmpl-1", 12, 100), **end_attributes("stop", "timeout", 3, 8)}
    assert operation.span_name == "chat tiny"
    assert told.keys() - NAMES == {error_attributes.ERROR_TYPE}
    assert {operation.name, GenAIOperation.of(GenerateRequest("Hi"), "tiny").name} <= OPERATIONS
    assert told["gen_ai.request.max_tokens"] == 100
    assert (told["gen_ai.usage.input_tokens"], told["gen_ai.usage.output_tokens"]) == (12, 3)
    assert told["gen_ai.usage.cache_read.input_tokens"] == 8
    assert told["gen_ai.response.finish_reasons"] == ("stop",)
    assert "s3cret" not in str(told)


def test_what_nobody_asked_for_is_not_told() -> None:
    told = GenAIOperation("text_completion", "tiny").begin_attributes(GenerateRequest("Hi"), "cmpl-1", 1, 16)
    assert not told.keys() & {f"gen_ai.request.{name}" for name in ("top_p", "top_k", "seed", "presence_penalty")}


def sampled(pipeline: Pipeline, name: str, **labels: str) -> float:
    return pipeline.metrics.registry.get_sample_value(f"{name}_count", LABELS | labels) or 0.0


def prometheus(name: str) -> str:
    """As OpenTelemetry's exporter writes a metric's name: dots as underscores, the unit behind it."""
    return name.replace(".", "_") + "_seconds"


DURATION = prometheus(gen_ai_metrics.GEN_AI_SERVER_REQUEST_DURATION)
FIRST = prometheus(gen_ai_metrics.GEN_AI_SERVER_TIME_TO_FIRST_TOKEN)
EACH = prometheus(gen_ai_metrics.GEN_AI_SERVER_TIME_PER_OUTPUT_TOKEN)


def test_metrics_of_answers_and_failures(pipeline: Pipeline) -> None:
    client = client_of(pipeline)
    assert chat(client).status_code == 200
    counts: dict[str, Any] = {name: sampled(pipeline, name) for name in (FIRST, EACH)}
    assert counts | {DURATION: sampled(pipeline, DURATION, error_type="")} == {FIRST: 1, EACH: 1, DURATION: 1}
    pipeline.script = pipeline.say("Hel", end=False, then=DeadlineExceeded("too slow"))
    assert chat(client).status_code == DeadlineExceeded.status
    assert sampled(pipeline, DURATION, error_type=DeadlineExceeded.name) == 1
    assert sampled(pipeline, FIRST) == 1, "of answers that succeeded"
    pipeline.script = pipeline.say("Hello")
    assert ask(client, {"prompt": "Hi"}).status_code == 200
    assert sampled(pipeline, FIRST, gen_ai_operation_name="text_completion") == 1
