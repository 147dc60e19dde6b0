"""CloudEvents in batched mode."""

import json
from typing import Any

import pytest
from flask.testing import FlaskClient
from werkzeug.test import TestResponse

from tests.support.functions.scripted_gateway import CONTEXT, Pipeline

BATCHED = "application/cloudevents-batch+json"


def event(id_: str, **fields: Any) -> dict[str, Any]:
    type_ = fields.pop("type", "dev.lamina.generate.request")
    return {"specversion": "1.0", "id": id_, "source": "/client", "type": type_, "data": {"prompt": "Hi"} | fields}


def send(client: FlaskClient, body: object, **headers: str) -> TestResponse:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    return client.post("/", data=raw, content_type=f"{BATCHED}; charset=UTF-8", headers=headers)


def test_a_batch_is_answered_in_its_order(client: FlaskClient, pipeline: Pipeline) -> None:
    """What fails of it fails alone; the same event in it twice is computed once."""
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
def test_a_batch_that_is_none_is_refused_as_a_whole(client: FlaskClient, pipeline: Pipeline, body: object, words: str) -> None:
    reply = send(client, body)
    assert reply.status_code == 400
    assert reply.json is not None
    assert words in reply.json["detail"]
    assert not pipeline.prompts


def test_a_batch_does_not_stream(client: FlaskClient) -> None:
    assert send(client, [event("1")], Accept="text/event-stream").status_code == 415


def test_a_client_that_leaves_ends_all_of_its_batch(client: FlaskClient, pipeline: Pipeline) -> None:
    pipeline.script = lambda _: None
    body = json.dumps([event("1"), event("2")])
    gone = {"lamina.client_gone": lambda: True}
    assert client.post("/", data=body, content_type=BATCHED, environ_overrides=gone).status_code == 499
    assert pipeline.value("answers_total", outcome="cancelled") == 2


def test_what_was_begun_of_a_batch_is_given_up_when_the_rest_breaks(client: FlaskClient, pipeline: Pipeline) -> None:
    def script(_: object) -> None:
        if len(pipeline.prompts) == 2:
            raise RuntimeError

    pipeline.script = script
    assert send(client, [event("1"), event("2")]).status_code == 500
    assert pipeline.value("answers_total", outcome="cancelled") == 1
