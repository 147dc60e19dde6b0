"""A client of a gateway without keys, over a scripted pipeline."""

import pytest
from flask.testing import FlaskClient

from functions.gateway.answers import deduplication
from tests.support.functions.scripted_gateway import Pipeline, client_of


@pytest.fixture
def pipeline() -> Pipeline:
    return Pipeline()


@pytest.fixture
def client(pipeline: Pipeline) -> FlaskClient:
    return client_of(pipeline)


@pytest.fixture
def abandoned_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A shared answer is cancelled as soon as its last client has left."""
    monkeypatch.setattr(deduplication, "ABANDONED_SECONDS", 0.0)
