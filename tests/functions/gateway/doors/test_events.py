"""The door for CloudEvents."""

import json
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from flask.testing import FlaskClient

from tests.support.functions.doors import END, EVENT, TOKENIZER, Pipeline, ask, stream


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


def test_the_same_request_has_the_same_reply_id_and_seed(client: FlaskClient, pipeline: Pipeline) -> None:
    first, again, other = (ask(client, {"prompt": "Hi"}, ce_id=id_) for id_ in ("1", "1", "2"))
    assert first.headers["ce-id"] == again.headers["ce-id"] != other.headers["ce-id"]
    seeds = [prompt.sampling.seed for prompt in pipeline.prompts]
    assert seeds[0] == seeds[1] != seeds[2]


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
