"""Sliding minutes that several gateways count together in a real Redis, and each by itself while that is not there."""

import time

import pytest

from eventing.problems import RateLimited
from functions.configuration.api_keys import Quota
from functions.gateway.answers import client_limits
from functions.gateway.answers.client_limits import ClientLimits
from tests.support.redis_server import redis_server


def admitted(gateways: list[ClientLimits], asked: int, client: str = "alice") -> int:
    """How many of so many requests, each to the next gateway."""
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


def test_requests_are_counted_together_where_there_is_a_store_and_apart_where_there_is_none() -> None:
    with redis_server() as port:
        url = f"redis://127.0.0.1:{port}/0"
        assert admitted(gateways(url, Quota(requests_per_minute=10)), 60) == 10
        assert admitted(gateways(url, Quota(requests_per_minute=10)), 60, "bob") == 10
        assert admitted(gateways(url, Quota(requests_per_minute=10), "another model"), 60) == 10
    assert admitted(gateways(None, Quota(requests_per_minute=10)), 60) == 30


def test_tokens_are_counted_together() -> None:
    with redis_server() as port:
        one, two, _ = gateways(f"redis://127.0.0.1:{port}/0", Quota(tokens_per_minute=100))
        one.admit("alice")(60)
        two.admit("alice")(70)
        with pytest.raises(RateLimited, match="100 tokens a minute"):
            one.admit("alice")
        one.admit("bob")(5)


def test_a_store_that_goes_away_costs_nobody_an_answer(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(client_limits, "_STORE_RETRY_SECONDS", 0.3)
    with redis_server() as port:
        url = f"redis://127.0.0.1:{port}/0"
        (gateway, *_) = gateways(url, Quota(requests_per_minute=10))
        assert admitted([gateway], 5) == 5
        assert not caplog.text
    began = time.monotonic()
    assert admitted([gateway], 30) == 10, "its own count"
    assert time.monotonic() - began < 5
    assert caplog.text.count("counted by this gateway alone") >= 1
    (stranger, *_) = gateways(url.replace("//", "//:s3cret@"), Quota(requests_per_minute=10))
    assert admitted([stranger], 30) == 10
    assert "s3cret" not in caplog.text
    with redis_server(port):
        time.sleep(0.3)
        assert admitted([gateway], 30) == 10, "the store's again, which is new"
