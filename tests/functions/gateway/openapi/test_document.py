"""The OpenAPI document has every path and method that is served, its references resolve, and replies match it."""

import json
import re
from typing import Any

import msgspec
import pytest

from functions.gateway.answers.authentication import KeyRing
from functions.gateway.app import create_app
from functions.gateway.openapi.document import openapi_document
from functions.gateway.openapi.operations import operations
from functions.gateway.openapi.replies import (
    ChatCompletion,
    ChatCompletionChunk,
    Completion,
    ErrorReply,
    ResponseEvent,
    ResponseObject,
)
from functions.hosting.server import PROBES
from tests.functions.gateway.page.test_pipeline_events import Pipe
from tests.support.environments import gateway_config
from tests.support.functions.scripted_gateway import Pipeline, client_of

PROBE_ROUTES = {("get", path) for path in PROBES}


def served(page: str) -> set[tuple[str, str]]:
    config = gateway_config(LAMINA_PAGE=page)
    app = create_app(config, lambda: None, Pipeline().metrics, KeyRing(), lambda _: None, Pipe().watched)  # type: ignore[arg-type, return-value]
    rules = [(each.methods or set(), re.sub(r"<(?:\w+:)?(\w+)>", r"{\1}", each.rule)) for each in app.url_map.iter_rules()]
    return {(method.lower(), path) for methods, path in rules for method in methods - {"HEAD", "OPTIONS"}}


@pytest.mark.parametrize("page", ["on", "off"])
def test_the_document_describes_exactly_the_paths_that_are_served(page: str) -> None:
    document = openapi_document(operations(with_page=page == "on"), "tiny", with_keys=False)
    described = {(method, path) for path, methods in document["paths"].items() for method in methods}
    assert described == served(page) | PROBE_ROUTES, "functions/gateway/openapi/operations.py has every path"


def references(node: Any) -> set[str]:
    if isinstance(node, dict):
        own = {node["$ref"]} if "$ref" in node else set()
        return own.union(*map(references, node.values()))
    return set().union(*map(references, node)) if isinstance(node, list) else set()


def test_the_document_is_served_and_its_references_resolve() -> None:
    reply = client_of(Pipeline(), LAMINA_API_KEYS="a-key").get("/openapi.json")
    assert (reply.status_code, reply.content_type) == (200, "application/json")
    document = reply.get_json()
    schemas = {f"#/components/schemas/{name}" for name in document["components"]["schemas"]}
    assert references(document) <= schemas
    assert all("." not in name for name in schemas), "two types of the same name"
    assert document["paths"]["/v1/chat/completions"]["post"]["security"] == [{"key": []}]
    assert "security" not in document["paths"]["/health"]["get"]


def chat(**more: Any) -> dict[str, Any]:
    return {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 8, **more}


def test_replies_have_the_types_of_the_document() -> None:
    client = client_of(Pipeline())
    msgspec.json.decode(client.post("/v1/chat/completions", json=chat()).data, type=ChatCompletion)
    asked = {"model": "tiny", "prompt": "Hi", "max_tokens": 8}
    msgspec.json.decode(client.post("/v1/completions", json=asked).data, type=Completion)
    respond = {"model": "tiny", "input": "Hi", "max_output_tokens": 8}
    msgspec.json.decode(client.post("/v1/responses", json=respond).data, type=ResponseObject)
    msgspec.json.decode(client.post("/v1/chat/completions", json={"no": 1}).data, type=ErrorReply)
    for path, body, type_ in (
        ("/v1/chat/completions", chat(stream=True), ChatCompletionChunk),
        ("/v1/completions", asked | {"stream": True}, Completion),
        ("/v1/responses", respond | {"stream": True}, ResponseEvent),
    ):
        events = re.findall(r"data: (.*)\n\n", client.post(path, json=body).text)
        assert path == "/v1/responses" or events.pop() == "[DONE]"
        for event in events:
            msgspec.convert(json.loads(event), type_, strict=True)
        assert len(events) >= 2
