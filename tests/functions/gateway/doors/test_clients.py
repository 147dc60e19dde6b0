"""Who may come in, and how clients are told apart."""

import pytest
from flask.testing import FlaskClient

from tests.support.functions.doors import Pipeline, ask, client_of


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


def test_without_keys_clients_are_told_apart_by_address(client: FlaskClient, pipeline: Pipeline) -> None:
    ask(client, {"prompt": "Hi"}, X_Forwarded_For="10.0.0.7, 10.1.0.1")
    ask(client, {"prompt": "Hi"})
    assert [prompt.client_id for prompt in pipeline.prompts] == ["10.0.0.7", "127.0.0.1"]
