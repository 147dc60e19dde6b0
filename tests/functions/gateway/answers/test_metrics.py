"""Metrics of answers: their times by the client's clock, outcomes, bounded names of adapters, and OpenTelemetry's names."""

import time
from typing import Any

import pytest
from flask.testing import FlaskClient
from opentelemetry.semconv._incubating.attributes import gen_ai_attributes
from opentelemetry.semconv._incubating.metrics import gen_ai_metrics
from opentelemetry.semconv.attributes import error_attributes
from prometheus_client import generate_latest

from eventing.problems import DeadlineExceeded, InvalidRequest, ModelNotFound, NotReady, PipelineUnavailable, Problem, QueueFull
from eventing.wire.generation import GenerateRequest, Message
from functions.gateway.answers import generation as core
from functions.gateway.answers.adapters import ServedModels
from functions.gateway.answers.metrics import GatewayMetrics, GenAIOperation, end_attributes
from functions.gateway.app import MAX_REQUEST_BYTES
from functions.gateway.scheduling.token_stream import TokenStream
from functions.gateway.text.encoder import Encoder
from tests.support.functions.gateway import wait_until
from tests.support.functions.scripted_gateway import APIS, EVENT, TOKENIZER, Pipeline, ask, ask_either, chat, client_of, refuse


@pytest.mark.parametrize("api", APIS)
def test_time_is_measured_from_the_requests_arrival(
    client: FlaskClient, pipeline: Pipeline, api: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokenizing a request takes its client's time, so it counts, also against the deadline."""
    noted: list[float] = []
    real = Encoder.encode

    def encode(self: Encoder, *asked: Any, **named: Any) -> Any:
        noted.append(time.monotonic())
        return real(self, *asked, **named)

    monkeypatch.setattr(Encoder, "encode", encode)
    assert ask_either(client, api).status_code == 200
    ((read_at,), (prompt,)) = noted, pipeline.prompts
    assert prompt.arrived < read_at
    seen = pipeline.stream.timings().time_to_first_token_seconds
    assert seen > pipeline.stream._put_at[0] - read_at
    assert pipeline.value("time_to_first_token_seconds_sum") == seen


def test_the_servers_time_of_arrival_is_used(client: FlaskClient, pipeline: Pipeline) -> None:
    """Reading the body and waiting for a thread count, too."""
    environ = {"lamina.arrived": time.monotonic() - 4.0}
    client.post("/", json={"prompt": "Hi"}, headers=EVENT, environ_overrides=environ)
    client.post("/v1/completions", json={"model": "tiny", "prompt": "Hi"}, headers={"Accept": "*/*"}, environ_overrides=environ)
    assert [prompt.arrived for prompt in pipeline.prompts] == [environ["lamina.arrived"]] * 2
    assert pipeline.value("time_to_first_token_seconds_sum") >= 8.0


def test_the_first_token_of_a_failed_answer_is_measured(client: FlaskClient, pipeline: Pipeline) -> None:
    pipeline.script = pipeline.say("Hel", end=False, then=PipelineUnavailable("stage 1 is gone"))
    for api in APIS:
        assert ask_either(client, api).status_code == 503
    assert pipeline.value("time_to_first_token_seconds_count") == 2
    assert pipeline.value("inter_token_latency_seconds_count") == 2 * 2
    assert pipeline.value("answer_seconds_count") == 0
    assert pipeline.value("answers_total", outcome="pipeline-unavailable") == 2
    pipeline.script = pipeline.say("", end=True)
    assert ask(client, {"prompt": "Hi"}).status_code == 200
    assert pipeline.value("time_to_first_token_seconds_count") == 3, "an end-of-text token is a first token, too"


def test_time_between_tokens_is_the_pipelines_and_not_the_readers(client: FlaskClient, pipeline: Pipeline) -> None:
    """Tokens may be ready long before they are read, or may never be read."""

    def script(stream: TokenStream) -> None:
        pipeline.say("Hello", end=False)(stream)
        stream._put_at[:] = [stream._put_at[0] + 100.0 * number for number in range(5)]

    pipeline.script = script
    response = ask(client, {"prompt": "Hi"}, Accept="text/event-stream")
    chunks = iter(response.response)
    assert [b"event" in next(chunks) for _ in range(2)]
    response.close()
    assert pipeline.value("inter_token_latency_seconds_count") == 4
    assert pipeline.value("inter_token_latency_seconds_sum") == pytest.approx(400.0)


@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize("problem", [InvalidRequest("no"), QueueFull("256 wait"), NotReady("draining")])
def test_refusals_are_counted_by_outcome(client: FlaskClient, pipeline: Pipeline, api: str, problem: Problem) -> None:
    pipeline.script = refuse(problem)
    status = 400 if api == "openai" and isinstance(problem, InvalidRequest) else problem.status
    assert ask_either(client, api).status_code == status
    assert pipeline.value("answers_total", outcome=problem.name) == 1
    pipeline.script, pipeline.full = pipeline.say("Hi"), problem
    assert ask_either(client, api).status_code == status
    assert pipeline.value("answers_total", outcome=problem.name) == 2


def test_requests_without_a_key_and_too_large_ones_are_counted(pipeline: Pipeline) -> None:
    closed = client_of(pipeline, LAMINA_API_KEYS="a-key")
    for api in APIS:
        assert ask_either(closed, api).status_code == 401
    assert closed.get("/v1/models").status_code == 401
    assert pipeline.value("answers_total", outcome="unauthorized") == 2, "only requests for an answer count"
    opened = client_of(pipeline)
    for path in ("/", "/v1/chat/completions"):
        assert opened.post(path, data=bytes(MAX_REQUEST_BYTES + 1), headers=EVENT).status_code == 413
        assert opened.post(path, data=b"{", headers=EVENT).status_code == 400
    assert pipeline.value("answers_total", outcome="event-too-large") == 2
    assert pipeline.value("answers_total", outcome="malformed-event") == 2


def test_an_answer_that_ends_at_a_stop_string_is_not_counted_as_cancelled(client: FlaskClient, pipeline: Pipeline) -> None:
    pipeline.script = pipeline.say("One. Two. Three.", end=False)
    assert ask(client, {"prompt": "Hi", "stop": " Two"}).status_code == 200
    assert pipeline.stream.finish_reason == "stop", "which is what the scheduler counts it by"
    assert pipeline.value("answers_total", outcome="stop") == 1
    assert pipeline.value("answers_total", outcome="cancelled") == 0


@pytest.mark.slow
@pytest.mark.parametrize("accept", ["application/json", "text/event-stream"])
@pytest.mark.parametrize("begun", [True, False])
@pytest.mark.usefixtures("abandoned_at_once")
def test_a_client_that_leaves_is_noticed_without_writing_to_it(
    client: FlaskClient, pipeline: Pipeline, accept: str, begun: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether tokens come or not. The gateway looks at least twice a second."""
    assert core.LOOK_SECONDS <= 0.5
    monkeypatch.setattr(core, "LOOK_SECONDS", 0.01)
    pipeline.script = pipeline.say("Hel", end=False) if begun else lambda stream: None
    looks = [False, False, True]
    environ = {"lamina.client_gone": lambda: looks.pop(0)}
    headers = EVENT | {"Accept": accept}
    response = client.post("/", json={"prompt": "Hi"}, headers=headers, environ_overrides=environ)
    assert response.data.count(b"dev.lamina.generate.response") == 0
    assert looks == []
    wait_until(lambda: pipeline.cancelled.is_set() and pipeline.value("answers_total", outcome="cancelled") == 1)
    looks += [True]
    body = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "stream": accept != "application/json"}
    assert b"[DONE]" not in client.post("/v1/chat/completions", json=body, environ_overrides=environ).data
    assert pipeline.value("answers_total", outcome="cancelled") == 2


@pytest.mark.parametrize("stream", [True, False])
def test_log_lines_name_the_request(
    client: FlaskClient, pipeline: Pipeline, stream: bool, caplog: pytest.LogCaptureFixture
) -> None:
    pipeline.script = lambda stream: setattr(stream, "next_token", None)
    assert chat(client, stream=stream).data
    (prompt,) = pipeline.prompts
    assert prompt.request_id.startswith("chatcmpl-")
    assert prompt.request_id in caplog.text
    caplog.clear()
    reply = ask(client, {"prompt": "Hi"}, **({"Accept": "text/event-stream"} if stream else {}))
    assert b"traceback" in reply.data
    assert pipeline.prompts[1].request_id in caplog.text


def test_every_token_has_its_latency() -> None:
    stream = TokenStream(3, arrived=time.monotonic() - 5)
    assert stream.waits(0) == []
    for token in TOKENIZER.encode("abc", add_special_tokens=False).ids:
        stream.put(token)
    first, *others = stream.waits(0)
    assert first >= 5
    assert stream.waits(1) == others
    assert len(others) == 2


OPERATIONS = {each.value for each in gen_ai_attributes.GenAiOperationNameValues}
NAMES = {value for name, value in vars(gen_ai_attributes).items() if name.startswith("GEN_AI_") and isinstance(value, str)}
LABELS = {"gen_ai_operation_name": "chat", "gen_ai_provider_name": "lamina", "gen_ai_request_model": "tiny"}


def test_span_attributes_have_the_conventions_names_and_no_text() -> None:
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
    operation = GenAIOperation.of(request, "tiny", "tiny")
    told = {**operation.begin_attributes(request, "chatcmpl-1", 12, 100), **end_attributes("stop", "timeout", 3, 8)}
    assert (operation.name, operation.model) == ("chat", "tiny")
    assert told.keys() - NAMES == {error_attributes.ERROR_TYPE}
    assert {operation.name, GenAIOperation.of(GenerateRequest("Hi"), "tiny", "tiny").name} <= OPERATIONS
    assert told["gen_ai.request.max_tokens"] == 100
    assert (told["gen_ai.usage.input_tokens"], told["gen_ai.usage.output_tokens"]) == (12, 3)
    assert told["gen_ai.usage.cache_read.input_tokens"] == 8
    assert told["gen_ai.response.finish_reasons"] == ("stop",)
    assert "s3cret" not in str(told)


def test_options_that_are_not_set_are_no_attributes() -> None:
    told = GenAIOperation("text_completion", "tiny").begin_attributes(GenerateRequest("Hi"), "cmpl-1", 1, 16)
    assert not told.keys() & {f"gen_ai.request.{name}" for name in ("top_p", "top_k", "seed", "presence_penalty")}


def sampled(pipeline: Pipeline, name: str, **labels: str) -> float:
    return pipeline.metrics.registry.get_sample_value(f"{name}_count", LABELS | labels) or 0.0


def prometheus(name: str) -> str:
    """A metric's name as OpenTelemetry's exporter writes it: with underscores for dots, and its unit."""
    return name.replace(".", "_") + "_seconds"


DURATION = prometheus(gen_ai_metrics.GEN_AI_SERVER_REQUEST_DURATION)
FIRST = prometheus(gen_ai_metrics.GEN_AI_SERVER_TIME_TO_FIRST_TOKEN)
EACH = prometheus(gen_ai_metrics.GEN_AI_SERVER_TIME_PER_OUTPUT_TOKEN)


def test_gen_ai_metrics_count_answers_and_failures(pipeline: Pipeline) -> None:
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


ADAPTERS = 300


@pytest.mark.parametrize("version", ["", "@1f3c"])
def test_metrics_have_labels_for_so_many_adapters(version: str) -> None:
    models, metrics = ServedModels("tiny", None), GatewayMetrics()
    for number in range(ADAPTERS):
        operation = GenAIOperation.of(GenerateRequest(prompt="x"), "tiny", models.label(f"tiny:adapter-{number}{version}"))
        metrics.adapter_tokens.labels(operation.adapter).inc()
        metrics.gen_ai.observe(operation, None, 1.0, 0.5, 3)
    own = GenAIOperation.of(GenerateRequest(prompt="x"), "tiny", models.label("tiny"))
    assert (own.model, own.adapter) == ("tiny", "")
    page = generate_latest(metrics.registry).decode()
    assert page.count("lamina_gateway_adapter_tokens_total{") == 101
    assert f'lamina_gateway_adapter_tokens_total{{adapter="other"}} {ADAPTERS - 100}.0' in page
    assert page.count("gen_ai_server_request_duration_seconds_count{") == 101


@pytest.mark.parametrize(("named", "hint"), [("tiny:style", "keeps no adapters: set `adapters`"), ("other:style", "")])
def test_a_pipeline_without_adapters_says_how_to_have_some(named: str, hint: str) -> None:
    with pytest.raises(ModelNotFound) as refused:
        ServedModels("tiny", None).check(named)
    assert f"The model '{named}' is not served here; this gateway serves 'tiny'" in str(refused.value)
    assert ("adapters" in str(refused.value)) == bool(hint)
    assert hint in str(refused.value)
