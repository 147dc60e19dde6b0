"""Answers in both APIs: how they end, fail, and are refused."""

import gc
import itertools
import json
import re
import threading
import weakref
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from flask.testing import FlaskClient
from werkzeug.test import TestResponse

from eventing.problems import NotReady, PipelineUnavailable, Problem, QueueFull
from eventing.wire.generation import GenerateRequest, ProgressEvent, TokenLogprob
from functions.gateway.answers import generation
from functions.gateway.answers.adapters import ServedModels
from functions.gateway.answers.authentication import KeyRing
from functions.gateway.answers.service import MAX_LOGPROBS, AnswerService
from functions.gateway.app import create_app
from functions.gateway.scheduling.token_stream import TokenStream
from functions.gateway.text.chat_template import ChatTemplate
from functions.gateway.text.encoder import Encoder
from functions.gateway.text.tokenizer import ModelText
from tests.support.environments import gateway_config
from tests.support.functions.gateway import wait_until
from tests.support.functions.scripted_gateway import (
    APIS,
    CONTEXT,
    END,
    EVENT,
    Pipeline,
    ask,
    ask_either,
    chat,
    client_of,
    refuse,
    stream,
)
from tests.support.functions.sentencepiece import CONTINUED, ids_of, llama_2


def test_a_stop_string_ends_the_answer_and_frees_the_pipeline(client: FlaskClient, pipeline: Pipeline) -> None:
    pipeline.script = pipeline.say("One. Two. Three.", end=False)
    *tokens, last = stream(ask(client, {"prompt": "Hi", "stop": [" Three", " Two"]}, Accept="text/event-stream"))
    assert "".join(event["data"]["text"] for event in tokens) == "One." == last["data"]["text"]
    assert last["data"]["finish_reason"] == "stop"
    assert last["data"]["usage"]["completion_tokens"] == len(last["data"]["token_ids"]) == len("One. Two")
    assert pipeline.cancelled.is_set()


def test_a_stream_that_fails_ends_with_an_error_event(client: FlaskClient, pipeline: Pipeline) -> None:
    pipeline.script = pipeline.say("Hel", end=False, then=PipelineUnavailable("stage 1 is gone"))
    *tokens, error = stream(ask(client, {"prompt": "Hi"}, Accept="text/event-stream"))
    assert "".join(event["data"]["text"] for event in tokens) == "Hel"
    assert error["type"] == "dev.lamina.generate.error"
    assert error["data"]["type"] == "urn:lamina:problem:pipeline-unavailable"
    assert (error["data"]["status"], error["data"]["detail"]) == (503, "stage 1 is gone")
    *_, error = stream(chat(client, stream=True))
    named = {"message": "stage 1 is gone", "type": "server_error", "param": None, "code": "pipeline_unavailable"}
    assert error["error"] == named


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("api", APIS)
def test_an_answer_that_failed_leaves_nothing_to_the_garbage_collector(
    client: FlaskClient, pipeline: Pipeline, api: str, streams: bool
) -> None:
    pipeline.script = pipeline.say("Hello", end=False, then=PipelineUnavailable("a stage is away"))
    gc.disable()
    try:
        ask_either(client, api, streams=streams).close()
        failed = weakref.ref(pipeline.stream)
        del pipeline.stream
        wait_until(lambda: failed() is None, "the end of the thread that answered")
    finally:
        gc.enable()


@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("submitted", [False, True])
@pytest.mark.parametrize("problem", [QueueFull("256 wait"), NotReady("draining"), PipelineUnavailable("stage 1 is gone")])
def test_a_problem_before_the_first_token_has_its_status(
    client: FlaskClient, pipeline: Pipeline, problem: Problem, submitted: bool, streams: bool, api: str
) -> None:
    pipeline.script = pipeline.say("", end=False, then=problem) if submitted else refuse(problem)
    response = ask_either(client, api, streams=streams)
    assert response.status_code == problem.status
    if api == "openai":
        assert response.get_json()["error"]["code"] == problem.name.replace("-", "_")
    else:
        assert response.content_type == "application/problem+json"
    assert pipeline.value("answers_total", outcome=problem.name) == 1


@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize("tokens", [0, 2])
def test_an_unexpected_error_is_reported_without_its_details(
    client: FlaskClient, pipeline: Pipeline, tokens: int, api: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Before the first token by the status, later by the last event of the stream."""

    def script(stream: TokenStream) -> None:
        pipeline.say("Hello", end=False)(stream)
        given = [stream.next_token(0) for _ in range(tokens)]
        again = iter(given)
        stream.next_token = lambda _: next(again)  # type: ignore[method-assign, assignment]  # then StopIteration

    pipeline.script = script
    response = ask_either(client, api, streams=True)
    assert response.status_code == (200 if tokens else 500)
    last = stream(response)[-1] if tokens else response.json
    assert "traceback" in json.dumps(last)
    assert "generator" not in json.dumps(last)
    assert "StopIteration" in caplog.text


@pytest.mark.usefixtures("quick_looks")
@pytest.mark.usefixtures("abandoned_at_once")
def test_a_silent_stream_has_comments_and_a_client_that_leaves_ends_it(pipeline: Pipeline) -> None:
    client = client_of(pipeline, LAMINA_KEEP_ALIVE_SECONDS="0.01")
    pipeline.script = pipeline.say("Hel", end=False)
    for api in APIS:
        pipeline.cancelled.clear()
        response = ask_either(client, api, streams=True)
        chunks = iter(response.response)
        seen = [next(chunks) for _ in range(8)]
        assert seen[-1] == b":\n\n"
        response.close()
        assert pipeline.cancelled.wait(60)


@pytest.fixture
def quick_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "LOOK_SECONDS", 0.01)


def saying_after(pipeline: Pipeline, waits: int, then: Callable[[TokenStream], object]) -> Callable[[TokenStream], None]:
    """A script that does `then` after the API has waited so often in vain."""

    def script(stream: TokenStream) -> None:
        real, waited = stream.next_token, itertools.count(1)

        def next_token(seconds: float) -> int | None:
            token = real(seconds)
            if next(waited) == waits:
                then(stream)
            return token

        stream.next_token = next_token  # type: ignore[method-assign]

    return script


@pytest.mark.usefixtures("quick_looks")
@pytest.mark.parametrize("api", APIS)
def test_a_stream_is_kept_alive_before_its_first_token(pipeline: Pipeline, api: str) -> None:
    client = client_of(pipeline, LAMINA_KEEP_ALIVE_SECONDS="0.01")
    pipeline.script = lambda _: None
    chunks = iter(ask_either(client, api, streams=True).response)
    assert [next(chunks) for _ in range(3)] == [b":\n\n"] * 3
    pipeline.say("Hello")(pipeline.stream)
    assert any(chunk.startswith(b"data: ") for chunk in chunks)


@pytest.mark.usefixtures("quick_looks")
@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize("keep_alive", ["0", "30"])
def test_what_fails_before_the_first_byte_has_a_status(pipeline: Pipeline, api: str, keep_alive: str) -> None:
    client = client_of(pipeline, LAMINA_KEEP_ALIVE_SECONDS=keep_alive)
    pipeline.script = saying_after(pipeline, 30, lambda stream: stream.fail(PipelineUnavailable("no stage")))
    response = ask_either(client, api, streams=True)
    assert response.status_code == 503
    assert "no stage" in response.text
    assert not response.text.startswith(":")


@pytest.mark.usefixtures("quick_looks")
@pytest.mark.parametrize("api", APIS)
def test_what_fails_after_the_first_byte_is_an_event(pipeline: Pipeline, api: str) -> None:
    client = client_of(pipeline, LAMINA_KEEP_ALIVE_SECONDS="0.01")
    pipeline.script = lambda _: None
    response = ask_either(client, api, streams=True)
    pipeline.stream.fail(PipelineUnavailable("no stage"))
    assert response.status_code == 200
    assert response.text.startswith(":\n\n")
    assert "no stage" in response.text


@pytest.mark.usefixtures("quick_looks")
@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize("wanted", [True, False])
def test_progress_is_sent_to_those_that_ask_for_it(pipeline: Pipeline, api: str, wanted: bool) -> None:
    client = client_of(pipeline)
    loading = ProgressEvent("start", "stage 2 of 3 loading, 41 %", stage=2, stages=3, percent=41)
    pipeline.awaited = loading
    pipeline.script = saying_after(pipeline, 30, pipeline.say("Hello"))
    response = ask_either(client, api, streams=True, include_progress=wanted)
    told = [event for event in stream(response) if isinstance(event, dict) and "41 %" in json.dumps(event)]
    assert len(told) == wanted, "once, as it does not change"
    for event in told:
        assert msgspec.to_builtins(loading) in (event.get("progress"), event.get("data"))


@pytest.mark.usefixtures("quick_looks")
@pytest.mark.parametrize("api", APIS)
def test_a_repeated_request_does_not_get_progress_that_is_over(pipeline: Pipeline, api: str) -> None:
    client = client_of(pipeline)
    client.environ_base["HTTP_IDEMPOTENCY_KEY"] = "order-66"
    pipeline.awaited = ProgressEvent("turn", "41 waiting")
    pipeline.script = saying_after(pipeline, 30, pipeline.say("Hello"))

    def asked() -> TestResponse:
        if api == "openai":
            return ask_either(client, api, streams=True, include_progress=True)
        return ask(client, {"prompt": "Hi", "include_progress": True}, ce_id="7", Accept="text/event-stream")

    first, again = ([event if event == "[DONE]" else event | {"time": ""} for event in stream(asked())] for _ in range(2))
    assert len(pipeline.prompts) == 1
    assert again == [event for event in first if "41 waiting" not in json.dumps(event)] != first


def test_a_stream_whose_tokens_give_no_text_is_kept_alive(pipeline: Pipeline) -> None:
    """Its tokens begin a tool call, which is sent once its name is known."""
    client = client_of(pipeline, context=4096, LAMINA_KEEP_ALIVE_SECONDS="0.05")
    kept_alive = threading.Event()

    def call_slowly(stream: TokenStream) -> None:
        pipeline.say("<tool_call>\n{", end=False)(stream)
        while not kept_alive.wait(0.02):
            pipeline.say(" ", end=False)(stream)
        pipeline.say('"name": "add", "arguments": {}}\n</tool_call>')(stream)

    pipeline.script = lambda stream: threading.Thread(target=call_slowly, args=(stream,)).start()
    tools = [{"type": "function", "function": {"name": "add"}}]
    chunks = iter(chat(client, stream=True, tools=tools).response)
    before = list(itertools.takewhile(lambda chunk: chunk != b":\n\n", chunks))
    kept_alive.set()
    assert b'"name":"add"' not in b"".join(before)
    assert b'"name":"add"' in b"".join(chunks)


@pytest.mark.slow
def test_a_quick_answer_has_no_progress(pipeline: Pipeline) -> None:
    pipeline.awaited = ProgressEvent("turn", "in the queue")
    assert "in the queue" not in ask_either(client_of(pipeline), "openai", streams=True, include_progress=True).text


@pytest.mark.slow
@pytest.mark.usefixtures("abandoned_at_once")
def test_an_answer_is_cancelled_if_its_client_leaves_before_the_first_byte(client: FlaskClient, pipeline: Pipeline) -> None:
    pipeline.script = lambda _: None
    gone = {"lamina.client_gone": lambda: True}
    response = client.post("/", json={"prompt": "Hi"}, headers=EVENT | {"Accept": "text/event-stream"}, environ_overrides=gone)
    assert (response.status_code, response.data) == (499, b"")
    wait_until(lambda: pipeline.cancelled.is_set() and pipeline.value("answers_total", outcome="cancelled") == 1)


def test_prompt_and_answer_fit_into_the_context(client: FlaskClient, pipeline: Pipeline) -> None:
    ask(client, {"prompt": "x" * 50, "max_tokens": 1000})
    assert pipeline.prompts[0].max_tokens == CONTEXT - 51


SCORE = EVENT | {"ce-type": "dev.lamina.score.request", "Prefer": "reply"}
TOO_LONG: list[tuple[str, dict[str, str], dict[str, Any]]] = [
    *(
        (path, headers, body)
        for count in (63, 200, 5000)
        for path, headers, body in (
            ("/v1/chat/completions", {}, {"model": "tiny", "messages": [{"role": "user", "content": "x" * count}]}),
            ("/v1/chat/completions", {}, {"model": "tiny", "messages": [{"role": "user", "content": "x"}] * count}),
            ("/v1/completions", {}, {"model": "tiny", "prompt": "x" * count}),
            ("/v1/completions", {}, {"model": "tiny", "prompt": [7] * (count + 1)}),
            ("/v1/responses", {}, {"model": "tiny", "input": "x" * count}),
            ("/", EVENT, {"prompt": "x" * count}),
            ("/", SCORE, {"text": "x" * (count + 1)}),
            ("/", SCORE, {"token_ids": [7] * (count + 2)}),
        )
    ),
    ("/tokenize", {}, {"prompt": "x" * 5000}),
    ("/tokenize", {}, {"messages": [{"role": "user", "content": "x" * 50}]}),
    ("/detokenize", {}, {"tokens": [7] * 65}),
]


@pytest.mark.parametrize(("path", "headers", "body"), TOO_LONG)
def test_what_exceeds_the_context_gets_the_error_that_client_programs_know(
    pipeline: Pipeline, path: str, headers: dict[str, str], body: dict[str, Any]
) -> None:
    """LiteLLM, LangChain and Open WebUI look for these words or for the code."""
    growing = "{% for n in range(99) %}{{ messages[0].content }}{% endfor %}"
    reply = client_of(pipeline, template=growing, LAMINA_SCORES="on").post(path, headers=headers, json=body).get_json()
    if path.startswith("/v1"):
        words, code = reply["error"]["message"], reply["error"]["code"]
        assert reply["error"]["param"] == {"chat/completions": "messages", "completions": "prompt"}.get(path[4:], "input")
    else:
        words, code = reply["detail"], reply["type"].removeprefix("urn:lamina:problem:").replace("-", "_")
    assert re.match(r"This model's maximum context length is 64 tokens\. However, your .*\. Please reduce its length\.$", words)
    assert code == "context_length_exceeded"
    assert not pipeline.prompts


MANY_LOGPROBS = [
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": ""}], "logprobs": True, "top_logprobs": 20}, 1, 0, 21),
    ("/v1/completions", {"prompt": "x", "logprobs": 3, "n": 2}, 2, 0, 4),
    ("/v1/completions", {"prompt": ["x" * 99] * 5, "logprobs": 0, "echo": True, "n": 3}, 15, 5 * 100, 1),
    ("/v1/responses", {"input": "x", "include": ["message.output_text.logprobs"], "top_logprobs": 4}, 1, 0, 5),
    ("/", {"prompt": "x", "logprobs": 7}, 1, 0, 8),
]


@pytest.mark.parametrize(("path", "body", "answers", "echoed", "each"), MANY_LOGPROBS)
def test_log_probabilities_of_a_request_are_bounded_before_it_is_queued(
    pipeline: Pipeline, path: str, body: dict[str, Any], answers: int, echoed: int, each: int
) -> None:
    """Every answer may have as many tokens as keep all within the bound; one more is refused, if they were asked for."""
    client = client_of(pipeline, context=200_000)

    def script(stream: TokenStream) -> None:
        stream.scored(1, [TokenLogprob(7, -1.0)] * 99)
        stream.put(7, TokenLogprob(7, -1.0))
        stream.put(END)

    pipeline.script = script
    longest = (MAX_LOGPROBS // each // body.get("n", 1) - echoed) // (answers // body.get("n", 1))

    def send(tokens: int | None) -> Any:
        name = "max_output_tokens" if path.endswith("responses") else "max_tokens"
        asked = body | ({} if path == "/" else {"model": "tiny"}) | ({} if tokens is None else {name: tokens})
        return client.post(path, json=asked, headers=EVENT | {"ce-id": f"{tokens}"} if path == "/" else {})

    refused = send(longest + 1)
    assert refused.status_code == (422 if path == "/" else 400)
    product = (body.get("n", 1) * echoed + answers * (longest + 1)) * each
    assert f"log-probabilities of each are {product}; one request may have {MAX_LOGPROBS}" in refused.text
    assert not pipeline.prompts
    assert send(longest).status_code == 200
    assert send(None).status_code == 200
    assert [(prompt.max_tokens, prompt.open_ended) for prompt in pipeline.prompts] == [
        *[(longest, False)] * answers,
        *[(longest, True)] * answers,
    ]


def test_echoed_prompts_alone_may_have_too_many_log_probabilities(pipeline: Pipeline) -> None:
    client = client_of(pipeline, context=2048)
    body = {"model": "tiny", "prompt": ["x" * 2000] * 7, "logprobs": 9, "echo": True}
    for more in ({}, {"max_tokens": 0}, {"prompt": ["x" * 2000] * 66, "logprobs": None, "max_tokens": 0}):
        assert "one request may have" in client.post("/v1/completions", json=body | more).text
    assert not pipeline.prompts
    assert client.post("/v1/completions", json=body | {"logprobs": None}).status_code == 200


@pytest.mark.parametrize("content", ["7" * 100_000, "7" * 500])
@pytest.mark.parametrize("full", [None, QueueFull("256 wait")])
def test_a_request_that_will_be_refused_is_not_tokenized(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch, content: str, full: QueueFull | None
) -> None:
    """Its length is checked first, then the queue. Only then is it rendered or tokenized."""
    read: list[str] = []
    monkeypatch.setattr(Encoder, "encode", lambda _, prompt: read.append(prompt) or [1])
    monkeypatch.setattr(ModelText, "encode_messages", lambda _, messages, *__: read.append(messages[0].content) or [1])
    client = client_of(pipeline)
    pipeline.full = full
    long = len(content) > 1000
    expected = 400 if long else 200 if full is None else 429
    assert ask(client, {"prompt": content}).status_code == (422 if long else expected)
    reply = chat(client, messages=[{"role": "user", "content": content}])
    assert (reply.status_code, reply.headers.get("Retry-After")) == (expected, "1" if expected == 429 else None)
    assert (pipeline.entered, len(read)) == (0 if long else 2, 2 if expected == 200 else 0)


def test_bodies_that_cannot_be_parsed_are_refused(client: FlaskClient) -> None:
    for content_type, body in (("application/json", b'{"prompt": "\xff"}'), ("application/cloudevents+json", b"\xff{")):
        response = client.post("/", data=body, headers=EVENT | {"Content-Type": content_type})
        assert response.status_code == 400
    assert client.post("/", json={"prompt": "Hi"}).status_code == 400
    assert ask(client, {"prompt": "Hi"}, ce_type="dev.lamina.forward").status_code == 400
    assert client.post("/v1/chat/completions", data=b"\xff").status_code == 400


def test_a_completion_keeps_the_space_before_its_first_word_and_a_message_has_none(pipeline: Pipeline) -> None:
    tokenizer = llama_2()
    end = tokenizer.token_to_id("</s>")
    text = ModelText(tokenizer, ChatTemplate("{{ messages[0].content }}", {}), frozenset([end]), CONTEXT)
    answers = AnswerService(text, pipeline, pipeline.metrics, models=ServedModels("tiny", None))
    client = create_app(gateway_config(), lambda: answers, pipeline.metrics, KeyRing()).test_client()

    def script(stream: TokenStream) -> None:
        for token in [*ids_of(tokenizer, "▁Paris", "."), end]:
            stream.put(token)

    pipeline.script = script
    continued = client.post("/v1/completions", json={"model": "tiny", "prompt": CONTINUED})
    answered = chat(client, messages=[{"role": "user", "content": CONTINUED}])
    assert continued.get_json()["choices"][0]["text"] == " Paris."
    assert answered.get_json()["choices"][0]["message"]["content"] == "Paris."


def test_a_refused_request_is_not_copied_for_each_of_its_answers(
    client: FlaskClient, pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Copying a million tokens for 128 answers took 4 s before their number was checked."""
    monkeypatch.setattr(GenerateRequest, "each", None)
    assert ask(client, {"prompt": [65] * (CONTEXT + 1), "n": 128}).status_code == 422
    limited = client_of(pipeline, LAMINA_CLIENT_CONCURRENT="1")
    assert ask(limited, {"prompt": [65], "n": 2}).status_code == 422


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("max_tokens", [0, 8])
def test_a_prompt_of_one_token_is_echoed_with_its_logprobs(
    client: FlaskClient, pipeline: Pipeline, streams: bool, max_tokens: int
) -> None:
    def script(stream: TokenStream) -> None:
        if max_tokens:
            stream.put(66, TokenLogprob(66, -1.0))
        stream.finish("length")

    pipeline.script = script
    asked = {"model": "tiny", "prompt": [65], "echo": True, "logprobs": 0, "max_tokens": max_tokens, "stream": streams}
    response = client.post("/v1/completions", json=asked)
    chunks = stream(response)[:-1] if streams else [response.json]
    logprobs = [chunk["choices"][0]["logprobs"] for chunk in chunks if chunk["choices"][0]["logprobs"]]
    assert [one for each in logprobs for one in each["token_logprobs"]] == [None, -1.0][: 1 + bool(max_tokens)]


def test_an_echo_has_no_logprobs_unless_they_are_requested(client: FlaskClient, pipeline: Pipeline) -> None:
    def script(stream: TokenStream) -> None:
        stream.scored(1, [TokenLogprob(66, -1.0)])
        stream.finish("length")

    pipeline.script = script
    response = client.post("/v1/completions", json={"model": "tiny", "prompt": [65, 66], "echo": True, "max_tokens": 0})
    assert response.get_json()["choices"][0]["logprobs"] is None
