"""What one client may ask, at both doors; whoever is refused costs nothing, and nobody else is touched."""

import time
from collections import Counter
from typing import Any

import pytest
from flask.testing import FlaskClient
from werkzeug.test import TestResponse

from functions.configuration.api_keys import Quota
from functions.gateway.answers.client_limits import ClientLimits
from functions.gateway.text.tokenizer import ModelText
from tests.support.functions.scripted_gateway import EVENT, Pipeline, client_of

KEYS = {"LAMINA_API_KEYS": "alice,bob"}
CHAT: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}]}


def chat(client: FlaskClient, key: str = "alice", **more: Any) -> TestResponse:
    headers = {"Authorization": f"Bearer {key}"}
    return client.post("/v1/chat/completions", json=CHAT | more, headers=headers, buffered=not more.get("stream"))


def later(seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.time() + seconds
    monkeypatch.setattr(time, "time", lambda: now)


def test_requests_a_minute(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    client = client_of(pipeline, **KEYS, LAMINA_CLIENT_REQUESTS_PER_MINUTE="3")
    assert [chat(client).status_code for _ in range(3)] == [200] * 3
    refused = chat(client)
    assert refused.status_code == 429
    assert 1 <= int(refused.headers["Retry-After"]) <= 60
    error = refused.get_json()["error"]
    assert (error["type"], error["code"]) == ("rate_limit_error", "rate_limited")
    assert error["message"].startswith("3 requests a minute are what this client may have; ask again in ")
    event = client.post("/", json={"prompt": "Hi"}, headers=EVENT | {"Authorization": "Bearer alice"})
    assert (event.status_code, event.get_json()["type"]) == (429, "urn:lamina:problem:rate-limited")
    assert pipeline.entered == 3, "who is refused is not tokenized"
    assert chat(client, "bob").status_code == 200
    assert pipeline.value("answers_total", outcome="rate-limited") == 2
    later(121, monkeypatch)
    assert chat(client).status_code == 200


def test_tokens_a_minute_of_prompts_and_answers(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    client = client_of(pipeline, **KEYS, LAMINA_CLIENT_TOKENS_PER_MINUTE="50")
    used = chat(client).get_json()["usage"]["total_tokens"]
    assert 25 < used < 50
    assert chat(client).status_code == 200, "begun while some are left"
    refused = chat(client)
    assert (refused.status_code, pipeline.entered) == (429, 2)
    assert "50 tokens a minute are what this client may have" in refused.get_json()["error"]["message"]
    assert chat(client, "bob").status_code == 200
    later(121, monkeypatch)
    assert chat(client).status_code == 200


def test_who_may_never_have_so_many_answers_at_once_is_not_told_to_wait(pipeline: Pipeline) -> None:
    client = client_of(pipeline, **KEYS, LAMINA_CLIENT_CONCURRENT="2")
    refused = chat(client, n=3)
    assert (refused.status_code, pipeline.entered) == (400, 0)
    assert "3 answers of one request are more than the 2" in refused.get_json()["error"]["message"]
    assert chat(client, n=2).status_code == 200


def test_answers_at_once(pipeline: Pipeline) -> None:
    client = client_of(pipeline, **KEYS, LAMINA_CLIENT_CONCURRENT="2")
    pipeline.script = pipeline.say("Hello", end=False)
    open_ = [chat(client, stream=True) for _ in range(2)]
    for stream in open_:
        next(stream.iter_encoded())
    assert chat(client).status_code == 429
    open_[0].close()
    pipeline.script = pipeline.say("Hello")
    assert chat(client).status_code == 200
    assert chat(client).status_code == 200, "its place was given back"
    open_[1].close()


def test_who_fails_before_the_answer_begins_gives_its_place_back(pipeline: Pipeline) -> None:
    client = client_of(pipeline, **KEYS, LAMINA_CLIENT_CONCURRENT="1")
    for _ in range(3):
        assert chat(client, messages=[{"role": "user", "content": "x" * 1000}]).status_code == 400
    assert chat(client).status_code == 200


def test_ten_thousand_requests_beyond_a_limit_are_not_tokenized(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole way from a request to its answer, tokenizations counted where all of them are."""
    read: list[object] = []
    real = ModelText.encode

    def encode(self: ModelText, *given: Any, **named: Any) -> Any:
        read.append(given)
        return real(self, *given, **named)

    monkeypatch.setattr(ModelText, "encode", encode)
    client = client_of(pipeline, **KEYS, LAMINA_CLIENT_REQUESTS_PER_MINUTE="10", LAMINA_CLIENT_TOKENS_PER_MINUTE="100000")
    headers = {"Authorization": "Bearer alice"}
    statuses = Counter(
        client.post("/v1/completions", json={"model": "tiny", "prompt": "Hi"}, headers=headers).status_code
        for _ in range(10_000)
    )
    admitted = statuses[200]
    assert statuses == {200: admitted, 429: 10_000 - admitted}
    assert 10 <= admitted <= 20, "a minute may end meanwhile"
    assert len(read) == pipeline.entered == len(pipeline.prompts) == admitted
    assert chat(client, "bob").status_code == 200


def test_without_limits_nothing_is_counted() -> None:
    limits = ClientLimits(Quota())
    for _ in range(100):
        limits.admit("client")(1000)
    assert limits._windows is None
