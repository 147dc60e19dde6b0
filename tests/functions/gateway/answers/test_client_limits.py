"""Limits of a client in both APIs, alone and counted by several gateways in one Redis."""

import math
import time
from collections import Counter
from typing import Any

import pytest
from flask.testing import FlaskClient
from werkzeug.test import TestResponse

from eventing.problems import QueueFull, RateLimited
from functions.configuration.api_keys import Quota
from functions.gateway.answers import budgets
from functions.gateway.answers.client_limits import ClientLimits, SlidingWindows
from functions.gateway.text.encoder import Encoder
from tests.support.functions.scripted_gateway import EVENT, Pipeline, client_of, refuse
from tests.support.redis_server import redis_server

KEYS = {"LAMINA_API_KEYS": "alice,bob"}
CHAT: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}]}


def chat(client: FlaskClient, key: str = "alice", **more: Any) -> TestResponse:
    headers = {"Authorization": f"Bearer {key}"}
    return client.post("/v1/chat/completions", json=CHAT | more, headers=headers, buffered=not more.get("stream"))


def later(seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.time() + seconds
    monkeypatch.setattr(time, "time", lambda: now)


def test_requests_per_minute_are_limited(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
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
    assert pipeline.entered == 3, "a refused request is not tokenized"
    assert chat(client, "bob").status_code == 200
    assert pipeline.value("answers_total", outcome="rate-limited") == 2
    later(121, monkeypatch)
    assert chat(client).status_code == 200


def test_in_the_background_only_budgets_count() -> None:
    limits = ClientLimits(Quota(requests_per_minute=1, tokens_per_minute=1, concurrent=1, tokens_per_day=30))
    begun = [limits.admit("alice", 2, in_background=True) for _ in range(3)]
    for release in begun:
        release(9)
    limits.admit("alice")(9)
    with pytest.raises(RateLimited, match="30 tokens a day"):
        limits.admit("alice", in_background=True)
    limits.admit("bob", in_background=True)


def test_tokens_per_minute_of_prompts_and_answers_are_limited(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_a_request_for_more_answers_than_a_client_may_ever_have_is_invalid(pipeline: Pipeline) -> None:
    client = client_of(pipeline, **KEYS, LAMINA_CLIENT_CONCURRENT="2")
    refused = chat(client, n=3)
    assert (refused.status_code, pipeline.entered) == (400, 0)
    assert "3 answers of one request are more than the 2" in refused.get_json()["error"]["message"]
    assert chat(client, n=2).status_code == 200


def test_concurrent_answers_are_limited(pipeline: Pipeline) -> None:
    client = client_of(pipeline, **KEYS, LAMINA_CLIENT_CONCURRENT="2")
    pipeline.script = pipeline.say("Hello", end=False)
    open_ = [chat(client, stream=True) for _ in range(2)]
    for stream in open_:
        next(stream.iter_encoded())
    assert chat(client).status_code == 429
    open_[0].close()
    pipeline.script = pipeline.say("Hello")
    assert chat(client).status_code == 200
    assert chat(client).status_code == 200, "a finished answer no longer counts"
    open_[1].close()


def test_a_request_that_fails_before_its_answer_begins_no_longer_counts(pipeline: Pipeline) -> None:
    client = client_of(pipeline, **KEYS, LAMINA_CLIENT_CONCURRENT="1")
    for _ in range(3):
        assert chat(client, messages=[{"role": "user", "content": "x" * 1000}]).status_code == 400
    assert chat(client).status_code == 200


def test_a_request_that_is_refused_after_some_of_its_answers_began_uses_no_tokens(pipeline: Pipeline) -> None:
    client = client_of(pipeline, **KEYS, LAMINA_CLIENT_TOKENS_PER_MINUTE="50")
    full = refuse(QueueFull("256 wait"))
    pipeline.script = lambda stream: full(stream) if len(pipeline.prompts) % 3 == 0 else None
    assert [chat(client, n=3).get_json()["error"]["message"] for _ in range(3)] == ["256 wait"] * 3
    pipeline.script = pipeline.say("Hello")
    assert chat(client).status_code == 200


@pytest.mark.slow
def test_ten_thousand_requests_beyond_a_limit_are_not_tokenized(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[object] = []
    real = Encoder.encode

    def encode(self: Encoder, *given: Any, **named: Any) -> Any:
        read.append(given)
        return real(self, *given, **named)

    monkeypatch.setattr(Encoder, "encode", encode)
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


TEXTS: list[tuple[str, dict[str, str], dict[str, Any]]] = [
    ("/tokenize", {}, {"prompt": "Hi"}),
    ("/tokenize", {}, {"messages": [{"role": "user", "content": "Hi"}]}),
    ("/detokenize", {}, {"tokens": [70, 71]}),
    ("/", EVENT | {"ce-type": "dev.lamina.score.request", "Prefer": "reply"}, {"text": "Hi"}),
]


@pytest.mark.parametrize(("path", "headers", "body"), TEXTS)
def test_requests_that_only_encode_or_decode_a_text_are_limited_too(
    pipeline: Pipeline, path: str, headers: dict[str, str], body: dict[str, Any]
) -> None:
    limits = {"LAMINA_CLIENT_REQUESTS_PER_MINUTE": "3", "LAMINA_CLIENT_CONCURRENT": "1", "LAMINA_SCORES": "on"}
    client = client_of(pipeline, **limits)
    pipeline.full = QueueFull("256 wait")
    assert client.post(path, json=body, headers=headers).get_json()["detail"] == "256 wait"
    pipeline.full = None
    wrong = body | ({"tokens": [2**30]} if "tokens" in body else {"prompt": "x" * 9999} if "prompt" in body else {})
    assert client.post(path, json=wrong, headers=headers).status_code in (200, 422)
    assert client.post(path, json=body, headers=headers).status_code == 200
    refused = client.post(path, json=body, headers=headers)
    assert (refused.status_code, refused.get_json()["type"]) == (429, "urn:lamina:problem:rate-limited")
    assert refused.headers["Retry-After"]
    assert pipeline.entered == 3


def test_the_tokens_of_scored_texts_count(pipeline: Pipeline) -> None:
    client = client_of(pipeline, LAMINA_SCORES="on", LAMINA_CLIENT_TOKENS_PER_MINUTE="20")
    path, headers, body = TEXTS[-1]
    statuses = [client.post(path, json=body | {"text": "x" * 15}, headers=headers).status_code for _ in range(3)]
    assert statuses == [200, 200, 429]


def test_nothing_is_counted_without_limits() -> None:
    limits = ClientLimits(Quota())
    for _ in range(100):
        limits.admit("client")(1000)
    assert limits._windows is None


def admitted(gateways: list[ClientLimits], asked: int, client: str = "alice") -> int:
    """Sends requests to each gateway in turn. Returns how many were admitted."""
    waits = []
    for number in range(asked):
        try:
            gateways[number % len(gateways)].admit(client)(0)
        except RateLimited as refused:
            waits.append(refused.retry_after_seconds or 0)
    assert all(1 <= seconds <= 60 for seconds in waits)
    return asked - len(waits)


def gateways(url: str | None, quota: Quota, scope: str = "tiny") -> list[ClientLimits]:
    return [ClientLimits(quota, store=url, scope=scope) for _ in range(3)]


def test_gateways_count_requests_together_in_a_store_and_alone_without_one() -> None:
    with redis_server() as port:
        url = f"redis://127.0.0.1:{port}/0"
        assert admitted(gateways(url, Quota(requests_per_minute=10)), 60) == 10
        assert admitted(gateways(url, Quota(requests_per_minute=10)), 60, "bob") == 10
        assert admitted(gateways(url, Quota(requests_per_minute=10), "another model"), 60) == 10
    assert admitted(gateways(None, Quota(requests_per_minute=10)), 60) == 30


def test_gateways_count_tokens_together_in_a_store() -> None:
    with redis_server() as port:
        one, two, _ = gateways(f"redis://127.0.0.1:{port}/0", Quota(tokens_per_minute=100))
        one.admit("alice")(60)
        two.admit("alice")(70)
        with pytest.raises(RateLimited, match="100 tokens a minute"):
            one.admit("alice")
        one.admit("bob")(5)


def test_a_cost_is_counted_although_another_gateway_counts_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    with redis_server() as port:
        one, other = (SlidingWindows(f"redis://127.0.0.1:{port}/0") for _ in range(2))
        limiter = one._shared
        assert limiter is not None
        real = limiter.get_window_stats
        asked: list[Any] = []

        def and_then_the_other_counts(*counter: Any) -> Any:
            asked.append(real(*counter))
            if len(asked) < 3:
                other.charge(100, 20, "alice")
            return asked[-1]

        monkeypatch.setattr(limiter, "get_window_stats", and_then_the_other_counts)
        one.charge(100, 90, "alice")
        assert [each.remaining for each in asked] == [100, 80, 60]
        assert not other.allows(100, "alice", counts=False), "60 of the 90 were left"
        one.charge(100, 90, "alice")


@pytest.mark.parametrize("moments", [[0], [0, 45], [0, 59.5], [0, 61], [30, 80, 100], [0, 30, 59, 61, 90, 119, 121]])
def test_seconds_left_are_those_after_which_a_client_may_try_again(
    moments: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """moments: seconds at which all is used that is left."""
    now = began = math.ceil(time.time()) + 0.5
    monkeypatch.setattr(time, "time", lambda: now)
    windows = SlidingWindows()
    for moment in moments:
        now = began + moment
        windows.charge(100, 100, "alice")
    seconds = windows.seconds_left(100, "alice")
    now += seconds - 1.1
    assert seconds == 1 or not windows.allows(100, "alice", counts=False), "a second less is too short"
    now += 1.2
    assert windows.allows(100, "alice", counts=False)


def test_a_client_that_has_used_up_its_minute_in_a_store_waits_for_a_minute() -> None:
    """Right after the first count Redis says that exactly two minutes are left of the counter."""
    with redis_server() as port:
        windows = SlidingWindows(f"redis://127.0.0.1:{port}/0")
        for client in map(str, range(20)):
            windows.charge(100, 100, client)
            assert windows.seconds_left(100, client) > 30


@pytest.mark.slow
def test_a_gateway_counts_alone_while_its_store_is_down(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(budgets, "STORE_RETRY_SECONDS", 0.3)
    with redis_server() as port:
        url = f"redis://127.0.0.1:{port}/0"
        (gateway, *_) = gateways(url, Quota(requests_per_minute=10))
        assert admitted([gateway], 5) == 5
        assert not caplog.text
    began = time.monotonic()
    assert admitted([gateway], 30) == 10, "its own count"
    assert time.monotonic() - began < 20
    assert caplog.text.count("counted by this gateway alone") >= 1
    (stranger, *_) = gateways(url.replace("//", "//:s3cret@"), Quota(requests_per_minute=10))
    assert admitted([stranger], 30) == 10
    assert "s3cret" not in caplog.text
    with redis_server(port):
        time.sleep(0.3)
        assert admitted([gateway], 30) == 10, "the store's again, which is new"
