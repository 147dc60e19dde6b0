"""CORS headers are sent for configured origins only."""

from typing import Any

import pytest
from flask.testing import FlaskClient

from functions.configuration.config import read_config
from functions.configuration.settings import ConfigError
from tests.support.environments import GATEWAY
from tests.support.functions.scripted_gateway import EVENT, Pipeline, chat, client_of

PAGE = "https://chat.example"
ASKS = {"Origin": PAGE, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}


def preflight(client: FlaskClient, path: str = "/v1/chat/completions", **headers: str) -> dict[str, str]:
    """CORS headers of the reply to a preflight request."""
    reply = client.options(path, headers=ASKS | headers)
    return {name: value for name, value in reply.headers if name.startswith("Access-Control")}


def test_replies_have_no_cors_headers_and_a_restrictive_policy_by_default(client: FlaskClient) -> None:
    asked: dict[str, Any] = {"headers": {"Origin": PAGE}, "json": {"model": "tiny", "prompt": "Hi"}}
    streamed: dict[str, Any] = asked | {"json": asked["json"] | {"stream": True}}
    assert preflight(client) == {}
    for reply in (
        client.get("/v1/models", headers=asked["headers"]),
        client.post("/v1/completions", **asked),
        client.post("/v1/completions", **streamed),
        client.post("/", json={"prompt": "Hi"}, headers=EVENT | asked["headers"]),
        client.get("/nowhere", headers=asked["headers"]),
    ):
        assert "access-control-" not in str(reply.headers).lower()
        assert reply.headers["X-Content-Type-Options"] == "nosniff"
        assert reply.headers["Content-Security-Policy"] == "default-src 'none'; frame-ancestors 'none'"
        assert "no-" in reply.headers["Cache-Control"]


@pytest.mark.parametrize("path", ["/", "/v1/chat/completions", "/v1/models", "/tokenize"])
def test_a_configured_origin_may_send_requests(path: str, pipeline: Pipeline) -> None:
    client = client_of(pipeline, LAMINA_CORS_ORIGINS=f"http://localhost:3000, {PAGE}", LAMINA_API_KEYS="key")
    assert preflight(client, path) == {
        "Access-Control-Allow-Origin": PAGE,
        "Access-Control-Allow-Methods": "GET, POST, DELETE, OPTIONS",
        "Access-Control-Allow-Headers": "authorization,content-type",
        "Access-Control-Expose-Headers": "X-Request-Id, Retry-After",
        "Access-Control-Max-Age": "600",
    }
    assert "Access-Control-Allow-Credentials" not in preflight(client, path)


def test_other_origins_get_no_headers_and_caches_learn_that_replies_vary(pipeline: Pipeline) -> None:
    client = client_of(pipeline, LAMINA_CORS_ORIGINS=PAGE)
    for origin in ("https://evil.example", f"{PAGE}.evil.example", "null", f"{PAGE}:8443", "http://chat.example"):
        assert preflight(client, Origin=origin) == {}
    assert "Origin" in client.get("/v1/models").headers["Vary"]


def test_a_configured_origin_may_read_answers_and_errors(pipeline: Pipeline) -> None:
    client = client_of(pipeline, LAMINA_CORS_ORIGINS=PAGE, LAMINA_API_KEYS="key")
    asked = {"json": {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}]}}
    for key, status in (("key", 200), ("wrong", 401)):
        headers = {"Origin": PAGE, "Authorization": f"Bearer {key}"}
        reply = client.post("/v1/chat/completions", headers=headers, **asked)
        assert (reply.status_code, reply.headers["Access-Control-Allow-Origin"]) == (status, PAGE)
    assert client.get("/nowhere", headers={"Origin": PAGE}).headers["Access-Control-Allow-Origin"] == PAGE


def test_a_star_allows_all_origins(pipeline: Pipeline) -> None:
    client = client_of(pipeline, LAMINA_CORS_ORIGINS="*")
    assert preflight(client, Origin="https://any.example")["Access-Control-Allow-Origin"] == "*"
    assert chat(client).status_code == 200


@pytest.mark.parametrize(
    "wrong", ["chat.example", "https://chat.example/", "https://Chat.example", "https://a@b", "https://a,"]
)
def test_an_origin_that_no_browser_sends_is_a_configuration_error(wrong: str) -> None:
    with pytest.raises(ConfigError, match=r"LAMINA_CORS_ORIGINS: .* origins such as"):
        read_config(GATEWAY | {"LAMINA_CORS_ORIGINS": wrong})
