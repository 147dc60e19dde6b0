"""Random requests by the OpenAPI document to a real pipeline (schemathesis): every reply conforms to the document.

`make test-api CASES=500` sends so many requests to each operation, half of them against its schema. The endless stream of the
pipeline's state and the request that is held open have their own tests.
"""

import json
import os
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.schemas import APIOperation
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from functions.gateway.openapi.document import openapi_document
from functions.gateway.openapi.operations import operations
from tests.support.functions.functions import FunctionProcess, running_gateway
from tests.support.storage.published import Published

CASES = int(os.environ.get("CASES") or 12)
MANY = 200  # among so many requests to an operation, some succeed
ENDLESS = "/v1/pipeline/events"
HELD = "/v1/batches/hold"  # a minute for each reply
CHECKS = [status_code_conformance, content_type_conformance, response_schema_conformance, response_headers_conformance]
OPERATIONS = [
    (each.method, each.path)
    for each in operations(with_page=True, with_jobs=True)
    if each.path not in (ENDLESS, HELD, "/healthz", "/readyz")
]


@pytest.fixture(scope="module")
def gateway(published: Published, stages: list[FunctionProcess]) -> Iterator[FunctionProcess]:
    with running_gateway(published, stages, LAMINA_REQUEST_TIMEOUT_SECONDS="20", LAMINA_JOBS_STORE="lamina/jobs") as gateway:
        yield gateway


@pytest.fixture(scope="module")
def document(gateway: FunctionProcess) -> dict[str, Any]:
    reply = requests.get(f"{gateway.url}/openapi.json", timeout=30)
    found: dict[str, Any] = reply.json()
    return found


def test_the_served_document_is_the_generated_one(document: dict[str, Any]) -> None:
    assert document == json.loads(
        json.dumps(openapi_document(operations(with_page=True, with_jobs=True), "tiny", with_keys=False))
    )


@pytest.mark.timeout(3000)
@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_every_reply_conforms_to_the_document(
    gateway: FunctionProcess, document: dict[str, Any], method: str, path: str
) -> None:
    operation: APIOperation = schemathesis.openapi.from_dict(document)[path][method]
    seen: Counter[int] = Counter()

    @settings(
        max_examples=CASES,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
        database=None,
        derandomize=CASES < MANY,
    )
    @given(st.data())
    def holds(data: st.DataObject) -> None:
        mode = data.draw(st.sampled_from(GenerationMode), "mode")
        if method == "get":
            mode = GenerationMode.POSITIVE  # it has nothing that could be wrong
        case = data.draw(operation.as_strategy(generation_mode=mode), "case")
        reply = case.call(base_url=gateway.url, timeout=60)
        seen[reply.status_code] += 1
        assert reply.status_code < 500 or reply.status_code == 503, f"{reply.status_code}: {case.as_curl_command()}"
        case.validate_response(reply, checks=CHECKS)

    holds()
    assert seen[200] or CASES < MANY, f"{seen}: no request succeeded"
    assert method == "get" or seen.total() >= CASES // 2
    assert gateway.process.poll() is None
