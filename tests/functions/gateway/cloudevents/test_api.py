"""The CloudEvents API: binary, structured and batched mode, streams, and refusals."""

import json
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from flask.testing import FlaskClient
from werkzeug.test import TestResponse

from eventing.wire.generation import choice_seed
from functions.gateway.answers.service import MAX_LOGPROBS
from tests.support.functions.gateway import wait_until
from tests.support.functions.scripted_gateway import CONTEXT, END, EVENT, TOKENIZER, Pipeline, ask, client_of, stream


def test_a_binary_request_has_a_binary_reply(client: FlaskClient) -> None:
    response = ask(client, {"prompt": "Hi"}, ce_traceparent="00-1-2-01")
    assert response.status_code == 200
    assert response.headers["ce-type"] == "dev.lamina.generate.response"
    assert response.headers["ce-source"] == "/pipelines/0123456789abcdef0123456789abcdef/gateway"
    assert response.headers["ce-traceparent"] == "00-1-2-01"
    answer = response.get_json()
    assert (answer["text"], answer["finish_reason"]) == ("Hello there", "stop")
    assert answer["usage"] == {"prompt_tokens": 3, "completion_tokens": 9, "total_tokens": 12} | {
        "completion_tokens_details": {"accepted_prediction_tokens": 0, "rejected_prediction_tokens": 0},
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    assert TOKENIZER.decode(answer["token_ids"]) == "Hello there"
    assert answer["timings"]["total_seconds"] >= answer["timings"]["time_to_first_token_seconds"] > 0


def test_a_structured_request_has_a_structured_reply(client: FlaskClient) -> None:
    event = {name.removeprefix("ce-"): value for name, value in EVENT.items() if name.startswith("ce-")}
    body = json.dumps(event | {"data": {"prompt": "Hi"}})
    response = client.post("/", data=body, content_type="application/cloudevents+json")
    assert response.content_type == "application/cloudevents+json"
    assert json.loads(response.data)["type"] == "dev.lamina.generate.response"
    assert json.loads(response.data)["data"]["text"] == "Hello there"


def test_the_same_event_has_the_same_reply_id_and_seed_at_every_gateway(pipeline: Pipeline) -> None:
    gateways = [client_of(pipeline) for _ in range(2)]
    first, again, other = (
        ask(gateway, {"prompt": "Hi"}, ce_id=id_) for gateway, id_ in zip([*gateways, gateways[0]], "112", strict=True)
    )
    assert first.headers["ce-id"] == again.headers["ce-id"] != other.headers["ce-id"]
    seeds = [prompt.sampling.seed for prompt in pipeline.prompts]
    assert seeds[0] == seeds[1] != seeds[2]


def test_a_reply_names_the_event_that_caused_it(client: FlaskClient) -> None:
    reply = ask(client, {"prompt": "Hi"}, ce_id="the cause", ce_source="/somebody")
    assert (reply.headers["ce-causationid"], reply.headers["ce-causationsource"]) == ("the%20cause", "/somebody")
    for event in stream(ask(client, {"prompt": "Hi"}, ce_id="another", Accept="text/event-stream")):
        assert (event["causationid"], event["causationsource"]) == ("another", "/client")


def test_several_answers_come_in_one_response(client: FlaskClient, pipeline: Pipeline) -> None:
    asked = {"prompt": ["Hi", "Ho"], "n": 2, "logprobs": 1, "top_k": -1, "seed": -1, "stop_token_ids": [9]}
    answer: Any = ask(client, asked).json
    assert [choice["text"] for choice in answer["choices"]] == ["Hello there"] * 4
    assert answer["text"] == "Hello there"
    assert [prompt.sampling.seed for prompt in pipeline.prompts] == [choice_seed(2**63 - 1, index) for index in range(4)]
    assert answer["usage"]["prompt_tokens"] == 2 * 3
    events = stream(ask(client, asked, Accept="text/event-stream"))
    texts = dict.fromkeys(range(4), "")
    for event in events[:-1]:
        texts[event["data"].get("choice", 0)] += event["data"]["text"]
    assert texts == dict.fromkeys(range(4), "Hello there")
    assert len({event["id"] for event in events}) == len(events)


def test_options_reach_the_pipeline(client: FlaskClient, pipeline: Pipeline) -> None:
    options = {"temperature": 0.5, "top_k": 4, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.1, "seed": 7}
    ask(client, {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 5, **options})
    (prompt,) = pipeline.prompts
    assert {name: getattr(prompt.sampling, name) for name in options} == options
    assert prompt.max_tokens == 5
    assert prompt.eos_ids == {END}
    assert TOKENIZER.decode(prompt.token_ids, skip_special_tokens=False) == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_stream_has_an_event_for_each_token_and_one_for_the_response(client: FlaskClient) -> None:
    response = ask(client, {"prompt": "Hi"}, Accept="text/event-stream")
    assert response.content_type.startswith("text/event-stream")
    *tokens, last = stream(response)
    assert {event["type"] for event in tokens} == {"dev.lamina.generate.token"}
    assert "".join(event["data"]["text"] for event in tokens) == "Hello there" == last["data"]["text"]
    assert [event["data"]["token_id"] for event in tokens] == last["data"]["token_ids"]
    assert [event["data"]["index"] for event in tokens] == list(range(len(tokens)))
    assert last["type"] == "dev.lamina.generate.response"
    assert len({event["id"] for event in [*tokens, last]}) == len(tokens) + 1


def test_an_answers_deadline_is_the_events_expiry_time(client: FlaskClient, pipeline: Pipeline) -> None:
    soon = (datetime.now(UTC) + timedelta(seconds=30)).isoformat()
    ask(client, {"prompt": "Hi"}, ce_expirytime=soon)
    assert pipeline.prompts[0].deadline_seconds == pytest.approx(30, abs=10)  # seconds that a busy machine may take
    past = (datetime.now(UTC) - timedelta(seconds=30)).isoformat()
    assert ask(client, {"prompt": "Hi"}, ce_expirytime=past).status_code == 410


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({}, "prompt"),
        ({"prompt": "a", "messages": [{"role": "user", "content": "b"}]}, "both"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": "a", "max_tokens": -1}, "max_tokens"),
        ({"prompt": "a", "temperature": -1}, "temperature"),
        ({"prompt": "a", "top_p": 0}, "top_p"),
        ({"prompt": "a", "stop": [""]}, "stop"),
        ({"prompt": "a", "tempreature": 1}, "tempreature"),
        ({"messages": [{"role": "robot", "content": "b"}]}, "role"),
    ],
)
def test_a_malformed_request_is_refused_with_the_fields_name(client: FlaskClient, data: Any, words: str) -> None:
    response = ask(client, data)
    assert response.status_code == 400
    assert words in response.get_json()["detail"]


BATCHED = "application/cloudevents-batch+json"


def event(id_: str, **fields: Any) -> dict[str, Any]:
    type_ = fields.pop("type", "dev.lamina.generate.request")
    return {"specversion": "1.0", "id": id_, "source": "/client", "type": type_, "data": {"prompt": "Hi"} | fields}


def send(client: FlaskClient, body: object, **headers: str) -> TestResponse:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    return client.post("/", data=raw, content_type=f"{BATCHED}; charset=UTF-8", headers=headers)


def test_a_batch_is_answered_in_order(client: FlaskClient, pipeline: Pipeline) -> None:
    """One event's failure leaves the others alone. An event that is in it twice is computed once."""
    reply = send(client, [event("1"), event("2", prompt="x" * CONTEXT), event("1"), event("3", max_tokens="many"), event("4")])
    assert (reply.status_code, reply.content_type) == (200, BATCHED)
    answers = json.loads(reply.data)
    assert [answer["causationid"] for answer in answers] == ["1", "2", "1", "3", "4"]
    kinds = [answer["type"].rpartition(".")[2] for answer in answers]
    assert kinds == ["response", "error", "response", "error", "response"]
    assert answers[0]["data"]["text"] == "Hello there"
    assert answers[0]["id"] == answers[2]["id"]
    assert answers[1]["data"]["type"] == "urn:lamina:problem:context-length-exceeded"
    assert "max_tokens" in answers[3]["data"]["detail"]
    assert len(pipeline.prompts) == 2


def test_the_events_of_a_batch_share_the_bound_of_log_probabilities(pipeline: Pipeline) -> None:
    client = client_of(pipeline, context=200_000)
    share = MAX_LOGPROBS // 4
    lengths = (share, share + 1, None, 8)
    reply = send(client, [event(f"{length}", logprobs=0, max_tokens=length) for length in lengths])
    kinds = [answer["type"].rpartition(".")[2] for answer in json.loads(reply.data)]
    assert kinds == ["response", "error", "response", "response"]
    assert [prompt.max_tokens for prompt in pipeline.prompts] == [share, share, 8]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"{", "the batch is no JSON array"),
        (b"{}", "the batch is no JSON array"),
        (b"[" * 100_000, "the batch is no JSON array"),
        ([], "the batch has 0 events"),
        ([event(str(number)) for number in range(129)], "the batch has 129 events"),
        ([event("1"), 5], "event 1 of the batch: the event is a JSON int"),
        ([event("1"), {"specversion": "1.0"}], "event 1 of the batch: the attribute id is missing"),
        ([event("1", type="dev.lamina.forward")], "event 0 of the batch is 'dev.lamina.forward'"),
    ],
)
def test_a_malformed_batch_is_refused_as_a_whole(client: FlaskClient, pipeline: Pipeline, body: object, words: str) -> None:
    reply = send(client, body)
    assert reply.status_code == 400
    assert words in reply.get_json()["detail"]
    assert not pipeline.prompts


def test_a_batch_cannot_stream(client: FlaskClient) -> None:
    assert send(client, [event("1")], Accept="text/event-stream").status_code == 415


@pytest.mark.slow
@pytest.mark.usefixtures("abandoned_at_once")
def test_all_answers_of_a_batch_are_cancelled_if_its_client_leaves(client: FlaskClient, pipeline: Pipeline) -> None:
    pipeline.script = lambda _: None
    body = json.dumps([event("1"), event("2")])
    gone = {"lamina.client_gone": lambda: True}
    assert client.post("/", data=body, content_type=BATCHED, environ_overrides=gone).status_code == 499
    wait_until(lambda: pipeline.value("answers_total", outcome="cancelled") == 2)


@pytest.mark.usefixtures("abandoned_at_once")
def test_answers_of_a_batch_are_cancelled_if_another_one_fails_unexpectedly(client: FlaskClient, pipeline: Pipeline) -> None:
    def script(_: object) -> None:
        if len(pipeline.prompts) == 2:
            raise RuntimeError

    pipeline.script = script
    assert send(client, [event("1"), event("2")]).status_code == 500
    wait_until(lambda: pipeline.value("answers_total", outcome="cancelled") == 1)
