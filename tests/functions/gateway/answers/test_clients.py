"""Who may come in, and how clients are told apart."""

import hashlib

import pytest
from flask.testing import FlaskClient

from tests.support.functions.scripted_gateway import Pipeline, ask, client_of


@pytest.fixture
def closed(pipeline: Pipeline) -> FlaskClient:
    return client_of(pipeline, LAMINA_API_KEYS="first-key, second-key")


@pytest.mark.parametrize("given", [None, "Bearer wrong-key", "first-key", "Basic first-key", "Bearer "])
def test_both_doors_want_a_key_where_keys_are_configured(closed: FlaskClient, given: str | None) -> None:
    headers = {} if given is None else {"Authorization": given}
    assert ask(closed, {"prompt": "Hi"}, **headers).status_code == 401
    for refused in (closed.get("/v1/models", headers=headers), closed.post("/v1/completions", headers=headers, data=b"{")):
        assert refused.status_code == 401
        assert refused.json is not None
        assert refused.json["error"]["type"] == "authentication_error"


def test_clients_are_told_apart_by_their_keys_without_keeping_them(closed: FlaskClient, pipeline: Pipeline) -> None:
    for key in ("first-key", "second-key", "first-key"):
        assert ask(closed, {"prompt": "Hi"}, Authorization=f"Bearer {key}").status_code == 200
    one, two, three = (prompt.client_id for prompt in pipeline.prompts)
    assert one == three != two
    assert "key" not in one


def test_a_key_may_be_there_as_its_hash_which_is_no_key_itself(pipeline: Pipeline) -> None:
    hashed = f"sha256:{hashlib.sha256(b'first-key').hexdigest()}"
    client = client_of(pipeline, LAMINA_API_KEYS=f"{hashed}, second-key")
    for key in ("first-key", "second-key"):
        assert ask(client, {"prompt": "Hi"}, Authorization=f"Bearer {key}").status_code == 200
    assert pipeline.prompts[0].client_id == hashed[7:19]
    for other in (hashed, hashed[7:], "sha256:"):
        assert ask(client, {"prompt": "Hi"}, Authorization=f"Bearer {other}").status_code == 401


@pytest.mark.parametrize(
    ("proxies", "forwarded", "expected"),
    [
        (None, "10.0.0.7, 10.1.0.1", "10.1.0.1"),
        (1, "forged, 10.1.0.1", "10.1.0.1"),
        (2, "forged, 10.0.0.7, 10.1.0.1", "10.0.0.7"),
        (2, "10.1.0.1", "127.0.0.1"),
        (1, " ", "127.0.0.1"),
        (0, "forged", "127.0.0.1"),
    ],
)
def test_without_keys_clients_are_told_apart_by_what_the_platforms_proxies_saw(
    pipeline: Pipeline, proxies: int | None, forwarded: str, expected: str
) -> None:
    """Whatever a client writes itself stands before it, and gives it no further queue."""
    client = client_of(pipeline, **({} if proxies is None else {"LAMINA_PROXIES": str(proxies)}))
    ask(client, {"prompt": "Hi"}, X_Forwarded_For=forwarded)
    ask(client, {"prompt": "Hi"}, X_Forwarded_For=f"another, {forwarded}" if proxies != 2 or "," in forwarded else forwarded)
    ask(client, {"prompt": "Hi"})
    assert [prompt.client_id for prompt in pipeline.prompts] == [expected, expected, "127.0.0.1"]


@pytest.mark.parametrize("prefer", [None, "reply"])
def test_a_client_is_given_no_signed_event(client: FlaskClient, prefer: str | None) -> None:
    """Where clients come nothing is scored, whatever they write themselves."""
    headers = {} if prefer is None else {"Prefer": prefer}
    reply = ask(client, {"text": "Hello there"}, ce_type="dev.lamina.score.request", **headers)
    assert reply.status_code == 400
    assert "ce-signature" not in reply.headers
    assert b"Broker" in reply.data
