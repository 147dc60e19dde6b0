"""Traces from a client through the gateway to every stage: real processes, and a receiver that speaks OTLP over HTTP."""

import json
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from functions.observing.telemetry import make_tracer
from functions.observing.tracing import PASSING, TraceContext, main_cause, read_traceparent
from knative.render.resolved_pipeline import ResolvedPipeline
from knative.render.services import services
from knative.spec.errors import SpecError
from knative.spec.spec_file import spec_from_dict
from tests.support.environments import GATEWAY, STAGE
from tests.support.functions.functions import ROOT, gateway_environment, running, stage_environment
from tests.support.functions.otlp import Receiver, SeenSpan, otlp_receiver
from tests.support.storage.published import published_model

CUT = ((0, 3), (3, 6))
TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
SERVER, CLIENT = 2, 3


def test_a_traceparent_is_read_as_the_w3c_says() -> None:
    assert read_traceparent(f"00-{TRACE}-{SPAN}-01") == TraceContext(TRACE, SPAN, sampled=True)
    assert read_traceparent(f" 00-{TRACE}-{SPAN}-00 ") == TraceContext(TRACE, SPAN, sampled=False)
    assert read_traceparent(f"cc-{TRACE}-{SPAN}-09-what-the-future-brings") == TraceContext(TRACE, SPAN, sampled=True)


@pytest.mark.parametrize(
    "text",
    [
        None,
        "",
        "None",
        f"ff-{TRACE}-{SPAN}-01",
        f"00-{'0' * 32}-{SPAN}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE.upper()}-{SPAN}-01",
        f"00-{TRACE}-{SPAN}",
    ],
)
def test_an_unreadable_traceparent_begins_a_new_trace(text: str | None) -> None:
    assert read_traceparent(text) is None
    made = PASSING.serve("anything", None, {}).context
    assert read_traceparent(made.traceparent) == made


def test_without_an_exporter_contexts_are_passed_on() -> None:
    asked = TraceContext(TRACE, SPAN, sampled=True)
    with PASSING.serve("answer", asked, {}) as served, PASSING.send("step", [served.context], {}) as sent:
        assert {served.context.trace_id, sent.context.trace_id} == {TRACE}
        assert len({SPAN, served.context.span_id, sent.context.span_id}) == 3
        assert sent.context.sampled


def test_the_main_cause_is_a_sampled_one() -> None:
    quiet, loud = TraceContext("a" * 32, "b" * 16, sampled=False), TraceContext(TRACE, SPAN, sampled=True)
    assert main_cause([quiet, loud]) is loud
    assert main_cause([quiet]) is quiet
    assert main_cause([]) is None


@pytest.mark.parametrize("environ", [STAGE, GATEWAY], ids=["stage", "gateway"])
def test_opentelemetry_is_not_imported_without_an_endpoint(environ: dict[str, str]) -> None:
    code = (
        "import os, sys; from functions.configuration.config import read_config; from functions.__main__ import _function;"
        "from functions.hosting.startup import StartUp; _function(read_config(os.environ), StartUp(), os.environ);"
        "print([name for name in sys.modules if name.startswith('opentelemetry')])"
    )
    seen = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environ, capture_output=True, text=True, timeout=240, check=False
    )
    assert seen.stdout == "[]\n", seen.stderr


def test_without_opentelemetry_a_function_says_so_and_runs(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "functions.observing.tracing_export", None)
    assert make_tracer("http://collector.example:4318", "lamina-stage", {}) is PASSING
    assert "pip install -r requirements-tracing.txt" in caplog.text


def test_the_spec_configures_the_endpoint_of_traces() -> None:
    document = {
        "name": "chat",
        "model": {"name": "tiny", "digest": "d" * 64},
        "cut": "0:3,3:6",
        "image": "registry.example/lamina:1",
        "store": {"endpoint": "http://store.example:9000"},
        "tracing": {"endpoint": "http://collector.monitoring:4318", "sample_ratio": 0.25},
    }
    for service in services(ResolvedPipeline(spec_from_dict(document), CUT, "d" * 64)):
        (container,) = service["spec"]["template"]["spec"]["containers"]
        told = {entry["name"]: entry["value"] for entry in container["env"] if entry["name"].startswith("OTEL_")}
        assert told == {
            "OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector.monitoring:4318",
            "OTEL_TRACES_SAMPLER": "parentbased_traceidratio",
            "OTEL_TRACES_SAMPLER_ARG": "0.25",
        }
    with pytest.raises(SpecError, match=r"\$\.tracing\.sample_ratio"):
        spec_from_dict({**document, "tracing": {"endpoint": "http://collector", "sample_ratio": 2}})


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Receiver]:
    """Spans of one event with a traceparent and of six concurrent conversations, after all processes have ended."""
    with otlp_receiver() as receiver, published_model(tmp_path_factory.mktemp("published")) as published:
        told = {"OTEL_EXPORTER_OTLP_ENDPOINT": receiver.endpoint, "OTEL_EXPORTER_OTLP_HEADERS": "x-tenant=lamina"}
        environments = [stage_environment(published, group, CUT) | told for group in range(2)]
        with running(environments) as stages:
            urls = [stage.url for stage in stages]
            with running([gateway_environment(published, urls, CUT) | told]) as (gateway,):
                _ask_by_event(gateway.url)
                with ThreadPoolExecutor(6) as executor:
                    list(executor.map(lambda number: _complete(gateway.url, number), range(6)))
        yield receiver


def _ask_by_event(url: str) -> None:
    headers = {
        "ce-specversion": "1.0",
        "ce-id": "asked",
        "ce-source": "/test",
        "ce-type": "dev.lamina.generate.request",
        "ce-traceparent": f"00-{TRACE}-{SPAN}-01",
        "content-type": "application/json",
    }
    body = json.dumps({"prompt": "the", "max_tokens": 3}).encode()
    with urllib.request.urlopen(urllib.request.Request(url, body, headers), timeout=60) as response:
        assert response.headers["ce-traceparent"] == headers["ce-traceparent"]


def _complete(url: str, number: int) -> None:
    body = json.dumps({"model": "tiny", "prompt": "the weather", "max_tokens": 24}).encode()
    headers = {"Content-Type": "application/json", "traceparent": f"00-{number + 1:032x}-{SPAN}-01"}
    urllib.request.urlopen(urllib.request.Request(f"{url}/v1/completions", body, headers), timeout=60).close()


def named(receiver: Receiver, name: str) -> list[SeenSpan]:
    return [span for span in receiver.spans if span.name == name]


@pytest.mark.slow
def test_a_clients_trace_goes_through_every_stage(traced: Receiver) -> None:
    (answer,) = (span for span in named(traced, "text_completion tiny") if span.trace_id == TRACE)
    assert (answer.parent_id, answer.kind, answer.service) == (SPAN, SERVER, "lamina-gateway")
    told = {name: value for name, value in answer.attributes.items() if name.startswith(("gen_ai.", "error."))}
    assert isinstance(told.pop("gen_ai.response.id"), str)
    assert told == {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "lamina",
        "gen_ai.request.model": "tiny",
        "gen_ai.response.model": "tiny",
        "gen_ai.request.max_tokens": 3,
        "gen_ai.request.temperature": 0.0,
        "gen_ai.request.seed": told["gen_ai.request.seed"],
        "gen_ai.usage.input_tokens": told["gen_ai.usage.input_tokens"],
        "gen_ai.usage.output_tokens": 3,
        "gen_ai.response.finish_reasons": ["length"],
    }
    assert told["gen_ai.usage.input_tokens"] > 0
    sent = {span.span_id: span for span in named(traced, "send forward") if span.trace_id == TRACE}
    assert len(sent) == 3 * 2, "three steps through two stages"
    assert {span.parent_id for span in sent.values()} == {answer.span_id}
    assert {span.kind for span in sent.values()} == {CLIENT}
    computed = [span for span in named(traced, "forward") if span.trace_id == TRACE]
    assert {span.parent_id for span in computed} == sent.keys()
    assert {span.attributes["lamina.layers"] for span in computed} == {"0:3", "3:6"}
    assert all(span.attributes["lamina.engine_seconds"] > 0 and span.service == "lamina-stage" for span in computed)
    assert {span.name for span in traced.spans if span.trace_id == TRACE} >= {"send reserve", "reserve"}


def test_a_micro_batch_links_to_all_its_sequences(traced: Receiver) -> None:
    answers = {(span.trace_id, span.span_id) for span in named(traced, "text_completion tiny")}
    assert len(answers) == 7
    steps = named(traced, "send forward")
    assert all(len(span.links) == span.attributes["lamina.sequences"] for span in steps)
    assert all(span.links <= answers for span in steps)
    assert any(len(span.links) > 1 for span in steps), "six conversations at once share micro-batches"
    assert set().union(*(span.links for span in steps)) == answers
    assert all((span.trace_id, span.parent_id) in span.links for span in steps)


def test_opentelemetrys_own_settings_hold(traced: Receiver) -> None:
    assert traced.headers["x-tenant"] == "lamina"
    assert all(len(span.attributes["lamina.pipeline"]) == 32 for span in traced.spans)


def test_a_failed_span_has_its_error_and_unsampled_spans_are_not_exported(monkeypatch: pytest.MonkeyPatch) -> None:
    with otlp_receiver() as receiver:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", receiver.endpoint)
        tracer = make_tracer(receiver.endpoint, "lamina-test", {})
        with pytest.raises(ValueError), tracer.serve("fails", None, {}) as span:
            raise ValueError("seven")
        span.end("too late")
        tracer.serve("quiet", TraceContext(TRACE, SPAN, sampled=False), {}).end()
        tracer.close()
    assert [(span.name, span.error) for span in receiver.spans] == [("fails", "ValueError: seven")]
