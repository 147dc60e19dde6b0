"""Budgets of clients: tokens per calendar day and month, counted in one Redis by all gateways."""

import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from flask.testing import FlaskClient
from werkzeug.test import TestResponse

from eventing.problems import RateLimited
from functions.configuration.api_keys import Quota, sha256_of
from functions.configuration.settings import ConfigError
from functions.gateway.answers import budgets
from functions.gateway.answers.authentication import KeyRing
from functions.gateway.answers.budgets import Budgets, seconds_left
from functions.gateway.answers.client_limits import ClientLimits
from knative.__main__ import main
from tests.support.functions.scripted_gateway import Pipeline, client_of
from tests.support.redis_server import redis_server

NOON = datetime(2026, 1, 30, 12, tzinfo=UTC)
DAY = 86_400


@pytest.fixture
def store() -> Iterator[str]:
    with redis_server() as port:
        yield f"redis://127.0.0.1:{port}/0"


def at(monkeypatch: pytest.MonkeyPatch, now: datetime, days: float = 0) -> None:
    seconds = now.timestamp() + days * DAY
    monkeypatch.setattr(time, "time", lambda: seconds)


def spends(limits: ClientLimits, tokens: int, client: str = "alice") -> bool:
    """Whether the client may ask. If so, it uses the tokens."""
    try:
        limits.admit(client)(tokens)
    except RateLimited:
        return False
    return True


def asked(client: FlaskClient, key: str) -> TestResponse:
    body = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}]}
    return client.post("/v1/chat/completions", json=body, headers={"Authorization": f"Bearer {key}"})


def test_gateways_count_days_and_months_together(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    at(monkeypatch, NOON)
    quota = Quota(tokens_per_day=100, tokens_per_month=250)
    one, other = (ClientLimits(quota, store=store, scope=model) for model in ("tiny", "another model"))
    assert [spends(one, 60), spends(other, 60), spends(one, 1), spends(other, 1)] == [True, True, False, False]
    assert spends(one, 60, "bob")
    at(monkeypatch, NOON, 1)
    assert [spends(other, 130), spends(one, 1)] == [True, False]
    with pytest.raises(RateLimited, match=r"100 tokens a day .* and 130 are used; ask again in 43200 s, when the next day"):
        one.admit("alice")
    at(monkeypatch, NOON, 2)
    assert [spends(one, 100), spends(one, 1)] == [True, False], "a new month"


def test_a_month_that_is_used_up_lasts_to_its_end(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = ClientLimits(Quota(tokens_per_month=10), store=store)
    at(monkeypatch, NOON)
    assert spends(limits, 10)
    at(monkeypatch, NOON, 1)
    with pytest.raises(RateLimited, match=r"10 tokens a month .* ask again in 43200 s"):
        limits.admit("alice")


@pytest.mark.parametrize(
    ("now", "day", "month"),
    [
        (datetime(2026, 12, 31, 23, 59, 59, tzinfo=UTC), 1, 1),
        (datetime(2026, 1, 31, tzinfo=UTC), DAY, DAY),
        (datetime(2028, 2, 28, 12, tzinfo=UTC), DAY // 2, 1.5 * DAY),
        (datetime(2026, 2, 1, tzinfo=UTC), DAY, 28 * DAY),
    ],
)
def test_periods_are_those_of_the_calendar(now: datetime, day: float, month: float, monkeypatch: pytest.MonkeyPatch) -> None:
    at(monkeypatch, now)
    assert (seconds_left("day"), seconds_left("month")) == (day, month)


def test_a_key_has_a_budget_and_the_command_shows_what_is_used(tmp_path: Path, pipeline: Pipeline) -> None:
    file = tmp_path / "api-keys"

    def keys(*options: str) -> Result:
        told = {"COLUMNS": "200"}
        return CliRunner().invoke(main, ["keys", str(file), *options], prog_name="python -m knative", env=told)

    with redis_server() as port:
        store = f"redis://127.0.0.1:{port}/0"
        made = keys("--make", "alice", "--limit", "tokens_per_day=40")
        assert "gateway.limits_secret" in made.stderr
        client = client_of(pipeline, LAMINA_API_KEY_FILES=str(file), LAMINA_LIMITS_STORE=store)
        used = sum(asked(client, made.stdout.strip()).get_json()["usage"]["total_tokens"] for _ in range(2))
        refused = asked(client, made.stdout.strip())
        assert (refused.status_code, refused.get_json()["error"]["code"]) == (429, "rate_limited")
        assert f"40 tokens a day are what this client may have, and {used} are used" in refused.get_json()["error"]["message"]
        assert 1 <= int(refused.headers["Retry-After"]) <= DAY
        assert pipeline.entered == 2
        assert keys("--store", store).stdout.split().count(str(used)) == 2, "this day and this month"
    away = keys("--store", store)
    assert away.exit_code == 1
    assert "--store: the limits store does not answer" in away.stderr


def test_a_key_with_a_budget_and_no_store_is_refused(tmp_path: Path, pipeline: Pipeline) -> None:
    file, refusal = tmp_path / "api-keys", f"key {sha256_of('k')[:12]} has a budget, which takes a store"
    file.write_text("k tokens_per_month=5")
    with pytest.raises(ConfigError) as in_file:
        client_of(pipeline, LAMINA_API_KEY_FILES=str(file))
    with pytest.raises(ConfigError) as in_environment:
        client_of(pipeline, LAMINA_API_KEYS="k tokens_per_day=5")
    assert all(refusal in refused.value.errors[0] for refused in (in_file, in_environment))


def test_a_budget_that_comes_later_without_a_store_leaves_the_keys_as_they_were(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "api-keys"
    file.write_text("old")
    ring = KeyRing(files=[str(file)], takes_budgets=False)
    file.write_text("old, new tokens_per_day=5")
    ring._check_at = 0.0
    assert ring.find("old") is not None
    assert ring.find("new") is None
    assert "takes a store" in caplog.text


def test_a_gateway_goes_on_from_the_last_counts_while_the_store_is_away(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(budgets, "STORE_RETRY_SECONDS", 0.0)
    at(monkeypatch, NOON)
    quota = Quota(tokens_per_day=100)
    with redis_server() as port:
        url = f"redis://127.0.0.1:{port}/0"
        one, other, starts = (ClientLimits(quota, store=url) for _ in range(3))
        assert [spends(one, 40), spends(other, 20)] == [True, True]
    assert [spends(one, 30), spends(one, 30), spends(one, 1)] == [True, True, False], "40, as it knew, and 60 more"
    assert spends(other, 10), "60, as it knew, and 10 more"
    assert spends(starts, 5), "it knows of nothing"
    assert "their store does not answer" in caplog.text
    with redis_server(port):  # it has forgotten its counts
        assert [spends(each, 0) for each in (one, other, starts)] == [True] * 3
        assert Budgets(url).read("alice", "day") == 60 + 10 + 5, "what was used meanwhile is written"
