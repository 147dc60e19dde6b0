"""`GET /openapi.json`: describes the gateway's paths in OpenAPI 3.1, generated from the types that check requests."""

import re
from collections.abc import Iterable, Iterator
from functools import cache
from http import HTTPStatus
from typing import Any, Final

import msgspec
from flask import Flask, Response

from eventing.problems import PROBLEM_CONTENT_TYPE
from eventing.wire.generation import GenerateRequest
from functions.gateway.openai.requests import ChatRequest, CompletionRequest
from functions.gateway.openai.responses_requests import ResponsesRequest
from functions.gateway.openai.tokens import VERSION, TokenizeRequest
from functions.gateway.openapi.operations import JSON, Content, Operation
from functions.gateway.openapi.replies import ErrorReply, ProblemDocument

_SCHEMAS: Final = "#/components/schemas/{name}"
_DESCRIPTION: Final = (
    "Lamina's gateway. Requests are checked by these very types. What is no HTTP/1.1 is refused before it has a path, "
    "as text/plain: 400, 408, 431 or 501. Paths and methods that are not listed: 404 and 405."
)


def openapi_document(operations: Iterable[Operation], model: str, *, with_keys: bool) -> dict[str, Any]:
    """Returns the OpenAPI document as JSON objects.

    `model` is the name of the served model. `with_keys` says whether the gateway requires an API key.
    """
    listed = list(operations)
    types = _types(listed)
    schemas, components = msgspec.json.schema_components(types, ref_template=_SCHEMAS)
    known = dict(zip(types, schemas, strict=True))
    paths: dict[str, dict[str, Any]] = {}
    for operation in listed:
        paths.setdefault(operation.path, {})[operation.method] = _operation(operation, known, model, with_keys=with_keys)
    for type_ in (ChatRequest, CompletionRequest, ResponsesRequest):
        components[type_.__name__]["properties"]["model"]["enum"] = [model]
    for one_of_two in (GenerateRequest, TokenizeRequest):  # checked by their __post_init__
        components[one_of_two.__name__]["oneOf"] = [{"required": ["prompt"]}, {"required": ["messages"]}]
    return {
        "openapi": "3.1.0",
        "info": {"title": "Lamina", "version": VERSION, "description": _DESCRIPTION},
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer", "description": "An API key of the gateway"}},
        },
    }


def register_document(app: Flask, operations: Iterable[Operation], model: str, *, with_keys: bool) -> None:
    """Serves `/openapi.json`. The document is generated at the first request, so that the gateway starts without delay."""
    document = cache(lambda: msgspec.json.encode(openapi_document(operations, model, with_keys=with_keys)))
    app.get("/openapi.json", endpoint="openapi")(lambda: Response(document(), content_type=JSON))


def _types(operations: Iterable[Operation]) -> list[Any]:
    """Returns each type of a body or event that the operations use, and the types of errors, once."""
    found: dict[Any, None] = {ErrorReply: None, ProblemDocument: None}
    for each in operations:
        for type_ in (*each.request.values(), *(each.replies or {}).values(), each.events, each.negative):
            if type_ is not None:
                found[type_] = None
    return list(found)


def _operation(operation: Operation, schemas: dict[Any, Any], model: str, *, with_keys: bool) -> dict[str, Any]:
    described: dict[str, Any] = {
        "operationId": re.sub(r"\W+", "_", f"{operation.method}{operation.path}").strip("_"),
        "summary": operation.summary,
        "responses": dict(_responses(operation, schemas)),
    }
    if parameters := list(_parameters(operation, model)):
        described["parameters"] = parameters
    if operation.request:
        described["requestBody"] = {"required": True, "content": _content(operation.request, schemas)}
    if operation.keyed and with_keys:
        described["security"] = [{"key": []}]
    return described


def _parameters(operation: Operation, model: str) -> Iterator[dict[str, Any]]:
    for name in re.findall(r"{(\w+)}", operation.path):
        values = {"enum": [model]} if name == "model" else {}
        yield {"name": name, "in": "path", "required": True, "schema": {"type": "string", **values}}
    for name, schema in operation.query.items():
        yield {"name": name, "in": "query", "schema": {"type": "string", **schema}}
    for name, schema in operation.headers.items():
        described = {"type": "string", **schema}
        meaning = (
            "In binary mode (CloudEvents 1.0)" if name.startswith("ce-") else "Repeated with its key, a request gets its answer"
        )
        yield {"name": name, "in": "header", "schema": described, "description": meaning}


def _responses(operation: Operation, schemas: dict[Any, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    success: dict[str, Any] = {"description": "OK"}
    if operation.replies is not None:
        success["content"] = _content(operation.replies, schemas, _event(operation, schemas))
    yield "200", success
    if operation.negative is not None:
        yield "503", {"description": "It is not", "content": _content({JSON: operation.negative}, schemas)}
    shape: Content = {JSON: ErrorReply} if operation.path.startswith("/v1") else {PROBLEM_CONTENT_TYPE: ProblemDocument}
    for status in sorted({*operation.errors, *([401] if operation.keyed else [])}):
        yield str(status), {"description": HTTPStatus(status).phrase, "content": _content(shape, schemas)}


def _content(content: Content, schemas: dict[Any, Any], event: dict[str, Any] | None = None) -> dict[str, Any]:
    """Returns a body's `content` in the document: media type → schema.

    `event` is the schema of a body without a type that is a stream of events. If it is None, such a body is any text.
    """
    text = {"type": "string"} if event is None else event
    return {media_type: {"schema": text if type_ is None else schemas[type_]} for media_type, type_ in content.items()}


def _event(operation: Operation, schemas: dict[Any, Any]) -> dict[str, Any] | None:
    """Returns the schema of one server-sent event of the operation's reply; None if the reply is no stream.

    OpenAPI 3.1 cannot describe a stream, so tools expect the schema of one event in its place.
    """
    if operation.events is None:
        return None
    data = [schemas[operation.events], {"type": "object"} if operation.patched else schemas[ErrorReply]]
    json = {"type": "string", "contentMediaType": JSON, "contentSchema": {"anyOf": data}}
    return {
        "type": "object",
        "properties": {"event": {"type": "string"}, "data": {"anyOf": [{"const": "[DONE]"}, json]}},
        "required": ["data"],
    }
