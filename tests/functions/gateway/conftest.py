"""A client of a gateway without keys, over a scripted pipeline."""

import pytest
from flask.testing import FlaskClient

from tests.support.functions.scripted_gateway import Pipeline, client_of


@pytest.fixture
def pipeline() -> Pipeline:
    return Pipeline()


@pytest.fixture
def client(pipeline: Pipeline) -> FlaskClient:
    return client_of(pipeline)
