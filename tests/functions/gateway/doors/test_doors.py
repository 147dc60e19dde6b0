"""Both doors of the gateway over a scripted pipeline: what is said in every case that a real one brings about seldom."""

import json
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from flask.testing import FlaskClient
from werkzeug.test import TestResponse

from eventing.http.sse import SSEDecoder
from eventing.problems import NotReady, PipelineUnavailable, Problem, QueueFull
from functions.configuration.config import GatewayConfig, read_config
from functions.gateway.app import MAX_REQUEST_BYTES, create_app
from functions.gateway.doors import answers as core
from functions.gateway.doors.answers import Generator
from functions.gateway.doors.metrics import GatewayMetrics
from functions.gateway.scheduling.sequence import Sequence
from functions.gateway.text.chat_template import ChatTemplate
from functions.gateway.text.tokenizer import ModelText
from tests.support.environments import GATEWAY
from tests.support.functions.sentencepiece import CONTINUED, ids_of, llama_2
from tests.support.storage.published import CHAT_TEMPLATE, byte_tokenizer

TOKENIZER = byte_tokenizer()
END = 4
CONTEXT = 64
EVENT = {
    "ce-specversion": "1.0",
    "ce-id": "1",
    "ce-source": "/client",
    "ce-type": "dev.lamina.generate.request",
    "Content-Type": "application/json",
}


class Pipeline:
    """Answers each sequence with `text` and an end token, or does what `script` says."""

    def __init__(self) -> None:
        self.sequences: list[Sequence] = []
        self.cancelled = threading.Event()
        self.script: Callable[[Sequence], None] = self.say("Hello there")

    def submit(self, sequence: Sequence) -> None:
        self.sequences.append(sequence)
        sequence.attach(self.cancelled.set)
        self.script(sequence)

    def say(self, text: str, end: bool = True, then: Problem | None = None) -> Callable[[Sequence], None]:
        def script(sequence: Sequence) -> None:
            for token in TOKENIZER.encode(text, add_special_tokens=False).ids + [END] * end:
                sequence.put(token)
            if then is not None:
                sequence.fail(then)

        return script


def refuse(problem: Problem) -> Callable[[Sequence], None]:
    def script(_: Sequence) -> None:
        raise problem

    return script


@pytest.fixture
def pipeline() -> Pipeline:
    return Pipeline()


def client_of(pipeline: Pipeline, **environ: str) -> FlaskClient:
    config = read_config(GATEWAY | environ)
    assert isinstance(config, GatewayConfig)
    text = ModelText(TOKENIZER, ChatTemplate(CHAT_TEMPLATE, {}), frozenset([END]), CONTEXT)
    generator = Generator(text, pipeline, GatewayMetrics())
    return create_app(config, lambda: generator).test_client()


@pytest.fixture
def client(pipeline: Pipeline) -> FlaskClient:
    return client_of(pipeline)


def ask(client: FlaskClient, data: Any, **headers: str) -> TestResponse:
    return client.post("/", json=data, headers=EVENT | {name.replace("_", "-"): value for name, value in headers.items()})


def chat(client: FlaskClient, **fields: Any) -> TestResponse:
    body = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}]} | fields
    return client.post("/v1/chat/completions", json=body)


def stream(response: TestResponse) -> list[Any]:
    events = [event.data for event in SSEDecoder().feed(response.data)]
    return [event if event == "[DONE]" else json.loads(event) for event in events]


def test_a_continuation_has_the_space_before_its_first_word_and_a_message_has_not(pipeline: Pipeline) -> None:
    tokenizer = llama_2()
    config = read_config(GATEWAY)
    assert isinstance(config, GatewayConfig)
    end = tokenizer.token_to_id("</s>")
    text = ModelText(tokenizer, ChatTemplate("{{ messages[0].content }}", {}), frozenset([end]), CONTEXT)
    generator = Generator(text, pipeline, GatewayMetrics())
    client = create_app(config, lambda: generator).test_client()

    def script(sequence: Sequence) -> None:
        for token in [*ids_of(tokenizer, "▁Paris", "."), end]:
            sequence.put(token)

    pipeline.script = script
    continued = client.post("/v1/completions", json={"model": "tiny", "prompt": CONTINUED})
    answered = chat(client, messages=[{"role": "user", "content": CONTINUED}])
    assert continued.json is not None
    assert answered.json is not None
    assert continued.json["choices"][0]["text"] == " Paris."
    assert answered.json["choices"][0]["message"]["content"] == "Paris."


def test_binary_in_binary_out(client: FlaskClient) -> None:
    response = ask(client, {"prompt": "Hi"}, ce_traceparent="00-1-2-01")
    assert response.status_code == 200
    assert response.headers["ce-type"] == "dev.lamina.generate.response"
    assert response.headers["ce-source"] == "/pipelines/0123456789ab/gateway"
    assert response.headers["ce-traceparent"] == "00-1-2-01"
    answer = response.json
    assert answer is not None
    assert (answer["text"], answer["finish_reason"]) == ("Hello there", "stop")
    assert answer["usage"] == {"prompt_tokens": 3, "completion_tokens": 9, "total_tokens": 12}
    assert TOKENIZER.decode(answer["token_ids"]) == "Hello there"
    assert answer["timings"]["total_seconds"] >= answer["timings"]["time_to_first_token_seconds"] > 0


def test_structured_in_structured_out(client: FlaskClient) -> None:
    event = {name.removeprefix("ce-"): value for name, value in EVENT.items() if name.startswith("ce-")}
    body = json.dumps(event | {"data": {"prompt": "Hi"}})
    response = client.post("/", data=body, content_type="application/cloudevents+json")
    assert response.content_type == "application/cloudevents+json"
    assert json.loads(response.data)["type"] == "dev.lamina.generate.response"
    assert json.loads(response.data)["data"]["text"] == "Hello there"


def test_the_same_request_has_the_same_reply_id_and_seed(client: FlaskClient, pipeline: Pipeline) -> None:
    first, again, other = (ask(client, {"prompt": "Hi"}, ce_id=id_) for id_ in ("1", "1", "2"))
    assert first.headers["ce-id"] == again.headers["ce-id"] != other.headers["ce-id"]
    seeds = [sequence.sampling.seed for sequence in pipeline.sequences]
    assert seeds[0] == seeds[1] != seeds[2]


def test_options_reach_the_pipeline(client: FlaskClient, pipeline: Pipeline) -> None:
    options = {"temperature": 0.5, "top_k": 4, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.1, "seed": 7}
    ask(client, {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 5, **options})
    (sequence,) = pipeline.sequences
    assert {name: getattr(sequence.sampling, name) for name in options} == options
    assert sequence.max_tokens == 5
    assert sequence.eos_ids == {END}
    assert TOKENIZER.decode(sequence.tokens[: sequence.prompt_tokens], skip_special_tokens=False) == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_stream_of_events(client: FlaskClient) -> None:
    response = ask(client, {"prompt": "Hi"}, Accept="text/event-stream")
    assert response.content_type.startswith("text/event-stream")
    *tokens, last = stream(response)
    assert {event["type"] for event in tokens} == {"dev.lamina.generate.token"}
    assert "".join(event["data"]["text"] for event in tokens) == "Hello there" == last["data"]["text"]
    assert [event["data"]["token_id"] for event in tokens] == last["data"]["token_ids"]
    assert [event["data"]["index"] for event in tokens] == list(range(len(tokens)))
    assert last["type"] == "dev.lamina.generate.response"
    assert len({event["id"] for event in [*tokens, last]}) == len(tokens) + 1


def test_a_stop_string_ends_the_answer_and_frees_the_pipeline(client: FlaskClient, pipeline: Pipeline) -> None:
    pipeline.script = pipeline.say("One. Two. Three.", end=False)
    *tokens, last = stream(ask(client, {"prompt": "Hi", "stop": [" Three", " Two"]}, Accept="text/event-stream"))
    assert "".join(event["data"]["text"] for event in tokens) == "One." == last["data"]["text"]
    assert last["data"]["finish_reason"] == "stop"
    assert last["data"]["usage"]["completion_tokens"] == len(last["data"]["token_ids"]) == len("One. Two")
    assert pipeline.cancelled.is_set()


def test_an_answer_that_breaks_ends_with_an_error_event(client: FlaskClient, pipeline: Pipeline) -> None:
    pipeline.script = pipeline.say("Hel", end=False, then=PipelineUnavailable("stage 1 is gone"))
    *tokens, error = stream(ask(client, {"prompt": "Hi"}, Accept="text/event-stream"))
    assert "".join(event["data"]["text"] for event in tokens) == "Hel"
    assert error["type"] == "dev.lamina.generate.error"
    assert error["data"]["type"] == "urn:lamina:problem:pipeline-unavailable"
    assert (error["data"]["status"], error["data"]["detail"]) == (503, "stage 1 is gone")
    *_, error = stream(chat(client, stream=True))
    assert error["error"] == {
        "message": "stage 1 is gone",
        "type": "server_error",
        "param": None,
        "code": "pipeline_unavailable",
    }


@pytest.mark.parametrize("problem", [QueueFull("256 wait"), NotReady("draining")])
@pytest.mark.parametrize("accept", ["application/json", "text/event-stream"])
def test_a_refusal_has_its_status_also_where_a_stream_was_wanted(
    client: FlaskClient, pipeline: Pipeline, problem: Problem, accept: str
) -> None:
    pipeline.script = refuse(problem)
    response = ask(client, {"prompt": "Hi"}, Accept=accept)
    assert (response.status_code, response.content_type) == (problem.status, "application/problem+json")
    response = chat(client, stream=accept != "application/json")
    assert response.status_code == problem.status
    assert response.json is not None
    assert response.json["error"]["code"] == problem.name.replace("-", "_")


def test_a_broken_answer_that_is_no_stream_has_its_status(client: FlaskClient, pipeline: Pipeline) -> None:
    pipeline.script = pipeline.say("Hel", end=False, then=PipelineUnavailable("stage 1 is gone"))
    assert ask(client, {"prompt": "Hi"}).status_code == 503
    assert chat(client).status_code == 503


@pytest.mark.parametrize(
    "door", [lambda c: ask(c, {"prompt": "Hi"}, Accept="text/event-stream"), lambda c: chat(c, stream=True)]
)
def test_an_unexpected_error_is_told_without_its_details(
    client: FlaskClient, pipeline: Pipeline, door: Callable[[FlaskClient], TestResponse], caplog: pytest.LogCaptureFixture
) -> None:
    pipeline.script = lambda sequence: setattr(sequence, "next_token", None)
    last = stream(door(client))[-1]
    assert "traceback" in json.dumps(last)
    assert "NoneType" not in json.dumps(last)
    assert "NoneType" in caplog.text


def test_silence_is_filled_and_a_client_that_leaves_ends_its_answer(
    client: FlaskClient, pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(core.Generation.tokens, "__defaults__", (0.01,))
    pipeline.script = pipeline.say("Hel", end=False)
    for response in (ask(client, {"prompt": "Hi"}, Accept="text/event-stream"), chat(client, stream=True)):
        pipeline.cancelled.clear()
        chunks = iter(response.response)
        seen = [next(chunks) for _ in range(8)]
        assert seen[-1] == b":\n\n"
        response.close()
        assert pipeline.cancelled.wait(5)


def test_a_client_that_leaves_before_the_first_byte_ends_its_answer(client: FlaskClient, pipeline: Pipeline) -> None:
    pipeline.script = lambda sequence: None
    ask(client, {"prompt": "Hi"}, Accept="text/event-stream").close()
    assert pipeline.cancelled.is_set()


def test_an_answer_lasts_no_longer_than_its_event(client: FlaskClient, pipeline: Pipeline) -> None:
    soon = (datetime.now(UTC) + timedelta(seconds=30)).isoformat()
    ask(client, {"prompt": "Hi"}, ce_expirytime=soon)
    assert 20 < pipeline.sequences[0].deadline - time.monotonic() <= 30
    past = (datetime.now(UTC) - timedelta(seconds=30)).isoformat()
    assert ask(client, {"prompt": "Hi"}, ce_expirytime=past).status_code == 410


def test_the_answer_fits_into_the_context(client: FlaskClient, pipeline: Pipeline) -> None:
    ask(client, {"prompt": "x" * 50, "max_tokens": 1000})
    assert pipeline.sequences[0].max_tokens == CONTEXT - 51
    refused = ask(client, {"prompt": "x" * 63})
    assert refused.status_code == 422
    assert refused.json is not None
    assert "64 tokens" in refused.json["detail"]
    assert chat(client, messages=[{"role": "user", "content": "x" * 63}]).status_code == 422


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({}, "prompt"),
        ({"prompt": "a", "messages": [{"role": "user", "content": "b"}]}, "both"),
        ({"prompt": ""}, "$.prompt"),
        ({"prompt": "a", "max_tokens": 0}, "$.max_tokens"),
        ({"prompt": "a", "temperature": -1}, "$.temperature"),
        ({"prompt": "a", "top_p": 0}, "$.top_p"),
        ({"prompt": "a", "stop": [""]}, "$.stop"),
        ({"prompt": "a", "tempreature": 1}, "tempreature"),
        ({"messages": [{"role": "robot", "content": "b"}]}, "$.messages[0].role"),
    ],
)
def test_a_malformed_request_names_what_is_wrong(client: FlaskClient, data: Any, words: str) -> None:
    response = ask(client, data)
    assert response.status_code == 400
    assert response.json is not None
    assert words in response.json["detail"]


def test_bodies_that_cannot_be_read(client: FlaskClient) -> None:
    for content_type, body in (("application/json", b'{"prompt": "\xff"}'), ("application/cloudevents+json", b"\xff{")):
        response = client.post("/", data=body, headers=EVENT | {"Content-Type": content_type})
        assert response.status_code == 400
    assert client.post("/", json={"prompt": "Hi"}).status_code == 400
    assert ask(client, {"prompt": "Hi"}, ce_type="dev.lamina.forward").status_code == 400
    assert client.post("/v1/chat/completions", data=b"\xff").status_code == 400
    assert client.post("/", data=bytes(MAX_REQUEST_BYTES + 1), headers=EVENT).status_code == 413
    assert client.post("/v1/chat/completions", data=bytes(MAX_REQUEST_BYTES + 1)).status_code == 413


@pytest.mark.parametrize(
    ("fields", "status", "words"),
    [
        ({"model": "gpt-4"}, 404, "'gpt-4'"),
        ({"n": 2}, 400, "$.n"),
        ({"tools": [{"type": "function"}]}, 400, "$.tools"),
        ({"presence_penalty": 0.5}, 400, "$.presence_penalty"),
        ({"logprobs": True}, 400, "$.logprobs"),
        ({"response_format": {"type": "json_object"}}, 400, "$.response_format"),
        ({"temperature": 3}, 400, "$.temperature"),
        ({"no_such_field": 1}, 400, "no_such_field"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "image_url"),
    ],
)
def test_what_the_openai_door_does_not_serve_it_names(
    client: FlaskClient, fields: dict[str, Any], status: int, words: str
) -> None:
    response = chat(client, **fields)
    assert response.status_code == status
    assert response.json is not None
    assert words in response.json["error"]["message"]
    assert response.json["error"]["type"] == "invalid_request_error"


def test_openai_options_reach_the_pipeline(client: FlaskClient, pipeline: Pipeline) -> None:
    parts = [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]
    fields = {"n": 1, "user": "me", "logit_bias": {}, "top_k": 3, "max_completion_tokens": 7, "max_tokens": 9, "stop": "x"}
    response = chat(client, messages=[{"role": "developer", "content": parts}], **fields)
    assert response.status_code == 200
    (sequence,) = pipeline.sequences
    assert (sequence.max_tokens, sequence.sampling.top_k, sequence.sampling.temperature) == (7, 3, 1.0)
    assert "<|im_start|>system\nHi" in TOKENIZER.decode(sequence.tokens[: sequence.prompt_tokens], skip_special_tokens=False)


@pytest.fixture
def closed(pipeline: Pipeline) -> FlaskClient:
    return client_of(pipeline, LAMINA_API_KEYS="first-key, second-key")


@pytest.mark.parametrize("given", [None, "Bearer wrong-key", "first-key", "Basic first-key", "Bearer "])
def test_both_doors_want_a_key_where_keys_are_configured(closed: FlaskClient, given: str | None) -> None:
    headers = {} if given is None else {"Authorization": given}
    assert ask(closed, {"prompt": "Hi"}, **headers).status_code == 401
    for refused in (closed.get("/v1/models", headers=headers), closed.post("/v1/completions", headers=headers, data=b"{")):
        assert refused.status_code == 401
        assert refused.json is not None
        assert refused.json["error"]["type"] == "authentication_error"


def test_clients_are_told_apart_by_their_keys_without_keeping_them(closed: FlaskClient, pipeline: Pipeline) -> None:
    for key in ("first-key", "second-key", "first-key"):
        assert ask(closed, {"prompt": "Hi"}, Authorization=f"Bearer {key}").status_code == 200
    one, two, three = (sequence.client_id for sequence in pipeline.sequences)
    assert one == three != two
    assert "key" not in one


def test_without_keys_clients_are_told_apart_by_address(client: FlaskClient, pipeline: Pipeline) -> None:
    ask(client, {"prompt": "Hi"}, X_Forwarded_For="10.0.0.7, 10.1.0.1")
    ask(client, {"prompt": "Hi"})
    assert [sequence.client_id for sequence in pipeline.sequences] == ["10.0.0.7", "127.0.0.1"]
