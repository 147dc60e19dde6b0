"""The door for CloudEvents."""

import json
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from flask.testing import FlaskClient

from tests.support.functions.scripted_gateway import END, EVENT, TOKENIZER, Pipeline, ask, client_of, stream


def test_binary_in_binary_out(client: FlaskClient) -> None:
    response = ask(client, {"prompt": "Hi"}, ce_traceparent="00-1-2-01")
    assert response.status_code == 200
    assert response.headers["ce-type"] == "dev.lamina.generate.response"
    assert response.headers["ce-source"] == "/pipelines/0123456789abcdef0123456789abcdef/gateway"
    assert response.headers["ce-traceparent"] == "00-1-2-01"
    answer = response.json
    assert answer is not None
    assert (answer["text"], answer["finish_reason"]) == ("Hello there", "stop")
    assert answer["usage"] == {"prompt_tokens": 3, "completion_tokens": 9, "total_tokens": 12} | {
        "completion_tokens_details": {"accepted_prediction_tokens": 0, "rejected_prediction_tokens": 0},
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    assert TOKENIZER.decode(answer["token_ids"]) == "Hello there"
    assert answer["timings"]["total_seconds"] >= answer["timings"]["time_to_first_token_seconds"] > 0


def test_structured_in_structured_out(client: FlaskClient) -> None:
    event = {name.removeprefix("ce-"): value for name, value in EVENT.items() if name.startswith("ce-")}
    body = json.dumps(event | {"data": {"prompt": "Hi"}})
    response = client.post("/", data=body, content_type="application/cloudevents+json")
    assert response.content_type == "application/cloudevents+json"
    assert json.loads(response.data)["type"] == "dev.lamina.generate.response"
    assert json.loads(response.data)["data"]["text"] == "Hello there"


def test_the_same_request_has_the_same_reply_id_and_seed(pipeline: Pipeline) -> None:
    """At any gateway."""
    gateways = [client_of(pipeline) for _ in range(2)]
    first, again, other = (
        ask(gateway, {"prompt": "Hi"}, ce_id=id_) for gateway, id_ in zip([*gateways, gateways[0]], "112", strict=True)
    )
    assert first.headers["ce-id"] == again.headers["ce-id"] != other.headers["ce-id"]
    seeds = [prompt.sampling.seed for prompt in pipeline.prompts]
    assert seeds[0] == seeds[1] != seeds[2]


def test_a_reply_says_which_event_caused_it(client: FlaskClient) -> None:
    reply = ask(client, {"prompt": "Hi"}, ce_id="the cause", ce_source="/somebody")
    assert (reply.headers["ce-causationid"], reply.headers["ce-causationsource"]) == ("the%20cause", "/somebody")
    for event in stream(ask(client, {"prompt": "Hi"}, ce_id="another", Accept="text/event-stream")):
        assert (event["causationid"], event["causationsource"]) == ("another", "/client")


def test_several_answers_come_in_one_response(client: FlaskClient, pipeline: Pipeline) -> None:
    asked = {"prompt": ["Hi", "Ho"], "n": 2, "logprobs": 1, "top_k": -1, "seed": -1, "stop_token_ids": [9]}
    answer: Any = ask(client, asked).json
    assert [choice["text"] for choice in answer["choices"]] == ["Hello there"] * 4
    assert answer["text"] == "Hello there"
    assert [prompt.sampling.seed for prompt in pipeline.prompts] == [2**63 - 1, 0, 1, 2]
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


def test_an_answer_lasts_no_longer_than_its_event(client: FlaskClient, pipeline: Pipeline) -> None:
    soon = (datetime.now(UTC) + timedelta(seconds=30)).isoformat()
    ask(client, {"prompt": "Hi"}, ce_expirytime=soon)
    assert 20 < pipeline.prompts[0].deadline_seconds <= 30
    past = (datetime.now(UTC) - timedelta(seconds=30)).isoformat()
    assert ask(client, {"prompt": "Hi"}, ce_expirytime=past).status_code == 410


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({}, "prompt"),
        ({"prompt": "a", "messages": [{"role": "user", "content": "b"}]}, "both"),
        ({"prompt": ""}, "$.prompt"),
        ({"prompt": "a", "max_tokens": -1}, "$.max_tokens"),
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
