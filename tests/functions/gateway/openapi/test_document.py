"""The OpenAPI document has every path and method that is served, its references resolve, and replies match it."""

import json
import re
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from eventing.wire.generation import TokenLogprob
from functions.gateway.answers.authentication import KeyRing
from functions.gateway.app import configured_jobs, create_app
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
from functions.gateway.scheduling.token_stream import TokenStream
from functions.hosting.answering import PROBES
from tests.functions.gateway.page.test_state_events import Pipe
from tests.support.environments import gateway_config
from tests.support.functions.scripted_gateway import END, TOKENIZER, Pipeline, Script, client_of
from tests.support.storage.published import CHAT_TEMPLATE

PROBE_ROUTES = {("get", path) for path in PROBES}


def served(page: str) -> set[tuple[str, str]]:
    config = gateway_config(LAMINA_PAGE=page, **({"LAMINA_JOBS_STORE": "lamina/jobs"} if page == "on" else {}))
    app = create_app(
        config, lambda: None, Pipeline().metrics, KeyRing(), lambda _: None, Pipe().watched, configured_jobs(config)
    )  # type: ignore[arg-type, return-value]
    rules = [(each.methods or set(), re.sub(r"<(?:\w+:)?(\w+)>", r"{\1}", each.rule)) for each in app.url_map.iter_rules()]
    return {(method.lower(), path) for methods, path in rules for method in methods - {"HEAD", "OPTIONS"}}


@pytest.mark.parametrize("page", ["on", "off"])
def test_the_document_describes_exactly_the_paths_that_are_served(page: str) -> None:
    document = openapi_document(operations(with_page=page == "on", with_jobs=page == "on"), "tiny", with_keys=False)
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


TOOL = {"name": "add", "parameters": {"type": "object"}}
CALLING = '<think>Hm.</think>I add.<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>'
CHAT = {
    "model": "tiny",
    "messages": [{"role": "user", "content": "Hi"}],
    "tools": [{"type": "function", "function": TOOL}],
    "logprobs": True,
    "stream_options": {"include_usage": True},
}
RESPOND = {"model": "tiny", "input": "Hi", "tools": [{"type": "function", **TOOL}], "include": ["message.output_text.logprobs"]}
COMPLETE = {"model": "tiny", "prompt": "Hi", "max_tokens": 8, "logprobs": 1}


@pytest.mark.parametrize(
    ("path", "body", "whole", "event", "open_"),
    [
        ("chat/completions", CHAT, ChatCompletion, ChatCompletionChunk, False),
        ("completions", COMPLETE, Completion, Completion, False),
        ("responses", RESPOND, ResponseObject, ResponseEvent, True),
        ("chat/completions", {"no": 1}, ErrorReply, None, False),
    ],
)
def test_replies_have_the_types_of_the_document(
    path: str, body: dict[str, Any], whole: type, event: type | None, open_: bool
) -> None:
    """open_: the document says that there are fields beside those that it lists."""
    pipeline = Pipeline()
    pipeline.script = with_logprobs(CALLING)
    client = client_of(pipeline, template=CHAT_TEMPLATE + "{# </think> #}", context=4096)
    reply = client.post(f"/v1/{path}", json=body).get_json()
    assert undocumented(reply, whole, open_) == set()
    if whole is ResponseObject:
        assert [item["type"] for item in reply["output"]] == ["reasoning", "message", "function_call"]
    if event is not None:
        events = re.findall(r"data: (.*)\n\n", client.post(f"/v1/{path}", json=body | {"stream": True}).text)
        assert open_ or events.pop() == "[DONE]"
        assert len(events) >= 2
        assert set().union(*(undocumented(json.loads(each), event, open_) for each in events)) == set()


def with_logprobs(text: str) -> Script:
    def script(stream: TokenStream) -> None:
        for token in [*TOKENIZER.encode(text, add_special_tokens=False).ids, END]:
            stream.put(token, TokenLogprob(token, -1.0, ((token, -1.0),)))

    return script


def undocumented(reply: Any, type_: type, open_: bool = False) -> set[str]:
    """Paths of the reply's fields that its type lacks. open_: its first level may have others. Raises if the type differs."""
    known = msgspec.to_builtins(msgspec.convert(reply, type_, strict=True))
    return set(differences({key: value for key, value in reply.items() if not open_ or key in known}, known))


def differences(seen: Any, known: Any, path: str = "") -> Iterator[str]:
    if isinstance(seen, dict):
        for key, value in seen.items():
            yield from differences(value, known[key], f"{path}.{key}") if key in known else [f"{path}.{key}"]
    elif isinstance(seen, list):
        for one, other in zip(seen, known, strict=True):
            yield from differences(one, other, f"{path}[]")
