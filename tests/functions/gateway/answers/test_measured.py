"""What the doors say of time and of how answers ended: where the client's clock stands, and nothing that is not so."""

import time
from collections.abc import Callable

import pytest
from flask.testing import FlaskClient
from werkzeug.test import TestResponse

from eventing.problems import InvalidRequest, NotReady, PipelineUnavailable, Problem, QueueFull
from functions.gateway.answers import generation as core
from functions.gateway.app import MAX_REQUEST_BYTES
from functions.gateway.scheduling.token_stream import TokenStream
from functions.gateway.text.tokenizer import ModelText
from tests.support.functions.scripted_gateway import EVENT, TOKENIZER, Pipeline, ask, chat, client_of, refuse

Door = Callable[[FlaskClient], TestResponse]
DOORS: list[Door] = [lambda client: ask(client, {"prompt": "Hi"}), chat]


@pytest.mark.parametrize("door", DOORS, ids=["events", "openai"])
def test_the_clock_starts_where_the_clients_does(
    client: FlaskClient, pipeline: Pipeline, door: Door, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is done to a request before it is handed in took its client's time, and counts against its deadline."""
    for name in ("encode", "encode_messages"):
        real = getattr(ModelText, name)
        monkeypatch.setattr(
            ModelText, name, lambda text, *asked, real=real: (noted.append(time.monotonic()), real(text, *asked))[1]
        )
    noted: list[float] = []
    assert door(client).status_code == 200
    ((read_at,), (prompt,)) = noted, pipeline.prompts
    assert prompt.arrived is not None
    assert prompt.arrived < read_at
    seen = pipeline.stream.timings().time_to_first_token_seconds
    assert seen is not None
    assert seen > pipeline.stream._put_at[0] - read_at
    assert pipeline.value("time_to_first_token_seconds_sum") == seen


def test_the_servers_clock_is_believed(client: FlaskClient, pipeline: Pipeline) -> None:
    """Reading the body and waiting for a thread took time, too."""
    environ = {"lamina.arrived": time.monotonic() - 4.0}
    client.post("/", json={"prompt": "Hi"}, headers=EVENT, environ_overrides=environ)
    client.post("/v1/completions", json={"model": "tiny", "prompt": "Hi"}, headers={"Accept": "*/*"}, environ_overrides=environ)
    assert [prompt.arrived for prompt in pipeline.prompts] == [environ["lamina.arrived"]] * 2
    assert pipeline.value("time_to_first_token_seconds_sum") >= 8.0


def test_a_first_token_is_measured_also_of_an_answer_that_fails(client: FlaskClient, pipeline: Pipeline) -> None:
    pipeline.script = pipeline.say("Hel", end=False, then=PipelineUnavailable("stage 1 is gone"))
    for door in DOORS:
        assert door(client).status_code == 503
    assert pipeline.value("time_to_first_token_seconds_count") == 2
    assert pipeline.value("inter_token_latency_seconds_count") == 2 * 2
    assert pipeline.value("answer_seconds_count") == 0
    assert pipeline.value("answers_total", outcome="pipeline-unavailable") == 2
    pipeline.script = pipeline.say("", end=True)
    assert ask(client, {"prompt": "Hi"}).status_code == 200
    assert pipeline.value("time_to_first_token_seconds_count") == 3, "an end-of-text token is a first token, too"


def test_time_between_tokens_is_the_pipelines_and_not_the_readers(client: FlaskClient, pipeline: Pipeline) -> None:
    """Tokens that lie ready for long before anybody reads them, or are never read."""

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


@pytest.mark.parametrize("door", DOORS, ids=["events", "openai"])
@pytest.mark.parametrize("problem", [InvalidRequest("no"), QueueFull("256 wait"), NotReady("draining")])
def test_refusals_are_counted_by_outcome(client: FlaskClient, pipeline: Pipeline, door: Door, problem: Problem) -> None:
    pipeline.script = refuse(problem)
    status = 400 if door is chat and isinstance(problem, InvalidRequest) else problem.status
    assert door(client).status_code == status
    assert pipeline.value("answers_total", outcome=problem.name) == 1
    pipeline.script, pipeline.full = pipeline.say("Hi"), problem
    assert door(client).status_code == status
    assert pipeline.value("answers_total", outcome=problem.name) == 2


def test_strangers_and_large_bodies_are_counted_too(pipeline: Pipeline) -> None:
    closed = client_of(pipeline, LAMINA_API_KEYS="a-key")
    for door in DOORS:
        assert door(closed).status_code == 401
    assert closed.get("/v1/models").status_code == 401
    assert pipeline.value("answers_total", outcome="unauthorized") == 2, "only who asks for an answer counts"
    opened = client_of(pipeline)
    for path in ("/", "/v1/chat/completions"):
        assert opened.post(path, data=bytes(MAX_REQUEST_BYTES + 1), headers=EVENT).status_code == 413
        assert opened.post(path, data=b"{", headers=EVENT).status_code == 400
    assert pipeline.value("answers_total", outcome="event-too-large") == 2
    assert pipeline.value("answers_total", outcome="malformed-event") == 2


def test_a_stop_string_is_an_end_and_no_cancellation(client: FlaskClient, pipeline: Pipeline) -> None:
    pipeline.script = pipeline.say("One. Two. Three.", end=False)
    assert ask(client, {"prompt": "Hi", "stop": " Two"}).status_code == 200
    assert pipeline.stream.finish_reason == "stop", "which is what the scheduler counts it by"
    assert pipeline.value("answers_total", outcome="stop") == 1
    assert pipeline.value("answers_total", outcome="cancelled") == 0


@pytest.mark.parametrize("accept", ["application/json", "text/event-stream"])
@pytest.mark.parametrize("begun", [True, False])
def test_a_client_that_leaves_is_noticed_though_nothing_is_written(
    client: FlaskClient, pipeline: Pipeline, accept: str, begun: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether tokens come or not; looked for twice a second, at least."""
    assert core.LOOK_SECONDS <= 0.5
    monkeypatch.setattr(core, "LOOK_SECONDS", 0.01)
    pipeline.script = pipeline.say("Hel", end=False) if begun else lambda stream: None
    looks = [False, False, True]
    environ = {"lamina.client_gone": lambda: looks.pop(0)}
    headers = EVENT | {"Accept": accept}
    response = client.post("/", json={"prompt": "Hi"}, headers=headers, environ_overrides=environ)
    assert response.data.count(b"dev.lamina.generate.response") == 0
    assert (looks, pipeline.cancelled.is_set()) == ([], True)
    assert pipeline.value("answers_total", outcome="cancelled") == 1
    looks += [True]
    body = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "stream": accept != "application/json"}
    assert b"[DONE]" not in client.post("/v1/chat/completions", json=body, environ_overrides=environ).data
    assert pipeline.value("answers_total", outcome="cancelled") == 2


def test_a_client_that_leaves_before_the_first_byte_is_counted_once(client: FlaskClient, pipeline: Pipeline) -> None:
    pipeline.script = lambda _: None
    gone = {"lamina.client_gone": lambda: True}
    client.post("/", json={"prompt": "Hi"}, headers=EVENT | {"Accept": "text/event-stream"}, environ_overrides=gone)
    assert pipeline.value("answers_total", outcome="cancelled") == 1


@pytest.mark.parametrize("stream", [True, False])
def test_lines_of_the_log_name_the_request(
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


def test_every_token_has_its_time() -> None:
    stream = TokenStream(3, arrived=time.monotonic() - 5)
    assert stream.waits(0) == []
    for token in TOKENIZER.encode("abc", add_special_tokens=False).ids:
        stream.put(token)
    first, *others = stream.waits(0)
    assert first >= 5
    assert stream.waits(1) == others
    assert len(others) == 2
